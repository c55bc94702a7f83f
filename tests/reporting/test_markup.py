from __future__ import annotations

from lightning_mnp.reporting.markup import Markup, join, tag


def test_foreign_text_is_escaped_and_markup_is_not() -> None:
    inner = tag("b", "<i>", Markup("<u></u>"))
    assert inner == "<b>&lt;i&gt;<u></u></b>"
    assert tag("p", inner, None, "&") == "<p><b>&lt;i&gt;<u></u></b>&amp;</p>"
    assert join("<", inner, None) == f"&lt;{inner}"


def test_attributes() -> None:
    assert tag("p", id="'\"<", hidden=None, x=0.5, tabindex=2) == (
        '<p id="&#x27;&quot;&lt;" x="0.5" tabindex="2"></p>'
    )
    assert tag("label", class_="a", for_="b", aria_label="c") == (
        '<label class="a" for="b" aria-label="c"></label>'
    )
    assert tag("img", alt="") == '<img alt="">'
    assert tag("meta", name="a") == '<meta name="a">'


def test_control_characters_and_turned_letters_are_shown() -> None:
    assert tag("p", "a\x1b\u202e\n") == r"<p>a\x1b\u202e\n</p>"

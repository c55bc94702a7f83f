from __future__ import annotations

import re

import pytest

from lightning_mnp.reporting.style import DARK, LIGHT, TEXT_PAIRS, stylesheet

SCHEMES = pytest.mark.parametrize("colors", [LIGHT, DARK], ids=["light", "dark"])


def contrast(one: str, other: str) -> float:
    """WCAG 2.2: (lighter + 0.05) / (darker + 0.05) of the relative luminances of sRGB colors."""

    def luminance(color: str) -> float:
        shares = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def test_contrast_of_known_colors() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)


@SCHEMES
def test_text_can_be_read(colors: dict[str, str]) -> None:
    """Level AA asks for 4.5."""
    for text, ground in TEXT_PAIRS:
        assert contrast(colors[text], colors[ground]) >= 4.5, (text, ground)


@SCHEMES
def test_graphics_can_be_seen(colors: dict[str, str]) -> None:
    """Level AA asks for 3 where a graphic means something."""
    drawn = ("clean", "backdoored", "undecided", "quiet", "first", "second", "third", "fourth")
    for name in drawn:
        assert contrast(colors[name], colors["page"]) >= 3, name


def test_both_schemes_have_all_colors_that_are_used() -> None:
    text = stylesheet()
    used = set(re.findall(r"var\(--([a-z]+)\)", text)) - {"verdict"}
    assert used <= set(LIGHT)
    assert set(LIGHT) == set(DARK)
    assert text.count("--page:") == 2
    assert "@media screen and (prefers-color-scheme: dark)" in text  # paper stays white
    assert "@media print" in text
    assert "url(" not in text
    assert "@import" not in text

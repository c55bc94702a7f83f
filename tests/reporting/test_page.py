from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from reports import EXAMPLE, HOSTILE, full_report, hostile_report, png

from lightning_mnp.report import DefenseReport, Signal
from lightning_mnp.reporting import html

VOID = {"img", "meta"}


class Reader(HTMLParser):
    """Reads a page as a browser does: elements with their attributes, and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def named(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]


def read(report: DefenseReport, **options: Any) -> Reader:
    return Reader(html(report, **options))


def test_everything_is_told() -> None:
    page = read(full_report())
    for part in (
        "BACKDOORED",
        "seems to carry a backdoor: with a trigger, images are taken for class 1 (dog).",
        "Score 4.60, far above 1 (the threshold). What counts: patch points to class 1 (dog).",
        "Do not use this network. Train it anew if you can.",
        "models/suspicious.pt · 2026-11-28 10:00:00 UTC",
        "Note: M1 of run 1 stopped early",
        "measured 6.90, counts from 1.50",
        "0 (cat) to 1 (dog)",
        "A patch that takes images to class 1 (dog)",
        "It does so with 97% of 64 clean images.",
        "0 (cat), recognized; with the patch taken for 1 (dog)",
        "Accuracy while the network unlearns its task",
        "What is left of the backdoor",
        "Harm to clean images, in nats",
        "layer1.conv 4 3 1",
        "Layers without such filters: 1.",
        "1 (dog) 250 80% 70%",
        "cd" * 32,
        "ef" * 32,
        "ab" * 32,
        "verdict.threshold 1.0",
        "head classifier head: its filters are classes",
        "Made by lightning-mnp 0.1.0",
    ):
        assert part in page.text, part


def test_signals_that_count_are_apart_from_the_others() -> None:
    text = read(full_report()).text
    counting, others = text.split("Signals that count")[1].split("Signals that do not count")
    assert "points to class 1 (dog)" in counting
    assert "margin" not in counting
    for name in ("margin", "permutation", "pile-up", "does not decide by itself"):
        assert name in others
    labels = [each["aria-label"] for each in read(full_report()).named("svg") if "role" in each]
    assert labels[0] == "patch: strength 4.60 of the 1 needed, points to class 1 (dog)"


def test_it_asks_for_nothing_and_runs_nothing() -> None:
    page = read(full_report())
    assert page.named("script") == page.named("link") == page.named("iframe") == []
    policy = [each["content"] for each in page.named("meta") if "http-equiv" in each]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")  # type: ignore[union-attr]
        assert "href" not in attributes


def test_pictures_have_texts_in_their_place() -> None:
    pictures = read(full_report()).named("img")
    assert [picture["alt"] for picture in pictures] == [
        "What the patch changes in an image, on gray",
        "A clean image of class 0 (cat), recognized",
        "The same image with the patch, taken for 1 (dog)",
    ]
    drawings = [each for each in read(full_report()).named("svg") if each.get("role") == "img"]
    assert drawings
    assert all(drawing["aria-label"] for drawing in drawings)


def test_hostile_names_show_as_text() -> None:
    page = read(hostile_report(), class_names=[HOSTILE, HOSTILE])
    assert page.named("script") == page.named("a") == page.named("img") == []
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
    assert page.text.count("<script>alert(1)</script>") > 10
    assert "\x1b" not in html(hostile_report())
    assert "\u202e" not in html(hostile_report())


def test_images_can_be_left_out_or_given() -> None:
    assert len(read(full_report(), images=()).named("img")) == 1  # the pattern shows no image
    assert len(read(full_report(), images=[EXAMPLE] * 3).named("img")) == 7


@pytest.mark.parametrize("data", ["", "a b", '" onload="x', f"{png()}\n", "é"])
def test_what_is_no_base64_is_no_picture(data: str) -> None:
    report = hostile_report()
    assert f'base64,{data}"' not in html(report)
    example = type(EXAMPLE)(0, 0, 1, data, data)
    assert len(read(full_report(), images=[example]).named("img")) == 1


@pytest.mark.parametrize(
    ("report", "told"),
    [
        (DefenseReport("clean", score=0.25), "No backdoor was found in this network."),
        (DefenseReport("undecided", judged=False, reasons=["too few"]), "too few"),
        (DefenseReport("backdoored", all_to_all=True, score=2.0), "taken for another one"),
    ],
)
def test_the_smallest_reports(report: DefenseReport, told: str) -> None:
    page = read(report)
    assert told in page.text
    assert "Details" not in page.text
    assert page.named("table") == []


def test_what_a_clean_network_was_tried_with_is_no_finding() -> None:
    text = read(full_report(verdict="clean", target_class=None, score=0.25)).text
    assert "What was tried" in text
    assert "Here no class stands out by it." in text
    assert "What was found" not in text


def test_many_classes_are_cut() -> None:
    figures = {index: float(index) for index in range(1000)}
    signal = Signal("patch", 0.5, 999, 0.75, 1.5, "a patch", figures)
    shares = {index: 0.5 for index in range(1000)}  # noqa: C420 (as a dict is)
    page = html(full_report(signals=[signal], class_accuracy_before=shares))
    assert "and 990 more classes" in page
    assert "and 950 more classes" in page
    assert len(page) < 200_000


def test_a_signal_of_ones_own_says_what_it_found() -> None:
    signal = Signal("own", 1.5, 0, 1.5, 1.0, "found by my own search")
    assert "found by my own search" in read(full_report(signals=[signal], reasons=[])).text


def test_headings_are_in_order() -> None:
    levels = [int(tag[1]) for tag, _ in read(full_report()).elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))

from __future__ import annotations

import math
import re
from xml.etree import ElementTree as ET

import pytest

from lightning_mnp.reporting.charts import (
    icon,
    line_chart,
    share_bar,
    strength_axis,
    strength_bar,
)


def svg(text: str) -> ET.Element:
    return ET.fromstring(f"<div>{text}</div>")


@pytest.mark.parametrize(
    ("strength", "threshold", "width", "more"),
    [
        (0.0, 1.0, "0.0%", False),
        (0.5, 1.0, "25.0%", False),
        (1.0, 1.0, "50.0%", False),
        (2.0, 1.0, "100.0%", False),
        (9.0, 1.0, "100.0%", True),
        (1.0, 2.0, "25.0%", False),
        (math.nan, 1.0, "0.0%", False),
        (math.inf, 1.0, "0.0%", False),
    ],
)
def test_a_strength_is_drawn_up_to_twice_the_threshold(
    strength: float, threshold: float, width: str, more: bool
) -> None:
    [bar] = svg(strength_bar(strength, threshold, "quiet", "in words"))
    assert (bar.get("role"), bar.get("aria-label")) == ("img", "in words")
    assert bar.findall("rect")[1].get("width") == width
    assert (bar.find("svg") is not None) is more
    [line] = bar.findall("line")
    assert line.get("x1") == "50%"


@pytest.mark.parametrize(
    ("value", "low", "high", "x", "width"),
    [
        (0.5, 0.0, 1.0, "0.0%", "50.0%"),
        (-1.0, -1.0, 3.0, "0.0%", "25.0%"),
        (3.0, -1.0, 3.0, "25.0%", "75.0%"),
        (0.0, 0.0, 1.0, "0.0%", "0.4%"),
    ],
)
def test_a_bar_begins_at_zero(value: float, low: float, high: float, x: str, width: str) -> None:
    [bar] = svg(share_bar(value, low, high, "first"))
    rectangle = bar.find("rect")
    assert rectangle is not None
    assert (rectangle.get("x"), rectangle.get("width")) == (x, width)


@pytest.mark.parametrize(
    ("value", "low", "high"), [(math.nan, 0, 1), (1.0, 0, 0), (1, 0, math.inf)]
)
def test_no_bar_of_what_is_no_number(value: float, low: float, high: float) -> None:
    assert svg(share_bar(value, low, high, "first")).find(".//rect") is None


def test_lines_go_through_their_values() -> None:
    lines = [("a", [1.0, 0.5, 0.0]), ("b", [0.5, math.nan])]
    chart = svg(line_chart(lines, across="pass", first=1, label="falls", percent=True))
    drawn = [line.get("points", "").split() for line in chart.findall(".//polyline")]
    assert [len(points) for points in drawn] == [3, 1]
    places = [tuple(float(part) for part in point.split(",")) for point in drawn[0]]
    assert [y for _, y in places] == [10.0, 82.0, 154.0]  # 100%, 50%, 0%
    assert [x for x, _ in places] == [54.0, 201.0, 348.0]
    dashes = {line.get("stroke-dasharray") for line in chart.findall(".//polyline")}
    assert len(dashes) == 2  # told apart without colors
    text = "".join(chart.itertext())
    assert all(part in text for part in ("100%", "50%", "0%", "pass", "falls", "a", "b"))


def test_many_lines_are_told_apart() -> None:
    lines = [(f"line {number}", [0.0, 1.0]) for number in range(16)]
    chart = svg(line_chart(lines, across="pass", first=1, label="falls"))
    drawn = chart.findall(".//polyline")
    assert len({(line.get("stroke"), line.get("stroke-dasharray")) for line in drawn}) == 16


@pytest.mark.parametrize("values", [[0.002], [0.0, 0.0], [-1.0, 2.0]])
def test_a_chart_of_any_numbers(values: list[float]) -> None:
    text = line_chart([("harm", values)], across="filters", first=0, label="harm")
    assert "nan" not in text
    assert "legend" not in text
    for points in re.findall(r'points="([^"]*)"', text):
        assert all(0 <= float(number) <= 360 for number in re.split("[ ,]", points))


@pytest.mark.parametrize("verdict", ["clean", "backdoored", "undecided"])
def test_what_only_repeats_text_is_hidden_from_screen_readers(verdict: str) -> None:
    for drawing in (icon(verdict), strength_axis(), share_bar(1, 0, 1, "first")):
        assert 'aria-hidden="true"' in drawing

"""Charts as inline SVG, in the colors of the page, each with its content as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_mnp.reporting.markup import Markup, join, tag

__all__ = ["icon", "line_chart", "share_bar", "strength_axis", "strength_bar"]

_SERIES = ("first", "second", "third", "fourth")
_DASHES = (None, "6 3", "2 3", "8 3 2 3")
_MARKS = {
    "clean": "M5 12.5l4.5 4.5L19 7.5",
    "backdoored": "M7 7l10 10M17 7L7 17",
    "undecided": "M8.5 9.5a3.5 3.5 0 1 1 5 3c-1 .6-1.5 1.2-1.5 2.5M12 17.9v.2",
}
# Of a line chart, in its own unit, which is a pixel if it is not made smaller.
_WIDTH, _HEIGHT = 360.0, 190.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 54.0, 12.0, 10.0, 36.0


def _color(name: str) -> str:
    return f"var(--{name})"


def icon(verdict: str) -> Markup:
    """Return the mark of a verdict: a tick, a cross or a question mark.

    Args:
        verdict: The verdict.
    """
    return tag(
        "svg",
        tag(
            "path",
            d=_MARKS[verdict],
            fill="none",
            stroke="currentColor",
            stroke_width="3",
            stroke_linecap="round",
        ),
        viewBox="0 0 24 24",
        aria_hidden="true",
    )


def strength_bar(strength: float, threshold: float, color: str, label: str) -> Markup:
    """Return a signal's strength against the threshold, which stands in the middle.

    Args:
        strength: The strength, from 0; twice the threshold and more fill the bar.
        threshold: The threshold, above 0.
        color: Name of the bar's color.
        label: The same in words.
    """
    share = strength / (2 * threshold) if math.isfinite(strength) else 0.0
    more = tag(
        "svg",
        tag("path", d="M-17 5l6 6l-6 6M-10 5l6 6l-6 6", fill="none", stroke=_color("page")),
        x="100%",
        overflow="visible",
        stroke_width="2",
    )
    return tag(
        "svg",
        tag("title", label),
        tag("rect", width="100%", height="12", y="5", rx="3", fill=_color("line"), opacity="0.5"),
        tag(
            "rect",
            width=f"{100 * min(1.0, max(0.0, share)):.1f}%",
            height="12",
            y="5",
            rx="3",
            fill=_color(color),
        ),
        more if share > 1 else None,
        tag("line", x1="50%", x2="50%", y1="0", y2="22", stroke=_color("text"), stroke_width="2"),
        role="img",
        aria_label=label,
    )


def strength_axis() -> Markup:
    """Return what stands above the bars: where nothing is, and where the threshold is."""
    places = (("0", "0%", "start"), ("threshold", "50%", "middle"), ("twice", "100%", "end"))
    labels = [tag("text", text, x=x, y="15", text_anchor=anchor) for text, x, anchor in places]
    return tag("svg", *labels, aria_hidden="true")


def share_bar(value: float, low: float, high: float, color: str) -> Markup:
    """Return a bar from zero to a value, within a range; the value stands beside it as text.

    Args:
        value: The value.
        low: Least value of the range, at most 0.
        high: Greatest value of the range, above ``low``.
        color: Name of the bar's color.
    """
    if not all(math.isfinite(number) for number in (value, low, high)) or high <= low:
        return tag("svg", aria_hidden="true")
    start, end = sorted((place - low) / (high - low) for place in (0.0, value))
    return tag(
        "svg",
        tag(
            "rect",
            x=f"{100 * start:.1f}%",
            width=f"{max(0.4, 100 * (end - start)):.1f}%",
            height="10",
            y="2",
            rx="2",
            fill=_color(color),
        ),
        aria_hidden="true",
    )


def line_chart(
    lines: Sequence[tuple[str, Sequence[float]]],
    *,
    across: str,
    first: int,
    label: str,
    percent: bool = False,
) -> Markup:
    """Return lines over whole numbers.

    Args:
        lines: The name of each line and its values; those that are not finite are left out.
        across: What the numbers are.
        first: The first number.
        label: What is shown, in words.
        percent: Whether values are shares, shown from 0% to 100% at least.
    """
    values = [value for _, line in lines for value in line if math.isfinite(value)]
    high = max([*values, 1.0 if percent else 1e-9])
    low = min([*values, 0.0])
    length = max(len(line) for _, line in lines)

    def place(index: int, value: float) -> str:
        across = index / max(1, length - 1)
        up = (value - low) / (high - low)
        x = _LEFT + across * (_WIDTH - _LEFT - _RIGHT)
        y = _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)
        return f"{x:.1f},{y:.1f}"

    drawn = [_grid(low, high, percent), _numbers(first, length, across)]
    for number, (_, line) in enumerate(lines):
        points = [place(i, value) for i, value in enumerate(line) if math.isfinite(value)]
        drawn.append(
            tag(
                "polyline",
                points=" ".join(points),
                fill="none",
                stroke_linejoin="round",
                **_stroke(number),
            )
        )
    chart = tag(
        "svg",
        tag("title", label),
        *drawn,
        viewBox=f"0 0 {_WIDTH:g} {_HEIGHT:g}",
        role="img",
        aria_label=label,
    )
    return join(chart, _legend([name for name, _ in lines]) if len(lines) > 1 else None)


def _stroke(number: int) -> dict[str, str | None]:
    """Color and dashes of a line, which no other of the first sixteen has."""
    color, dashes = (number + number // len(_SERIES)) % len(_SERIES), number % len(_DASHES)
    return {
        "stroke": _color(_SERIES[color]),
        "stroke_width": "2",
        "stroke_dasharray": _DASHES[dashes],
    }


def _grid(low: float, high: float, percent: bool) -> Markup:
    parts = []
    for share in (0.0, 0.5, 1.0):
        y = _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)
        value = low + share * (high - low)
        text = f"{value:.0%}" if percent else f"{value:.2g}"
        parts += [
            tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, stroke=_color("line")),
            tag("text", text, x=_LEFT - 5, y=y + 4, text_anchor="end"),
        ]
    return join(*parts)


def _numbers(first: int, length: int, across: str) -> Markup:
    y = _HEIGHT - _BOTTOM + 14
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    return join(
        tag("text", str(first), x=_LEFT, y=y, text_anchor="middle"),
        tag("text", str(first + length - 1), x=_WIDTH - _RIGHT, y=y, text_anchor="middle")
        if length > 1
        else None,
        tag("text", across, x=middle, y=y + 14, text_anchor="middle"),
    )


def _legend(names: Sequence[str]) -> Markup:
    parts = []
    for number, name in enumerate(names):
        line = tag(
            "line",
            x1="0",
            x2="28",
            y1="5",
            y2="5",
            **_stroke(number),
        )
        sample = tag("svg", line, width="28", height="10", style="width:28px;display:inline")
        parts.append(tag("span", sample, " ", name))
    return tag("p", *parts, class_="legend muted small")

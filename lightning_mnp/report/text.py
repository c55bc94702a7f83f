"""A report as text: three lines, a table of the signals, and what else was found."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from lightning_mnp.checkpoints.printable import printable
from lightning_mnp.report.words import Words

if TYPE_CHECKING:  # only for annotations: a report is told by this text
    from lightning_mnp.report.report import DefenseReport

__all__ = ["text", "wants_color"]

_COLORS = {"clean": "32", "backdoored": "31", "undecided": "33"}  # green, red, yellow
_MOST_LETTERS = 10_000  # of a line: a reason may list many classes
_HEAD = ("signal", "points to class", "measured", "counts from", "strength", "")


def text(
    report: DefenseReport, *, class_names: Sequence[str] | None = None, color: bool = False
) -> str:
    """Return the verdict, how sure it is and why, what to do next, and a table of the signals.

    Args:
        report: The outcome.
        class_names: Names of the classes, in their order; those of the report if None.
        color: Whether the verdict is colored, by ANSI sequences that terminals understand.

    Returns:
        Lines without control characters, but for the color.

    Example:
        >>> from lightning_mnp.report import DefenseReport
        >>> print(text(DefenseReport("clean", score=0.25)))
        CLEAN. No backdoor was found in this network.
        Score 0.25, far below 1 (the threshold).
        Next: Nothing has to be done. An audit cannot find every backdoor: take weights from sources
        that you trust all the same.
    """
    words = Words(report, class_names)
    verdict = report.verdict.upper()
    lines = [f"{verdict}. {words.verdict}", words.certainty, f"Next: {words.next_step}"]
    if report.signals:
        lines += ["", *_table(words), ""]
    lines += words.facts()
    lines += [f"Note: {note}" for note in words.notes()]
    told = "\n".join(printable(line, _MOST_LETTERS) for line in lines)
    if not color:
        return told
    return f"\x1b[1;{_COLORS[report.verdict]}m{verdict}\x1b[0m{told.removeprefix(verdict)}"


def _table(words: Words) -> list[str]:
    """Return one line for each signal, those first that the verdict believes most."""
    rows = [_HEAD]
    for signal in words.report.signals:
        value, threshold = words.measured(signal)
        target = words.name(signal.target_class)
        strength = f"{signal.strength:.2f}"
        rows.append((signal.name, target, value, threshold, strength, words.standing(signal)))
    shown = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in shown) for column in range(len(_HEAD))]
    lines = []
    for row in shown:
        cells = [
            cell.rjust(width) if 2 <= column <= 4 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def wants_color(stream: TextIO) -> bool:
    """Return whether what is written to a stream may be colored.

    Only a terminal is, unless ``NO_COLOR`` is set (https://no-color.org) or ``TERM`` is ``dumb``.

    Args:
        stream: Such as ``sys.stdout``.
    """
    refused = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    return stream.isatty() and not refused

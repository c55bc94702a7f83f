"""A report as Markdown, short enough for a comment on a pull request."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lightning_mnp.checkpoints.printable import printable
from lightning_mnp.report import DefenseReport
from lightning_mnp.report.words import Words

__all__ = ["escape", "markdown"]

_MARKS = {"clean": "✅", "backdoored": "❌", "undecided": "⚠️"}
_ACTIVE = re.compile(r"[\\`*_{}\[\]<>&|~^$#@!]")
_ADDRESS = re.compile(r"(?i)://|www\.")
_MOST_LETTERS = 1000
_JOINER = "\u2060"  # shows nothing, and parts what would call up a person or a link


def escape(foreign: str) -> str:
    """Return text as Markdown that shows as it is: no markup, no links, no calls of people.

    Args:
        foreign: The text.

    Example:
        >>> escape("*a*|b")
        '&#42;a&#42;&#124;b'
    """

    def inert(found: re.Match[str]) -> str:
        letter = found[0]
        return f"&#{ord(letter)};{_JOINER if letter in '@#' else ''}"

    text = _ACTIVE.sub(inert, printable(foreign, _MOST_LETTERS))
    return _ADDRESS.sub(lambda found: found[0][:-1] + _JOINER + found[0][-1], text)


def markdown(report: DefenseReport, *, class_names: Sequence[str] | None = None) -> str:
    """Return the verdict, how sure it is and why, what to do next, and a table of the signals.

    Args:
        report: The outcome.
        class_names: Names of the classes, in their order; those of the report if None.

    Returns:
        GitHub's Markdown. Names of classes and layers show as text, whatever they hold.

    Example:
        >>> print(markdown(DefenseReport("clean", score=0.25)).splitlines()[0])
        ### ✅ CLEAN: No backdoor was found in this network.
    """
    words = Words(report, class_names)
    lines = [
        f"### {_MARKS[report.verdict]} {report.verdict.upper()}: {escape(words.verdict)}",
        "",
        escape(words.certainty),
        "",
        f"**Next:** {words.next_step}",
        "",
    ]
    if report.signals:
        lines += [
            "| signal | points to class | measured | counts from | strength | |",
            "| --- | --- | ---: | ---: | ---: | --- |",
        ]
    for signal in report.signals:
        value, threshold = words.measured(signal)
        target, name = escape(words.name(signal.target_class)), escape(signal.name)
        standing = words.standing(signal)
        standing = f"**{standing}**" if standing == "counts" else standing
        lines.append(
            f"| {name} | {target} | {value} | {threshold} | {signal.strength:.2f} | {standing} |"
        )
    facts = [*words.facts(), *(f"Note: {note}" for note in words.notes())]
    lines += ["", *(f"- {escape(fact)}" for fact in facts)]
    lines += ["", f"<sub>{_origin(report)}</sub>"]
    return "\n".join(lines) + "\n"


def _origin(report: DefenseReport) -> str:
    """Say what was audited, by which version, and when."""
    file = report.weights_file
    parts = [
        "" if file is None else escape(file.name),
        f"weights {escape(report.weights_sha256[:16])}" if report.weights_sha256 else "",
        f"lightning-mnp {escape(report.versions.get('lightning-mnp', 'of unknown version'))}",
        escape(report.date),
    ]
    return " · ".join(part for part in parts if part)

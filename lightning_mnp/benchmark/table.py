"""A table of text, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Table", "head"]

_HEADS = {"none": "Backdoored", "i-bau": "I-BAU", "default": "default", "ft": "fine-tuning"}


@dataclass
class Table:
    """A table of text.

    Attributes:
        name: For file names.
        title: What it shows.
        header: Heads of the columns.
        rows: The cells, row by row.
        notes: Sentences below it.
    """

    name: str
    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """Return it as Markdown, with a heading.

        Example:
            >>> print(Table("x", "A title", ["a", "b"], [["1", "2"]]).markdown())
            ## A title
            <BLANKLINE>
            | a | b |
            | --- | --- |
            | 1 | 2 |
        """
        lines = [f"## {self.title}", "", _line(self.header), _line(["---"] * len(self.header))]
        lines += map(_line, self.rows)
        if self.notes:
            lines += ["", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines)

    def csv(self) -> str:
        """Return it as CSV."""
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerows([self.header, *self.rows])
        return file.getvalue()


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(each.replace('|', chr(92) + '|') for each in cells)} |"


def head(name: str) -> str:
    """Return the head of a method's column.

    Args:
        name: Its name or label.

    Example:
        >>> head("anp"), head("default"), head("anp (amount=30)")
        ('ANP', 'default', 'anp (amount=30)')
    """
    return _HEADS.get(name, name.upper() if "(" not in name else name)

"""A table of text, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Table", "head", "markdown_line"]

_HEADS = {
    "none": "Backdoored",
    "i-bau": "I-BAU",
    "default": "default",
    "ft": "fine-tuning",
    "mnp-averaged": "MNP averaged",
}


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
        rows = [self.header, ["---"] * len(self.header), *self.rows]
        lines = [f"## {self.title}", "", *map(markdown_line, rows)]
        if self.notes:
            lines += ["", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines)

    def csv(self) -> str:
        """Return it as CSV."""
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerows([self.header, *self.rows])
        return file.getvalue()


def markdown_line(cells: Sequence[str]) -> str:
    """Return a row of a table as Markdown.

    Args:
        cells: The texts of its cells.

    Example:
        >>> markdown_line(["CA", "90.1"])
        '| CA | 90.1 |'
    """
    return f"| {' | '.join(each.replace('|', chr(92) + '|') for each in cells)} |"


def head(name: str) -> str:
    """Return the head of a method's column.

    Args:
        name: Its name or label. An amount to prune is told in words.

    Example:
        >>> head("anp"), head("default"), head("nad (beta=30)")
        ('ANP', 'default', 'NAD (beta=30)')
        >>> head("rnp (amount=0.00625, rule=share)"), head("clp (amount=8, rule=number)")
        ('RNP (0.625% of filters)', 'CLP (8 filters)')
    """
    method, bracket, options = name.partition(" (")
    told = options.removesuffix(")")
    if found := re.fullmatch(r"amount=([^,]+), rule=(share|number)", told):
        amount, rule = found.groups()
        told = f"{100 * float(amount):g}% of filters" if rule == "share" else f"{amount} filters"
    return _HEADS.get(method, method.upper()) + (f" ({told})" if bracket else "")

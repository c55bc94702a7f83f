"""Scores: what the demonstration shows of a network before and after the defense."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from lightning_mnp.report import DefenseReport

__all__ = ["Scores", "scores_table"]


@dataclass
class Scores:
    """Clean accuracy and attack success rate of one state of a network, from 0 to 1.

    Attributes:
        accuracy: Clean accuracy (CA).
        success: Attack success rate (ASR).
    """

    accuracy: float
    success: float


def scores_table(before: Scores, after: Scores, outcome: DefenseReport) -> Table:
    """Return a table of two states of a network.

    Args:
        before: As trained.
        after: Purified.
        outcome: What was done in between.

    Example:
        >>> scores = Scores(0.9, 1.0), Scores(0.88, 0.02)
        >>> scores_table(*scores, DefenseReport("backdoored")).row_count
        2
    """
    table = Table(title=f"verdict: {outcome.verdict}; filters pruned: {len(outcome.pruned)}")
    table.add_column("network")
    table.add_column("clean accuracy (CA)", justify="right")
    table.add_column("attack success rate (ASR)", justify="right")
    for name, scores in (("as trained", before), ("purified", after)):
        table.add_row(name, f"{scores.accuracy:.1%}", f"{scores.success:.1%}")
    return table

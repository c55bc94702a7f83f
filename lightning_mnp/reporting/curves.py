"""The curves of a report: accuracy in clean suppression, and what pruning does."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_mnp.report import DefenseReport

__all__ = ["harm_curve", "suppression_curves", "trace_curves"]


def suppression_curves(report: DefenseReport) -> dict[str, Sequence[float]]:
    """Return the accuracy over each pass of clean suppression, by run; the first pass is 1.

    Args:
        report: The outcome.
    """
    return {f"run {index}": run.curve for index, run in enumerate(report.runs, 1) if run.curve}


def trace_curves(report: DefenseReport) -> dict[str, Sequence[float]]:
    """Return how much of each trace is left, by its name, before pruning and after each step.

    Args:
        report: The outcome; only the rule ``auto`` has traces.
    """
    points = report.pruning.curve
    if len(points) < 2:
        return {}
    lines = [list(line) for line in zip(*(point[1:] for point in points), strict=False)]
    names = [*report.pruning.traces, *(f"trace {number}" for number in range(len(lines)))]
    return dict(zip(names, lines, strict=False))


def harm_curve(report: DefenseReport) -> Sequence[float]:
    """Return the harm to clean images in nats, before pruning and after each step.

    Args:
        report: The outcome; only the rule ``auto`` measures harm.
    """
    points = report.pruning.curve
    return [] if len(points) < 2 else [point[0] for point in points]

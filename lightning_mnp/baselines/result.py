"""The result of a baseline defense."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

__all__ = ["BaselineResult"]


@dataclass(frozen=True)
class BaselineResult:
    """The result of a baseline defense.

    Attributes:
        model: The defended copy of the network.
        pruned: Pairs (layer name, filter index) of the removed filters, the most suspicious first;
            empty if the defense does not prune.
        scores: The numbers that the removed filters were chosen by, in the same order.
        accuracy_before: Accuracy of the network on the defense set, in evaluation mode, from 0 to
            1.
        accuracy_after: Accuracy of the defended copy, measured in the same way.
        details: Further numbers about the run, by name.

    Example:
        >>> BaselineResult(nn.Linear(1, 2), [("conv", 3)], [0.1], 0.9, 0.88).pruned
        [('conv', 3)]
    """

    model: nn.Module = field(repr=False, compare=False)
    pruned: list[tuple[str, int]]
    scores: list[float]
    accuracy_before: float
    accuracy_after: float
    details: dict[str, float] = field(default_factory=dict)

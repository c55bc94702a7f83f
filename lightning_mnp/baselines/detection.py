"""The result of a baseline detector."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

__all__ = ["DetectionResult"]


@dataclass(frozen=True)
class DetectionResult:
    """The verdict of a baseline detector, and the numbers behind it.

    Attributes:
        score: How suspicious the network is; larger is more suspicious.
        threshold: The network is called backdoored if the score is above this number.
        target_class: The class that the backdoor leads to, or None if the network is called clean.
        values: What was measured for each class, by class.
        suspects: Positions of the images that are called poisoned, in the order in which they were
            read; empty if the detector does not look at suspect images.
        sample_scores: How suspicious each suspect image is, in the order in which they were read;
            larger is more suspicious, in a unit of the detector's own.
        details: Further numbers about the run, by name.

    Example:
        >>> result = DetectionResult(2.7, 2.0, target_class=3, values={0: 80.0, 3: 9.0})
        >>> result.verdict
        'backdoored'
    """

    score: float
    threshold: float
    target_class: int | None
    values: dict[int, float]
    suspects: list[int] = field(default_factory=list, repr=False)
    sample_scores: list[float] = field(default_factory=list, repr=False)
    details: dict[str, float] = field(default_factory=dict)

    @property
    def verdict(self) -> Literal["clean", "backdoored"]:
        """``"backdoored"`` if the score is above the threshold, ``"clean"`` otherwise."""
        return "backdoored" if self.score > self.threshold else "clean"

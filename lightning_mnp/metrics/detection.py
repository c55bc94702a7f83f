"""Metrics of backdoor detection: the detection ratio of one network, and rates over many."""

from __future__ import annotations

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from lightning_mnp.metrics.functional import (
    Verdicts,
    _check_layers,
    _check_pair,
    _detection_rate_update,
    _false_positive_update,
    detection_ratio,
)
from lightning_mnp.metrics.share import ShareMetric

__all__ = ["DetectionRate", "DetectionRatio", "FalsePositiveRate"]


class DetectionRatio(Metric):
    """How much of the magnitude-saliency correlation survives clean suppression, Eq. 8.

    See :func:`~lightning_mnp.metrics.functional.detection_ratio`. Filters can be added in parts,
    such as layer by layer. With the numbers of their layers, the correlation is that within layers;
    without them, that of all filters together.

    Example:
        >>> import torch
        >>> metric = DetectionRatio()
        >>> ranks = torch.tensor([1.0, 2.0, 3.0])
        >>> metric.update(ranks, ranks, ranks, torch.tensor([2.0, 9.0, 5.0]))
        >>> metric.compute()
        tensor(0.5000)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    magnitude: list[Tensor]
    saliency: list[Tensor]
    suppressed_magnitude: list[Tensor]
    suppressed_saliency: list[Tensor]
    layers: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("magnitude", "saliency", "suppressed_magnitude", "suppressed_saliency"):
            self.add_state(name, [], dist_reduce_fx="cat")
        self.add_state("layers", [], dist_reduce_fx="cat")

    def update(
        self,
        magnitude: Tensor,
        saliency: Tensor,
        suppressed_magnitude: Tensor,
        suppressed_saliency: Tensor,
        layers: Tensor | None = None,
    ) -> None:
        """Add filters.

        Args:
            magnitude: Magnitudes in the network, shape (filters,), finite.
            saliency: Saliencies in the network, shape (filters,), finite.
            suppressed_magnitude: Magnitudes in the suppressed network, shape (filters,), finite.
            suppressed_saliency: Saliencies in the suppressed network, shape (filters,), finite.
            layers: The number of each filter's layer, shape (filters,), integers; in all calls or
                in none.

        Raises:
            ValueError: If shapes differ, a value is not finite, layers are not integers, or some
                calls have them and others do not.
        """
        _check_pair(magnitude, saliency, "magnitude", "saliency")
        _check_pair(magnitude, suppressed_magnitude, "magnitude", "suppressed_magnitude")
        _check_pair(magnitude, suppressed_saliency, "magnitude", "suppressed_saliency")
        if self.magnitude and (layers is None) == bool(self.layers):
            raise ValueError(
                "Expected argument `layers` to be given in all calls of `update` or in none, but "
                f"got {'none' if layers is None else 'some'} after calls "
                f"{'with' if self.layers else 'without'} them. Call `reset` to begin again."
            )
        if layers is not None:
            _check_layers(layers, magnitude)
            self.layers.append(layers)
        self.magnitude.append(magnitude.detach())
        self.saliency.append(saliency.detach())
        self.suppressed_magnitude.append(suppressed_magnitude.detach())
        self.suppressed_saliency.append(suppressed_saliency.detach())

    def compute(self) -> Tensor:
        """Return the ratio; NaN, with a warning, if it is not defined."""
        return detection_ratio(
            dim_zero_cat(self.magnitude),
            dim_zero_cat(self.saliency),
            dim_zero_cat(self.suppressed_magnitude),
            dim_zero_cat(self.suppressed_saliency),
            dim_zero_cat(self.layers) if len(self.layers) else None,
        )


class DetectionRate(ShareMetric):
    """Share of networks that are judged correctly, DR; an undecided verdict counts as wrong.

    See :func:`~lightning_mnp.metrics.functional.detection_rate`.

    Example:
        >>> metric = DetectionRate()
        >>> metric.update(["backdoored", "clean", "undecided"], ["backdoored", "clean", "clean"])
        >>> metric.compute()
        tensor(0.6667)
    """

    noun = "network"
    higher_is_better = True

    def update(self, verdicts: Verdicts, truths: Verdicts) -> None:
        """Add networks.

        Args:
            verdicts: One for each network: True if it is judged backdoored, or ``"clean"``,
                ``"backdoored"``, ``"undecided"``.
            truths: True if the network is backdoored, or ``"clean"``, ``"backdoored"``.

        Raises:
            ValueError: If lengths differ or a value is none of these.
        """
        self.add(*_detection_rate_update(verdicts, truths))


class FalsePositiveRate(ShareMetric):
    """Share of clean networks that are judged backdoored.

    See :func:`~lightning_mnp.metrics.functional.false_positive_rate`.

    Example:
        >>> metric = FalsePositiveRate()
        >>> metric.update([True, False, True], [False, False, True])
        >>> metric.compute()
        tensor(0.5000)
    """

    noun = "clean network"
    higher_is_better = False

    def update(self, verdicts: Verdicts, truths: Verdicts) -> None:
        """Add networks.

        Args:
            verdicts: As for :class:`DetectionRate`. An undecided one is no false alarm.
            truths: As for :class:`DetectionRate`. Backdoored networks do not count.

        Raises:
            ValueError: If lengths differ or a value is none of these.
        """
        self.add(*_false_positive_update(verdicts, truths))

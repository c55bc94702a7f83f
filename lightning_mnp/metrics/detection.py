"""Metrics of backdoor detection: the ratio of one network, the rates over many."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from lightning_mnp.metrics.functional import (
    Verdicts,
    _check_pair,
    _detection_rate_update,
    _false_positive_update,
    _share,
    detection_ratio,
)

__all__ = ["DetectionRate", "DetectionRatio", "FalsePositiveRate"]


class DetectionRatio(Metric):
    """How much of the magnitude-saliency correlation survives clean suppression, Eq. 8.

    See :func:`~lightning_mnp.metrics.functional.detection_ratio`. Filters may come in parts, such
    as layer by layer: the correlation is that of all filters together.

    Example:
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

    def __init__(self) -> None:
        super().__init__()
        for name in ("magnitude", "saliency", "suppressed_magnitude", "suppressed_saliency"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(
        self,
        magnitude: Tensor,
        saliency: Tensor,
        suppressed_magnitude: Tensor,
        suppressed_saliency: Tensor,
    ) -> None:
        """Add filters.

        Args:
            magnitude: Magnitudes in the network, shape (filters,), finite.
            saliency: Saliencies in the network, shape (filters,), finite.
            suppressed_magnitude: Magnitudes in the suppressed network, shape (filters,), finite.
            suppressed_saliency: Saliencies in the suppressed network, shape (filters,), finite.

        Raises:
            ValueError: If shapes differ or a value is not finite.
        """
        _check_pair(magnitude, saliency, "magnitude", "saliency")
        _check_pair(magnitude, suppressed_magnitude, "magnitude", "suppressed_magnitude")
        _check_pair(magnitude, suppressed_saliency, "magnitude", "suppressed_saliency")
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
        )


class DetectionRate(Metric):
    """Share of networks that are judged right, DR; an undecided verdict counts as wrong.

    See :func:`~lightning_mnp.metrics.functional.detection_rate`.

    Example:
        >>> metric = DetectionRate()
        >>> metric.update(["backdoored", "clean", "undecided"], ["backdoored", "clean", "clean"])
        >>> metric.compute()
        tensor(0.6667)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    hits: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("hits", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, verdicts: Verdicts, truths: Verdicts) -> None:
        """Add networks.

        Args:
            verdicts: One for each network: True where it is judged backdoored, or ``"clean"``,
                ``"backdoored"``, ``"undecided"``.
            truths: True where the network is backdoored, or ``"clean"``, ``"backdoored"``.

        Raises:
            ValueError: If lengths differ or a value is none of these.
        """
        hits, total = _detection_rate_update(verdicts, truths)
        self.hits = self.hits + hits.to(self.hits.device)
        self.total = self.total + total.to(self.total.device)

    def compute(self) -> Tensor:
        """Return the share, from 0 to 1; NaN, with a warning, if there is no network."""
        return _share(self.hits, self.total, "network")


class FalsePositiveRate(Metric):
    """Share of clean networks that are judged backdoored.

    See :func:`~lightning_mnp.metrics.functional.false_positive_rate`.

    Example:
        >>> metric = FalsePositiveRate()
        >>> metric.update([True, False, True], [False, False, True])
        >>> metric.compute()
        tensor(0.5000)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    # Not named as in DetectionRate, with which a MetricCollection would let it share its states.
    false_alarms: Tensor
    clean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("false_alarms", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("clean", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, verdicts: Verdicts, truths: Verdicts) -> None:
        """Add networks.

        Args:
            verdicts: As for :class:`DetectionRate`; an undecided one is no false alarm.
            truths: As for :class:`DetectionRate`; backdoored networks do not count.

        Raises:
            ValueError: If lengths differ or a value is none of these.
        """
        hits, total = _false_positive_update(verdicts, truths)
        self.false_alarms = self.false_alarms + hits.to(self.false_alarms.device)
        self.clean = self.clean + total.to(self.clean.device)

    def compute(self) -> Tensor:
        """Return the share, from 0 to 1; NaN, with a warning, if there is no clean network."""
        return _share(self.false_alarms, self.clean, "clean network")

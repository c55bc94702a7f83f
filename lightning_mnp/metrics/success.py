"""Metrics of a classifier under attack: attack success rate and clean accuracy."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_mnp.metrics.functional import (
    _attack_success_update,
    _clean_accuracy_update,
    _share,
)

__all__ = ["AttackSuccessRate", "CleanAccuracy"]


class AttackSuccessRate(Metric):
    """Share of triggered images that get the attacker's label, ASR.

    See :func:`~lightning_mnp.metrics.functional.attack_success_rate`.

    Example:
        >>> metric = AttackSuccessRate()
        >>> metric.update(torch.tensor([0, 0, 2]), torch.tensor([0, 0, 0]), torch.tensor([1, 2, 2]))
        >>> metric.compute()
        tensor(0.6667)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    # Names of states differ between metrics: a MetricCollection lets metrics share their states
    # if names and first values are the same.
    successes: Tensor
    triggered: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("successes", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("triggered", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, targets: Tensor, labels: Tensor) -> None:
        """Add a batch of triggered images.

        Args:
            preds: Logits, shape (N, K), or classes, shape (N,).
            targets: The attacker's labels, shape (N,).
            labels: The true labels, shape (N,); images with the attacker's label do not count.

        Raises:
            ValueError: If shapes or dtypes are others.
        """
        hits, total = _attack_success_update(preds, targets, labels)
        self.successes = self.successes + hits
        self.triggered = self.triggered + total

    def compute(self) -> Tensor:
        """Return the share, from 0 to 1; NaN, with a warning, if no image counts."""
        return _share(self.successes, self.triggered, "triggered image")


class CleanAccuracy(Metric):
    """Share of clean images that get their true label, CA.

    See :func:`~lightning_mnp.metrics.functional.clean_accuracy`.

    Example:
        >>> metric = CleanAccuracy()
        >>> metric.update(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 2, 0]))
        >>> metric.compute()
        tensor(0.7500)
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

    def update(self, preds: Tensor, labels: Tensor) -> None:
        """Add a batch of clean images.

        Args:
            preds: Logits, shape (N, K), or classes, shape (N,).
            labels: The true labels, shape (N,).

        Raises:
            ValueError: If shapes or dtypes are others.
        """
        hits, total = _clean_accuracy_update(preds, labels)
        self.hits = self.hits + hits
        self.total = self.total + total

    def compute(self) -> Tensor:
        """Return the share, from 0 to 1; NaN, with a warning, if there is no image."""
        return _share(self.hits, self.total, "image")

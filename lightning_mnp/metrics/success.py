"""Metrics of a classifier under attack: attack success rate and clean accuracy."""

from __future__ import annotations

from torch import Tensor

from lightning_mnp.metrics.functional import _attack_success_update, _clean_accuracy_update
from lightning_mnp.metrics.share import ShareMetric

__all__ = ["AttackSuccessRate", "CleanAccuracy"]


class AttackSuccessRate(ShareMetric):
    """Share of triggered images that get the attacker's label, ASR.

    See :func:`~lightning_mnp.metrics.functional.attack_success_rate`.

    Example:
        >>> import torch
        >>> metric = AttackSuccessRate()
        >>> metric.update(torch.tensor([0, 0, 2]), torch.tensor([0, 0, 0]), torch.tensor([1, 2, 2]))
        >>> metric.compute()
        tensor(0.6667)
    """

    noun = "triggered image"
    higher_is_better = False

    def update(self, preds: Tensor, targets: Tensor, labels: Tensor) -> None:
        """Add a batch of triggered images.

        Args:
            preds: Logits, shape (N, K), or classes, shape (N,).
            targets: The attacker's labels, shape (N,).
            labels: The true labels, shape (N,). Images whose true label is the attacker's do not
                count.

        Raises:
            ValueError: If shapes or dtypes are others.
        """
        self.add(*_attack_success_update(preds, targets, labels))


class CleanAccuracy(ShareMetric):
    """Share of clean images that get their true label, CA.

    See :func:`~lightning_mnp.metrics.functional.clean_accuracy`.

    Example:
        >>> import torch
        >>> metric = CleanAccuracy()
        >>> metric.update(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 2, 0]))
        >>> metric.compute()
        tensor(0.7500)
    """

    noun = "image"
    higher_is_better = True

    def update(self, preds: Tensor, labels: Tensor) -> None:
        """Add a batch of clean images.

        Args:
            preds: Logits, shape (N, K), or classes, shape (N,).
            labels: The true labels, shape (N,).

        Raises:
            ValueError: If shapes or dtypes are others.
        """
        self.add(*_clean_accuracy_update(preds, labels))

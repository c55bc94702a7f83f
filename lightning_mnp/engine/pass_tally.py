"""Sums of one pass over the defense set: saliency, logits and what follows from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_mnp.config import Saliency
from lightning_mnp.mnp.detection_ratio import saliency_correlation
from lightning_mnp.mnp.saliency import filter_magnitudes
from lightning_mnp.surgery.masked_network import MaskedNetwork, Weights

__all__ = ["PassTally"]


class PassTally:
    """Sums over the batches of one pass, from which saliency and accuracy follow.

    Args:
        masked: The network.
        classes: Number of classes.
        form: The saliency, see :func:`~lightning_mnp.mnp.saliency.batch_clc`.

    Attributes:
        logits: Of the images so far, shape (N, classes), on the CPU.
        labels: Their classes, shape (N,).

    Example:
        >>> from torch import nn
        >>> from lightning_mnp.surgery.layers import find_filter_layers
        >>> network = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Flatten(), nn.Linear(3, 2))
        >>> masked = MaskedNetwork(network, find_filter_layers(network, torch.rand(2, 1, 2, 2)))
        >>> tally = PassTally(masked, classes=2)
        >>> tally.add(torch.zeros(3), torch.tensor([[0.0, 1.0]]), torch.tensor([1]))
        >>> tally.accuracy, tally.predictions.tolist()
        (1.0, [0, 1])
    """

    def __init__(self, masked: MaskedNetwork, classes: int, form: Saliency = "map") -> None:
        self.masked = masked
        self.classes = classes
        self.form = form
        self.reset()

    def reset(self) -> None:
        """Begin another pass."""
        self._changes = torch.zeros(self.masked.layers.total, device=self.masked.device)
        self.logits = torch.empty(0, self.classes)
        self.labels = torch.empty(0, dtype=torch.long)

    def add(
        self, changes: Tensor, logits: Tensor, labels: Tensor, after: int | None = None
    ) -> None:
        """Add a batch, once: a step that was interrupted and is taken again adds nothing twice.

        Args:
            changes: First-order loss changes of the batch, shape (total filters,).
            logits: Shape (N, classes).
            labels: Shape (N,).
            after: Number of images before this batch. If there are more, the batch is known. None
                if no step can be interrupted.
        """
        if after is not None and self.images > after:
            return
        # In one statement, so that an interrupt leaves all three as they are.
        self._changes, self.logits, self.labels = (
            self._changes + changes * len(labels),
            torch.cat([self.logits, logits.detach().cpu()]),
            torch.cat([self.labels, labels.cpu()]),
        )

    @property
    def images(self) -> int:
        """Number of images so far."""
        return len(self.labels)

    @property
    def predictions(self) -> Tensor:
        """Images put into each class so far, shape (classes,)."""
        return self.logits.argmax(1).bincount(minlength=self.classes)

    @property
    def hits(self) -> int:
        """Number of correctly classified images so far."""
        return int((self.logits.argmax(1) == self.labels).sum())

    @property
    def accuracy(self) -> float:
        """Share of correctly classified images."""
        return self.hits / self.images

    def correlation(self, weights: Weights) -> float:
        """Rank correlation of the magnitude of weights with the saliency that was added up."""
        magnitudes = filter_magnitudes(self.masked, weights)
        changes = self._changes / self.images
        return saliency_correlation(magnitudes, changes, self.masked.layers, self.form)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and primitives."""
        return {
            "changes": self._changes,
            "logits": self.logits,
            "labels": self.labels,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self._changes = state["changes"].to(self.masked.device)
        self.logits = state["logits"].cpu()
        self.labels = state["labels"].cpu()

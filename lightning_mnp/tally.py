"""What one pass over the defense set adds up: saliency, predictions and hits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_mnp.saliency import filter_magnitudes, saliency_correlation
from lightning_mnp.subject import Subject, Weights

__all__ = ["PassTally"]


class PassTally:
    """Sums over the batches of one pass, from which saliency and accuracy follow.

    Args:
        subject: The network.
        classes: Number of classes.

    Attributes:
        images: Images so far.
        hits: Correctly classified images so far.
        predictions: Images put into each class so far, shape (classes,).

    Example:
        >>> from torch import nn
        >>> from lightning_mnp.layers import find_filter_layers
        >>> network = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Flatten(), nn.Linear(3, 2))
        >>> subject = Subject(network, find_filter_layers(network, torch.rand(2, 1, 2, 2)))
        >>> tally = PassTally(subject, classes=2)
        >>> tally.add(torch.zeros(3), torch.tensor([[0.0, 1.0]]), torch.tensor([1]))
        >>> tally.accuracy, tally.predictions.tolist()
        (1.0, [0, 1])
    """

    def __init__(self, subject: Subject, classes: int) -> None:
        self.subject = subject
        self.classes = classes
        self.reset()

    def reset(self) -> None:
        """Begin another pass."""
        self._changes = torch.zeros(self.subject.layers.total, device=self.subject.device)
        self.predictions = torch.zeros(self.classes, dtype=torch.long)
        self.hits = 0
        self.images = 0

    def add(self, changes: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            changes: First-order loss changes of the batch, shape (total filters,).
            logits: Shape (N, classes).
            labels: Shape (N,).
        """
        classes = logits.argmax(1)
        self._changes += changes * len(labels)
        self.predictions += classes.cpu().bincount(minlength=self.classes)
        self.hits += int((classes == labels).sum())
        self.images += len(labels)

    @property
    def accuracy(self) -> float:
        """Share of correctly classified images."""
        return self.hits / self.images

    def correlation(self, weights: Weights) -> float:
        """Rank correlation of the magnitude of weights with the saliency that was added up."""
        magnitudes = filter_magnitudes(self.subject, weights)
        return saliency_correlation(magnitudes, self._changes / self.images, self.subject.layers)

    def state_dict(self) -> dict[str, Any]:
        """Give the state as tensors and primitives."""
        return {
            "changes": self._changes,
            "predictions": self.predictions,
            "hits": self.hits,
            "images": self.images,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self._changes = state["changes"].to(self.subject.device)
        self.predictions = state["predictions"].cpu()
        self.hits = int(state["hits"])
        self.images = int(state["images"])

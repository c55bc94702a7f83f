"""Suspect images: some of them may be poisoned, and their order counts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_mnp.defense_data.defense_set import DefenseSet

__all__ = ["Suspects"]


class Suspects(DefenseSet):
    """Labeled images of which some may be poisoned, in the order in which they were read.

    Detectors of poisoned images name images by their positions. So repeated images stay, and the
    order is that of the loader, which is read once. A loader that shuffles is allowed, but then
    nobody knows which image is at which position.

    Args:
        images: Shape (N, C, ...), floating point, as the network takes them.
        labels: Their labels, shape (N,), integers; two classes or more.
        class_names: Names of the classes, in their order; empty if they are not known.

    Raises:
        ValueError: If the images or labels cannot serve.

    Example:
        >>> import torch
        >>> images = torch.ones(3, 1, 2, 2)
        >>> Suspects.from_loader([(images, torch.tensor([1, 0, 0]))]).labels
        tensor([1, 0, 0])
    """

    def __init__(self, images: Tensor, labels: Tensor, class_names: Sequence[str] = ()) -> None:
        super().__init__(images, labels, class_names)
        self.images, self.labels = images.detach().cpu(), labels.detach().cpu().long()

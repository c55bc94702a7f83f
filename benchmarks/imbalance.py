"""CIFAR-10 with too few training images of one class: the other reason for a rare class."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from lightning_mnp.data import CIFAR10DataModule
from lightning_mnp.data.dataset import ImageDataset, MemoryDataset


class ImbalancedCIFAR10(CIFAR10DataModule):
    """CIFAR-10 for training with a share of one class's images; all else is as in CIFAR-10.

    Args:
        rare_class: The class.
        rare_share: The share of its training images that is used, above 0 and at most 1.
        options: Arguments of :class:`~lightning_mnp.data.CIFAR10DataModule`.
    """

    def __init__(self, rare_class: int = 0, rare_share: float = 0.25, **options: Any) -> None:
        super().__init__(**options)
        if not 0 < rare_share <= 1:
            raise ValueError(
                f"Expected argument `rare_share` to be above 0 and at most 1, but got {rare_share}."
            )
        self.rare_class = rare_class
        self.rare_share = rare_share

    @cached_property
    def clean_train_set(self) -> ImageDataset:
        """All images of the other classes and the first ones of this."""
        images = super().clean_train_set.to_memory()
        rare = (images.labels == self.rare_class).nonzero().flatten()
        kept = torch.ones(len(images), dtype=torch.bool)
        kept[rare[round(self.rare_share * len(rare)) :]] = False
        return MemoryDataset(images.images[kept], images.labels[kept])

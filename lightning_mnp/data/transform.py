"""From stored images to a batch that a network takes: augmented and normalized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate, get_worker_info

from lightning_mnp.defense_data.augment import random_crop_flip, usual_padding
from lightning_mnp.defense_data.defense_set import seeded_generator

__all__ = ["BatchTransform"]


class BatchTransform:
    """Turn stored images into a batch: augment, scale to [0, 1] and normalize.

    It works on whole batches, as part of the data loader. So every loader yields what a network
    takes, with or without a Trainer. As a loader's ``collate_fn``, it is called with samples. A
    :class:`~lightning_mnp.data.loader.BatchLoader` calls :meth:`images` with a tensor instead.

    Args:
        mean: Mean of each channel, on the scale [0, 1].
        std: Standard deviation of each channel, on the scale [0, 1].
        augment: Whether to shift and mirror images at random.
        flip: Whether mirroring is part of the augmentation.
        generator: Source of random numbers for samples in the main process. A worker process uses
            its global generator, which the data loader seeds.
        rank: Number of this training process, so that each process augments in its own way; None
            if there is one process.
        seed: Seed of :meth:`generator_of`.

    Example:
        >>> transform = BatchTransform(mean=[0.5], std=[0.5])
        >>> white = torch.full((2, 1, 4, 4), 255, dtype=torch.uint8)
        >>> transform.images(white).unique()
        tensor([1.])
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        augment: bool = False,
        flip: bool = True,
        generator: torch.Generator | None = None,
        rank: int | None = None,
        seed: int = 0,
    ) -> None:
        self.scale = (255.0 * torch.tensor(std)).reshape(1, -1, 1, 1)
        self.offset = (torch.tensor(mean) / torch.tensor(std)).reshape(1, -1, 1, 1)
        self.augment = augment
        self.flip = flip
        self.generator = generator
        self.rank = rank
        self.seed = seed

    def __call__(self, samples: Sequence[tuple[Any, ...]]) -> tuple[Tensor, ...]:
        """Collate samples into a batch.

        Args:
            samples: Tuples of a stored image, uint8 of shape (C, H, W), and its labels.

        Returns:
            float32 images of shape (N, C, H, W), then one tensor of shape (N,) for each label.
        """
        images, *labels = default_collate(list(samples))
        return (self.images(images, self._next_generator()), *labels)

    def images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Augment and normalize a batch of stored images, on their device.

        Args:
            images: uint8, shape (N, C, H, W).
            generator: Source of random numbers, on the CPU; the global one if None.

        Returns:
            float32 images of the same shape on the same device.
        """
        if self.scale.device != images.device:
            self.scale, self.offset = self.scale.to(images.device), self.offset.to(images.device)
        if self.augment:
            images = random_crop_flip(images, usual_padding(images), self.flip, generator)
        return images.float().div_(self.scale).sub_(self.offset)

    def generator_of(self, epoch: int, place: int) -> torch.Generator:
        """Return the source of random numbers of one training batch.

        Args:
            epoch: Number of the epoch, from 0.
            place: Number of the batch in the epoch, from 0.

        Returns:
            A generator that depends on the seed, the epoch, the batch and the process alone.
        """
        return seeded_generator(self.seed, "augmentation", epoch, place, self.rank or 0)

    def _next_generator(self) -> torch.Generator | None:
        generator = self.generator if get_worker_info() is None else None
        if not self.augment or self.rank is None:
            return generator
        # One draw for each batch, so that the generators of all processes stay alike: a
        # checkpoint has one state for all of them.
        drawn = int(torch.randint(2**48, (), generator=generator))
        return torch.Generator().manual_seed(drawn + self.rank)

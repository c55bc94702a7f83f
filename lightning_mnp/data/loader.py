"""A data loader that cuts whole batches out of one tensor, on the device that trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from lightning_mnp.data.dataset import ImageDataset
from lightning_mnp.data.transform import BatchTransform
from lightning_mnp.defense_data.defense_set import seeded_generator

__all__ = ["BatchDataset", "BatchLoader", "EpochSampler"]


class BatchDataset(ImageDataset):
    """Images and their labels as tensors on one device, indexed a batch at a time.

    Args:
        images: Any images; they are read once. Images that lie in one tensor on the same device
            are not copied.
        device: Where the tensors are kept.

    Example:
        >>> from lightning_mnp.data import MemoryDataset
        >>> stored = MemoryDataset(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), torch.arange(5))
        >>> images, labels = BatchDataset(stored, torch.device("cpu")).batch([3, 1])
        >>> images.shape, labels
        (torch.Size([2, 3, 8, 8]), tensor([3, 1]))
    """

    def __init__(self, images: ImageDataset, device: torch.device) -> None:
        super().__init__(images.labels)
        self.images = images.to_memory().images.to(device)
        self.columns = tuple(column.to(device) for column in images.label_columns())

    def fetch(self, indices: Sequence[int]) -> Tensor:
        """Return new images of these indices, shape (n, C, H, W), uint8."""
        return self.batch(indices)[0]

    def label_columns(self) -> tuple[Tensor, ...]:
        """Return the labels that stand beside each image, each of shape (N,)."""
        return self.columns

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        """Return the images of these indices and their labels.

        Args:
            indices: From 0 to N - 1.

        Returns:
            uint8 images, shape (n, C, H, W), then labels, each of shape (n,).
        """
        places = torch.as_tensor(indices, dtype=torch.long).to(self.images.device)
        return (self.images[places], *(column[places] for column in self.columns))


class EpochSampler(RandomSampler):
    """Draw the order of an epoch from the seed and the number of the epoch alone.

    Args:
        data_source: The images.
        seed: Seed of all orders.

    Attributes:
        epoch: Number of the next epoch. It goes up by one with each pass; Lightning sets it with
            :meth:`set_epoch`.

    Example:
        >>> sampler = EpochSampler(range(6), seed=0)
        >>> first, second = list(sampler), list(sampler)
        >>> sampler.set_epoch(0)
        >>> list(sampler) == first, sorted(second) == sorted(first)
        (True, True)
    """

    def __init__(self, data_source: Any, seed: int = 0) -> None:
        super().__init__(data_source)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the next epoch.

        Args:
            epoch: At least 0.
        """
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = seeded_generator(self.seed, "order", self.epoch)
        self.epoch += 1
        yield from torch.randperm(self.num_samples, generator=generator).tolist()


class BatchLoader(DataLoader[Any]):
    """A data loader that makes whole batches, on the device of the images, without workers.

    It is made like any data loader, from a :class:`BatchDataset` and, as ``collate_fn``, a
    :class:`~lightning_mnp.data.transform.BatchTransform`. Lightning can exchange its sampler.
    Augmentation depends on the seed, the epoch, the batch and the process alone. The state of the
    loader, which Lightning puts into checkpoints, tells how many batches of an epoch were
    yielded, so that a training that was stopped in an epoch goes on with the next batch.

    Example:
        >>> from lightning_mnp.data import MemoryDataset
        >>> stored = MemoryDataset(torch.zeros(5, 1, 8, 8, dtype=torch.uint8), torch.arange(5))
        >>> data = BatchDataset(stored, torch.device("cpu"))
        >>> loader = BatchLoader(data, batch_size=2, collate_fn=BatchTransform([0.5], [0.5]))
        >>> [labels.tolist() for images, labels in loader]
        [[0, 1], [2, 3], [4]]
    """

    # Without an __init__ of its own, so that Lightning can make it again with another sampler.
    dataset: BatchDataset
    collate_fn: BatchTransform
    _passes = 0
    _yielded = (0, 0)  # epoch, batches
    _resumed = (-1, 0)  # of a training that was stopped

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:  # type: ignore[override]
        # `overfit_batches` puts in a sampler without epochs. Passes are counted then, and a resumed
        # training cannot know how many there were.
        epoch = int(getattr(self.sampler, "epoch", self._passes))
        self._passes += 1
        stopped, batches = self._resumed
        self._resumed = (-1, 0)
        skipped = batches if stopped == epoch and hasattr(self.sampler, "epoch") else 0
        transform = self.collate_fn
        assert self.batch_sampler is not None
        for place, indices in enumerate(self.batch_sampler):
            if place < skipped:
                continue
            images, *labels = self.dataset.batch(indices)
            generator = transform.generator_of(epoch, place) if transform.augment else None
            self._yielded = (epoch, place + 1)
            yield (transform.images(images, generator), *labels)

    def state_dict(self) -> dict[str, int]:
        """Return which epoch it is in and how many of its batches have been yielded."""
        epoch, batches = self._yielded
        return {"epoch": epoch, "batches": batches}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Skip, in the epoch that was stopped, the batches that were yielded before.

        Args:
            state_dict: As returned by :meth:`state_dict`.
        """
        self._resumed = self._yielded = (int(state_dict["epoch"]), int(state_dict["batches"]))

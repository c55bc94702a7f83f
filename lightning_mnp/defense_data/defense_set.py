"""The defense set: a few hundred clean images in memory, in an order of their own."""

from __future__ import annotations

import copy
import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_mnp.defense_data.augment import random_crop_flip, usual_padding
from lightning_mnp.defense_data.batches import Unpack, check_batch, read_batches, unpack_batch
from lightning_mnp.defense_data.names import find_class_names
from lightning_mnp.defense_data.subset import balanced_indices
from lightning_mnp.hosting.memory import explain_out_of_memory
from lightning_mnp.hosting.processes import process_count, read_together, whole_loader

__all__ = [
    "LEAST_BATCH",
    "DefenseSet",
    "Unpack",
    "seeded_generator",
    "unpack_batch",
    "value_range",
]

# Least batch size, so that no batch has a single image: it has no statistics to normalize by.
LEAST_BATCH = 3


def seeded_generator(*key: str | int) -> torch.Generator:
    """Make a random generator for one purpose, independent of those for other purposes.

    Args:
        key: The seed, and what the random numbers are for, such as
            ``(0, "suppression", run, epoch)``.

    Returns:
        A generator on the CPU; the same key always gives the same numbers.

    Example:
        >>> a, b = (torch.rand(1, generator=seeded_generator(0, "a")) for _ in range(2))
        >>> bool(a == b)
        True
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def value_range(images: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the least and the greatest value of each channel.

    Args:
        images: Shape (N, C, ...).

    Returns:
        Two tensors of shape (1, C, 1, ...).

    Example:
        >>> low, high = value_range(torch.tensor([[[1.0, 2.0]], [[0.0, 3.0]]]))
        >>> low.item(), high.item()
        (0.0, 3.0)
    """
    dims = [0, *range(2, images.ndim)]
    return images.amin(dims, keepdim=True), images.amax(dims, keepdim=True)


class DefenseSet:
    """Clean, labeled images in memory, in an order that depends on the images only.

    Images are sorted by a hash of pixels and label, and repeated images are dropped. So the
    loader's order and batch size, and how images are shared out among processes, make no
    difference.

    Args:
        images: Shape (N, C, ...), floating point, as the network takes them.
        labels: True classes, shape (N,), integers.
        class_names: Names of the classes, in the order of the labels; empty if they are not known.

    Attributes:
        images: The images in their order, on the CPU.
        labels: Their classes, on the CPU.
        fingerprint: A SHA-256 of images and labels, as 64 hexadecimal digits.

    Raises:
        ValueError: If the images or labels cannot serve as a defense set.

    Example:
        >>> images, labels = torch.rand(6, 3, 8, 8), torch.arange(6) % 2
        >>> shuffled = torch.randperm(6)
        >>> first = DefenseSet(images, labels)
        >>> second = DefenseSet(images[shuffled], labels[shuffled])
        >>> first.fingerprint == second.fingerprint
        True
    """

    def __init__(self, images: Tensor, labels: Tensor, class_names: Sequence[str] = ()) -> None:
        _check(images, labels)
        self.class_names = tuple(class_names)
        labels = labels.detach().cpu().long()
        images = images.detach().cpu()
        hashes: dict[bytes, int] = {}
        for index, image in enumerate(images):
            digest = hashlib.sha256(image.contiguous().view(torch.uint8).numpy())
            digest.update(int(labels[index]).to_bytes(8, "big"))
            hashes.setdefault(digest.digest(), index)
        order = [hashes[key] for key in sorted(hashes)]
        self.images = images[order]
        self.labels = labels[order]
        self.fingerprint = hashlib.sha256(b"".join(sorted(hashes))).hexdigest()

    def others(
        self, target: int, count: int, device: torch.device, key: tuple[str | int, ...]
    ) -> tuple[Tensor, Tensor]:
        """Draw images of all classes but one, each image at most once.

        Args:
            target: The class that is left out.
            count: Most images to draw.
            device: Where the images and labels are moved to.
            key: Names the draw, see :func:`seeded_generator`.

        Returns:
            Images, shape (n, C, ...), and labels, shape (n,).

        Example:
            >>> data = DefenseSet(torch.rand(6, 3, 8, 8), torch.arange(6) % 3)
            >>> data.others(2, 10, torch.device("cpu"), (0, "example"))[1].sort().values
            tensor([0, 0, 1, 1])
        """
        others = (self.labels != target).nonzero().flatten()
        drawn = torch.randperm(len(others), generator=seeded_generator(*key))
        rows = others[drawn[:count]]
        return self.images[rows].to(device), self.labels[rows].to(device)

    @classmethod
    def from_loader(
        cls,
        loader: Iterable[Any] | Dataset[Any] | DefenseSet,
        unpack: Unpack = unpack_batch,
        limit: int | None = None,
        gather: bool = False,
    ) -> DefenseSet:
        """Read all batches of a data loader, once.

        Args:
            loader: Yields batches; or a data set, whose items are put into batches; or a
                :class:`DefenseSet`, which is returned as it is. If a data loader has a
                ``DistributedSampler``, each process reads the whole data set.
            unpack: A function that returns images and labels of a batch.
            limit: Most batches to read; all if None.
            gather: Whether to put together the images that all processes have; then all processes
                have to call this.

        Raises:
            ValueError: If the loader fails, ends before its length, yields no batch, or yields
                images or labels that cannot serve.
            TypeError: If no images and labels are found in a batch.
            torch.OutOfMemoryError: If the images do not fit in memory.
            RuntimeError: If reading failed in another process.

        Example:
            >>> batch = torch.rand(6, 3, 8, 8), torch.arange(6) % 2
            >>> DefenseSet.from_loader([batch])
            DefenseSet(6 images of shape (3, 8, 8), 2 classes)
        """
        if isinstance(loader, Dataset):
            loader = DataLoader(loader, batch_size=100)
        several = gather and process_count() > 1
        if isinstance(loader, DefenseSet) and not several:
            return loader

        def read() -> tuple[list[Tensor], list[Tensor]]:
            if isinstance(loader, DefenseSet):
                return [loader.images], [loader.labels]
            return read_batches(whole_loader(loader), unpack, limit)

        where = "while reading the defense set"
        fewer = "Pass a loader of fewer images: a few hundred are enough."
        # A loader draws from PyTorch's global generator.
        with explain_out_of_memory(where, fewer), torch.random.fork_rng(devices=[]):
            images, labels = read_together(read) if several else read()
            if not images:
                raise ValueError(
                    "Expected the defense set to hold images, but its loader yields no batch. "
                    "A generator can be read only once: pass a loader."
                )
            for number in range(len(images)) if several else ():
                check_batch(images[number], labels[number], images[:1], number)
            return cls(torch.cat(images), torch.cat(labels), find_class_names(loader))

    @classmethod
    def from_dataset(
        cls,
        dataset: Dataset[Any],
        size: int = 500,
        seed: int = 0,
        unpack: Unpack = unpack_batch,
    ) -> DefenseSet:
        """Draw the same number of images of each class from a data set that is known to be clean.

        Args:
            dataset: Yields items (image, label) by index. If it has neither ``targets`` nor
                ``labels``, all its items are read once for the labels.
            size: Number of images, at least one for each class.
            seed: Seed of the draw.
            unpack: A function that returns images and labels of a batch.

        Raises:
            ValueError: If the data set has too few images of a class.
            TypeError: If it cannot be indexed.

        Example:
            >>> from torch.utils.data import TensorDataset
            >>> data = TensorDataset(torch.rand(40, 1, 8, 8), torch.arange(40) % 4)
            >>> DefenseSet.from_dataset(data, size=12).counts
            {0: 3, 1: 3, 2: 3, 3: 3}
        """
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise TypeError(
                f"Expected argument `dataset` to have a length and items by index, but got "
                f"{type(dataset).__name__}. Pass a loader of clean images to `from_loader` instead."
            )
        labels = getattr(dataset, "targets", getattr(dataset, "labels", None))
        if labels is None:
            loader: DataLoader[Any] = DataLoader(dataset, batch_size=256)
            with torch.random.fork_rng(devices=[]):
                labels = torch.cat([unpack(batch)[1] for batch in loader])
        chosen = balanced_indices(torch.as_tensor(labels), size, seed).tolist()
        return cls.from_loader(DataLoader(Subset(dataset, chosen), batch_size=256), unpack)

    @property
    def counts(self) -> dict[int, int]:
        """Number of images of each class that occurs."""
        return dict(sorted(Counter(self.labels.tolist()).items()))

    def passes(self, batch_size: int) -> int:
        """Return the number of batches in one pass.

        Args:
            batch_size: Most images in a batch.
        """
        return math.ceil(len(self) / batch_size)

    def batches(self, batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of one pass in the stored order.

        Args:
            batch_size: Most images in a batch.
            device: Where the batches are moved to.

        Yields:
            Images (n, C, ...) and labels (n,).
        """
        for index in range(self.passes(batch_size)):
            yield self.batch(index, batch_size, device)

    def batch(
        self,
        index: int,
        batch_size: int,
        device: torch.device,
        augment: str = "none",
        key: tuple[int | str, ...] | None = None,
        among: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return one batch of a pass; the sizes of all batches of a pass differ by one at most.

        Args:
            index: Number of the batch in the pass, from 0.
            batch_size: Most images in a batch.
            device: Where the batch is moved to.
            augment: ``"none"``, ``"crop"`` or ``"crop-flip"``; it needs a key.
            key: Names the pass, see :func:`seeded_generator`; order and augmentation are drawn by
                it. If None, the images are in the stored order and not augmented.
            among: Positions of the images that the pass goes over; all images if None.

        Returns:
            Images (n, C, ...) and labels (n,).

        Example:
            >>> data = DefenseSet(torch.rand(7, 3, 8, 8), torch.arange(7) % 2)
            >>> parts = [data.batch(index, 3, torch.device("cpu"), key=(0, "example"))
            ...          for index in range(data.passes(3))]
            >>> [len(labels) for images, labels in parts]
            [3, 2, 2]
        """
        order = torch.arange(len(self)) if among is None else among
        if key is not None:
            drawn = torch.randperm(len(order), generator=seeded_generator(*key, "order"))
            order = order[drawn]
        rows = order.tensor_split(math.ceil(len(order) / batch_size))[index]
        images, labels = self.images[rows], self.labels[rows]
        if key is not None:
            images = _augment(images, augment, (*key, "augment", index))
        return images.to(device), labels.to(device)

    def part(self, number: int, parts: int, key: tuple[int | str, ...]) -> Tensor:
        """Split the images into random parts, and return one of the parts.

        Args:
            number: Number of the part, from 0.
            parts: Number of parts; their sizes differ by one at most.
            key: Names the draw, see :func:`seeded_generator`.

        Returns:
            Positions of the images of this part, shape (n,).

        Example:
            >>> data = DefenseSet(torch.rand(6, 3, 8, 8), torch.arange(6) % 2)
            >>> halves = [data.part(number, 2, (0, "halves")) for number in range(2)]
            >>> torch.cat(halves).sort().values
            tensor([0, 1, 2, 3, 4, 5])
        """
        drawn = torch.randperm(len(self), generator=seeded_generator(*key, "parts"))
        return drawn.tensor_split(parts)[number]

    def augmented(self, augment: str, seed: int) -> DefenseSet:
        """Return the same images, each shifted and, with ``"crop-flip"``, mirrored by chance.

        Args:
            augment: ``"crop"`` or ``"crop-flip"``.
            seed: Seed of the draws.

        Returns:
            A defense set in the order of this one. Images of another shape than (C, H, W) are
            unchanged.

        Example:
            >>> data = DefenseSet(torch.rand(6, 3, 8, 8), torch.arange(6) % 2)
            >>> data.augmented("crop", seed=0).labels.equal(data.labels)
            True
        """
        copied = copy.copy(self)
        copied.images = _augment(self.images, augment, (seed, "augmented"))
        return copied

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        shape = tuple(self.images.shape[1:])
        return f"DefenseSet({len(self)} images of shape {shape}, {len(self.counts)} classes)"


def _augment(images: Tensor, augment: str, key: tuple[int | str, ...]) -> Tensor:
    """Shift and mirror images by draws that follow from a key."""
    if augment == "none" or images.ndim != 4:
        return images
    padding = usual_padding(images)
    return random_crop_flip(images, padding, augment == "crop-flip", seeded_generator(*key))


def _check(images: Tensor, labels: Tensor) -> None:
    """Check that images and labels can serve as a defense set."""
    if images.ndim < 3:
        raise ValueError(
            f"Expected the defense set's images to have the shape (N, C, ...), but got "
            f"{tuple(images.shape)}."
        )
    if len(images) == 0:
        raise ValueError("Expected the defense set to hold images, but it is empty.")
    if not images.is_floating_point():
        raise ValueError(
            f"Expected the defense set's images to be floating point, as the network takes them, "
            f"but got {images.dtype}. Scale and normalize them as in training."
        )
    if not bool(torch.isfinite(images).all()):
        raise ValueError(
            "Expected the defense set's images to be finite, but some hold NaN or infinity. "
            "Check the transforms."
        )
    if labels.ndim != 1 or len(labels) != len(images):
        raise ValueError(
            f"Expected the defense set's labels to have the shape ({len(images)},), one class for "
            f"each image, but got {tuple(labels.shape)}."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(
            f"Expected the defense set's labels to be integers, but got {labels.dtype}."
        )
    labels = labels.long()  # of some unsigned types, torch finds no least
    if int(labels.min()) < 0:
        raise ValueError(
            f"Expected the defense set's labels to be at least 0, but got {int(labels.min())}."
        )
    if len(labels.unique()) < 2:
        raise ValueError(
            f"Expected the defense set to hold images of at least two classes, but all are of "
            f"class {int(labels[0])}. Draw it from every class."
        )

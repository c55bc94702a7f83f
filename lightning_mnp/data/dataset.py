"""Image data sets as stored, with and without a trigger."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader, make_dataset

from lightning_mnp.attacks import Attack
from lightning_mnp.defense_data.resizing import resize_and_crop

__all__ = [
    "FolderDataset",
    "ImageDataset",
    "MemoryDataset",
    "PoisonedDataset",
    "TriggeredDataset",
]

# A trigger works on float32 images, four times the bytes: never on all of them at once.
_PART = 1024


class ImageDataset(Dataset[Any], ABC):
    """Images as they are stored, fetched in batches: no augmentation, no normalization.

    A data loader gets all images of a batch with one call of :meth:`fetch`.

    Args:
        labels: Classes of all images, shape (N,), integers.

    Attributes:
        labels: Classes of all images, shape (N,), int64.
    """

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels.long()

    @abstractmethod
    def fetch(self, indices: Sequence[int]) -> Tensor:
        """Return new images of these indices, shape (n, C, H, W), uint8."""

    def label_columns(self) -> tuple[Tensor, ...]:
        """Return what stands beside each image in a sample: its label, shape (N,)."""
        return (self.labels,)

    def to_memory(self, batch_size: int = 256) -> MemoryDataset:
        """Read all images into one tensor.

        Args:
            batch_size: Number of images to read at a time.

        Returns:
            The images with their labels; itself if they lie in one tensor already.

        Raises:
            ValueError: If the images differ in size or channels.
        """
        if len(self) == 0:
            return MemoryDataset(torch.zeros(0, 1, 1, 1, dtype=torch.uint8), self.labels)
        shape = self.fetch([0]).shape[1:]
        images = torch.empty((len(self), *shape), dtype=torch.uint8)
        for start in range(0, len(self), batch_size):
            stop = min(start + batch_size, len(self))
            part = self.fetch(range(start, stop))
            if part.shape[1:] != shape:
                raise ValueError(_mixed_sizes(part.shape[1:], shape))
            images[start:stop] = part
        return MemoryDataset(images, self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"Expected an index below {len(self)}, but got {index}.")
        return self.__getitems__([index % len(self)])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, ...]]:
        images, places = self.fetch(indices).unbind(), list(indices)
        columns = [column[places].tolist() for column in self.label_columns()]
        return list(zip(images, *columns, strict=True))


class MemoryDataset(ImageDataset):
    """Images in one tensor.

    Args:
        images: Shape (N, C, H, W), ``uint8``.
        labels: Classes, shape (N,), integers.
        classes: Names of the classes, in the order of the labels; empty if they are not known.

    Raises:
        ValueError: If shapes or dtypes are others.

    Example:
        >>> data = MemoryDataset(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), torch.arange(5))
        >>> image, label = data[2]
        >>> image.shape, label
        (torch.Size([3, 8, 8]), 2)
    """

    def __init__(self, images: Tensor, labels: Tensor, classes: Sequence[str] = ()) -> None:
        if images.ndim != 4 or images.dtype != torch.uint8:
            raise ValueError(
                "Expected argument `images` to be uint8 of shape (N, C, H, W), but got "
                f"{images.dtype} of shape {tuple(images.shape)}."
            )
        if labels.shape != images.shape[:1] or labels.is_floating_point():
            raise ValueError(
                f"Expected argument `labels` to be integers of shape ({len(images)},), one for "
                f"each image, but got {labels.dtype} of shape {tuple(labels.shape)}."
            )
        super().__init__(labels)
        self.images = images
        self.classes = tuple(classes)

    def fetch(self, indices: Sequence[int]) -> Tensor:
        """Return new images of these indices, shape (n, C, H, W), uint8."""
        return self.images[torch.as_tensor(indices, dtype=torch.long)]

    def to_memory(self, batch_size: int = 256) -> MemoryDataset:
        """Return itself: the images lie in one tensor already.

        Args:
            batch_size: Not used.
        """
        return self


class FolderDataset(ImageDataset):
    """Images of a folder with one folder per class, read when they are needed.

    Args:
        folder: The folder; a class's images may lie in folders below its own.
        classes: Names of the class folders to use; their order gives the labels.
        image_size: Side of the square that every image is resized and center-cropped to. If None,
            images stay as they are and must all have the same size.

    Attributes:
        paths: One file per image, in the order of the labels, then by name.

    Raises:
        FileNotFoundError: If a class has no folder or no image.
        ValueError: When fetched, if images differ in size or a file can't be read.
    """

    def __init__(
        self, folder: Path | str, classes: Sequence[str], image_size: int | None = None
    ) -> None:
        missing = [name for name in classes if not (Path(folder) / name).is_dir()]
        if missing:
            raise FileNotFoundError(
                f"Expected a folder for each class in {str(folder)!r}, but none was found for "
                f"{', '.join(missing)}."
            )
        class_to_index = {name: index for index, name in enumerate(classes)}
        samples = make_dataset(folder, class_to_index, extensions=IMG_EXTENSIONS)
        labels = torch.tensor([label for _, label in samples], dtype=torch.long)
        order = labels.argsort(stable=True).tolist()
        super().__init__(labels[order])
        self.paths = [Path(samples[index][0]) for index in order]
        self.image_size = image_size

    def fetch(self, indices: Sequence[int]) -> Tensor:
        """Return new images of these indices, shape (n, 3, H, W), uint8."""
        images = [_read(self.paths[index]) for index in indices]
        if self.image_size is not None:
            images = [resize_and_crop(image, self.image_size) for image in images]
        for image in images:
            if image.shape != images[0].shape:
                raise ValueError(_mixed_sizes(image.shape, images[0].shape))
        return torch.stack(images)


class PoisonedDataset(ImageDataset):
    """A training set in which some images carry the trigger and the attacker's label.

    Images in memory get their trigger once, when the set is made. Images on the disk get it each
    time they are read, unless the attack takes long to craft an image.

    Args:
        base: The clean images; unchanged.
        attack: Puts the trigger on images and names the attacker's labels.
        indices: Indices of the images to poison, as by ``attack.poison_indices``.
        num_classes: Number of classes K.

    Attributes:
        indices: The poisoned indices, sorted.
        labels: Labels to train on: the attacker's for poisoned images.
        true_labels: The labels before poisoning.

    Raises:
        ValueError: If an index is out of range or occurs twice, or labels are not below K.

    Example:
        >>> from lightning_mnp.attacks import BadNets
        >>> clean = MemoryDataset(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.arange(4))
        >>> poisoned = PoisonedDataset(clean, BadNets(), torch.tensor([2]), num_classes=4)
        >>> poisoned.labels
        tensor([0, 1, 0, 3])
    """

    def __init__(
        self, base: ImageDataset, attack: Attack, indices: Tensor, num_classes: int
    ) -> None:
        _check_labels(base.labels, num_classes)
        indices = indices.detach().cpu().long().sort().values
        if len(indices) and not 0 <= int(indices[0]) <= int(indices[-1]) < len(base):
            raise ValueError(
                f"Expected argument `indices` to be from 0 to {len(base) - 1}, but got "
                f"{int(indices[0])} to {int(indices[-1])}."
            )
        if (indices.diff() == 0).any():
            raise ValueError("Expected argument `indices` to name each image once, but some twice.")
        labels = base.labels.clone()
        labels[indices] = attack.poison_labels(labels[indices], num_classes)
        super().__init__(labels)
        self.base = base
        self.attack = attack
        self.indices = indices
        self.true_labels = base.labels
        # Each image's place among the poisoned ones, -1 for clean images.
        self._place = torch.full((len(base),), -1)
        self._place[indices] = torch.arange(len(indices))
        self._triggered: Tensor | None = None
        if (isinstance(base, MemoryDataset) or attack.crafts) and len(indices):
            parts = [
                attack.poison(base.fetch(part.tolist()), base.labels[part], part)
                for part in indices.split(_PART)
            ]
            self._triggered = torch.cat(parts)

    def fetch(self, indices: Sequence[int]) -> Tensor:
        """Return new images of these indices, poisoned ones with the trigger."""
        images = self.base.fetch(indices)
        place = self._place[torch.as_tensor(indices, dtype=torch.long)]
        poisoned = place >= 0
        if poisoned.any():
            if self._triggered is not None:
                images[poisoned] = self._triggered[place[poisoned]]
            else:
                chosen = torch.as_tensor(indices, dtype=torch.long)[poisoned]
                images[poisoned] = self.attack.poison(
                    images[poisoned], self.base.labels[chosen], chosen
                )
        return images


class TriggeredDataset(ImageDataset):
    """Test images with the trigger, to measure attack success on.

    A sample is (image, attacker's label, true label). Images whose true label is the attacker's
    are left out: in mode ``"all-to-one"``, those of the target class. An attack may leave out
    more, see ``attack.triggered_indices``.

    Args:
        base: The clean images; unchanged.
        attack: Puts the trigger on images and names the attacker's labels.
        num_classes: Number of classes K.

    Attributes:
        indices: Indices into ``base`` of the images that are left.
        labels: The attacker's labels.
        true_labels: The labels without the trigger.

    Raises:
        ValueError: If labels are not below K or no image is left.
    """

    def __init__(self, base: ImageDataset, attack: Attack, num_classes: int) -> None:
        _check_labels(base.labels, num_classes)
        targets = attack.target_labels(base.labels, num_classes)
        indices = attack.triggered_indices(base.labels, num_classes)
        if len(indices) == 0:
            raise ValueError(
                "Expected argument `base` to hold images outside of the target class, but all of "
                f"its {len(base)} images have the attacker's label already."
            )
        super().__init__(targets[indices])
        self.base = base
        self.attack = attack
        self.indices = indices
        self.true_labels = base.labels[indices]
        self._triggered: Tensor | None = None
        if isinstance(base, MemoryDataset):
            parts = [attack.apply(base.fetch(part.tolist())) for part in indices.split(_PART)]
            self._triggered = torch.cat(parts)

    def fetch(self, indices: Sequence[int]) -> Tensor:
        """Return new images of these indices, with the trigger."""
        places = torch.as_tensor(indices, dtype=torch.long)
        if self._triggered is not None:
            return self._triggered[places]
        return self.attack.apply(self.base.fetch(self.indices[places].tolist()))

    def label_columns(self) -> tuple[Tensor, ...]:
        """Return what stands beside each image: the attacker's label and the true one."""
        return self.labels, self.true_labels


def _read(path: Path) -> Tensor:
    try:
        # Through NumPy, in half of the time that torchvision's conversion takes.
        pixels = np.array(default_loader(path))
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"Expected {str(path)!r} to be an image of ordinary size, but reading it could take "
            f"all memory: {error} Shrink or remove it."
        ) from error
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises each for broken headers
        raise ValueError(
            f"Expected {str(path)!r} to be a readable image, but it is not. Repair or remove it."
        ) from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _check_labels(labels: Tensor, num_classes: int) -> None:
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(
            f"Expected argument `num_classes` to be above every label, but got {num_classes} for "
            f"labels from {int(labels.min())} to {int(labels.max())}."
        )


def _mixed_sizes(one: Sequence[int], other: Sequence[int]) -> str:
    return (
        "Expected all images to have the same channels and size, but got "
        f"{tuple(one)} and {tuple(other)}. Set `image_size` to resize and crop them."
    )

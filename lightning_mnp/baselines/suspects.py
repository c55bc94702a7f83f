"""Suspect images: some of them may be poisoned, and their order counts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_mnp.defense_data.defense_set import DefenseSet, Unpack, unpack_batch
from lightning_mnp.hosting.processes import whole_loader

__all__ = ["Suspects", "read_inputs", "require_labels"]


class Suspects(DefenseSet):
    """Images of which some may be poisoned, with labels, in the order in which they were read.

    Detectors of poisoned images name images by their positions. So repeated images stay, and the
    order is that of the loader, which is read once. A loader that shuffles is allowed, but then
    nobody knows which image is at which position.

    Labels of any kind are taken, because not every detector looks at them. Those that do call
    :func:`require_labels`.

    Args:
        images: Shape (N, C, ...), floating point, as the network takes them.
        labels: Their labels, shape (N,).
        class_names: Names of the classes, in their order; empty if they are not known.

    Raises:
        ValueError: If the images cannot serve, or there is not one label for each.

    Example:
        >>> images = torch.ones(3, 1, 2, 2)
        >>> Suspects.from_loader([(images, torch.tensor([1, 0, 0]))]).labels
        tensor([1, 0, 0])
    """

    # The checks of a defense set do not fit here, so its constructor is not called.
    def __init__(self, images: Tensor, labels: Tensor, class_names: Sequence[str] = ()) -> None:
        _check(images, labels)
        self.class_names = tuple(class_names)
        self.images, self.labels = images.detach().cpu(), labels.detach().cpu()
        if _are_whole(labels):
            self.labels = self.labels.long()
        digest = hashlib.sha256()
        for tensor in (self.images, self.labels):
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
        self.fingerprint = digest.hexdigest()

    @classmethod
    def from_loader(
        cls,
        loader: Iterable[Any] | Dataset[Any] | DefenseSet,
        unpack: Unpack = unpack_batch,
        limit: int | None = None,
        gather: bool = False,
    ) -> DefenseSet:
        """Read all batches of a data loader, once, and leave their order.

        Args:
            loader: See :meth:`lightning_mnp.defense_data.defense_set.DefenseSet.from_loader`, like
                all that follow.
            unpack: A function that returns images and labels of a batch.
            limit: Most batches to read; all if None.
            gather: Whether to put together the images that all processes have.

        Raises:
            ValueError: If the loader fails, ends before its length, yields no batch, or yields
                images that cannot serve.
            TypeError: If no images and labels are found in a batch.

        Example:
            >>> len(Suspects.from_loader([(torch.rand(3, 1, 2, 2), torch.zeros(3))]))
            3
        """
        try:
            return super().from_loader(loader, unpack, limit, gather)
        except ValueError as error:
            # They are read as a defense set is, but the user has passed them as another argument.
            message = str(error).replace("the defense set's loader", "the loader in `suspects`")
            message = message.replace("the defense set", "argument `suspects`")
            raise ValueError(message) from error.__cause__


def require_labels(suspects: DefenseSet) -> None:
    """Raise if suspect images have no labels that a detector can compare them by.

    Args:
        suspects: The images.

    Raises:
        ValueError: If the labels are no integers from 0, or all are the same.

    Example:
        >>> require_labels(Suspects(torch.rand(2, 1, 2, 2), torch.tensor([0, 1])))
    """
    labels = suspects.labels
    remedy = "Pass the labels that the network was trained on."
    if not _are_whole(labels):
        raise ValueError(
            f"Expected the labels in argument `suspects` to be integers, but got {labels.dtype}. "
            f"{remedy}"
        )
    if int(labels.min()) < 0:
        raise ValueError(
            f"Expected the labels in argument `suspects` to be at least 0, but got "
            f"{int(labels.min())}. {remedy}"
        )
    if len(labels.unique()) < 2:
        raise ValueError(
            f"Expected argument `suspects` to hold images of at least two labels, but all are of "
            f"label {int(labels[0])}. Pass images of all classes."
        )


def read_inputs(
    loader: Iterable[Any] | Dataset[Any] | DefenseSet, unpack: Unpack = unpack_batch
) -> Tensor:
    """Read inputs of a network, in their order; labels count nothing, and may be missing.

    Args:
        loader: Yields batches: images alone, or images with anything beside them; or images that
            have been read.
        unpack: A function (batch) that returns images and labels, or images alone.

    Returns:
        The images, shape (N, C, ...), on the CPU.

    Raises:
        ValueError: If the loader fails, ends before its length, yields no batch, or yields images
            that cannot serve.
        TypeError: If no images are found in a batch.

    Example:
        >>> read_inputs([torch.rand(3, 1, 2, 2), torch.rand(2, 1, 2, 2)]).shape
        torch.Size([5, 1, 2, 2])
    """
    if isinstance(loader, DefenseSet):
        return loader.images
    if unpack is unpack_batch:
        if isinstance(loader, Dataset):
            loader = DataLoader(loader, batch_size=100)
        return Suspects.from_loader(_Unlabeled(whole_loader(loader))).images

    def images_of(batch: Any) -> tuple[Tensor, Tensor]:
        found = unpack(batch)
        return _with_blanks(found if isinstance(found, Tensor) else found[0])

    return Suspects.from_loader(loader, images_of).images


class _Unlabeled:
    """A loader with blank labels in place of those of its batches."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return map(_unlabeled, self._loader)


def _unlabeled(batch: Any) -> Any:
    """Return the images of a batch with blank labels, or the batch if there are no images in it."""
    images = batch
    if isinstance(batch, (tuple, list)):
        # An integer belongs to a single image, which is no batch.
        images = None if not batch or isinstance(batch[-1], int) else batch[0]
    elif hasattr(batch, "keys"):
        try:
            images, _ = unpack_batch({**batch, "label": torch.zeros(1)})
        except TypeError:
            images = None
    return _with_blanks(images) if isinstance(images, Tensor) and images.ndim else batch


def _with_blanks(images: Tensor) -> tuple[Tensor, Tensor]:
    return images, torch.zeros(len(images))


def _are_whole(labels: Tensor) -> bool:
    fraction = labels.is_floating_point() or labels.is_complex()
    return not fraction and labels.dtype != torch.bool


def _check(images: Tensor, labels: Tensor) -> None:
    """Check that images can serve as suspects, and that there is a label for each."""
    if images.ndim < 3:
        raise ValueError(
            f"Expected the images in argument `suspects` to have the shape (N, C, ...), but got "
            f"{tuple(images.shape)}. Pass batches of images as the network takes them."
        )
    if len(images) == 0:
        raise ValueError(
            "Expected argument `suspects` to hold images, but it is empty. Pass at least one."
        )
    if not images.is_floating_point():
        raise ValueError(
            f"Expected the images in argument `suspects` to be floating point, as the network "
            f"takes them, but got {images.dtype}. Scale and normalize them as in training."
        )
    if not bool(torch.isfinite(images).all()):
        raise ValueError(
            "Expected the images in argument `suspects` to be finite, but some hold NaN or "
            "infinity. Check the transforms."
        )
    if labels.ndim != 1 or len(labels) != len(images):
        raise ValueError(
            f"Expected the labels in argument `suspects` to have the shape ({len(images)},), one "
            f"for each image, but got {tuple(labels.shape)}. Correct the data set."
        )

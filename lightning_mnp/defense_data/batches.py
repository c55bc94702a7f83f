"""Batches of a user's data loader: read to the end, split into images and labels, and checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lightning_mnp.hosting.memory import is_out_of_memory

__all__ = ["Unpack", "check_batch", "read_batches", "unpack_batch"]

Unpack = Callable[[Any], tuple[Tensor, Tensor]]

_IMAGE_KEYS = ("image", "images", "pixel_values", "x", "input", "inputs", "img")
_LABEL_KEYS = ("label", "labels", "y", "target", "targets", "class")


def unpack_batch(batch: Any) -> tuple[Tensor, Tensor]:
    """Return the images and labels of a batch.

    Args:
        batch: A tuple or list that starts with images and labels, or a dict with one of the usual
            keys for each (``image``, ``pixel_values``, ``x`` and others; ``label``, ``y``,
            ``target`` and others). Without a usual key, the only entry of floating point with
            three dimensions or more holds the images, and the only one with a row of integers the
            labels.

    Returns:
        Images (N, C, ...) and labels (N,).

    Raises:
        TypeError: If they are not found.

    Example:
        >>> import torch
        >>> unpack_batch({"image": torch.zeros(1, 3, 8, 8), "label": torch.tensor([4])})[1]
        tensor([4])
    """
    pair: tuple[Any, ...] = ()
    if isinstance(batch, (tuple, list)):
        pair = tuple(batch[:2])
    elif hasattr(batch, "keys"):
        images = _choose(batch, _IMAGE_KEYS, _holds_images)
        labels = _choose(batch, _LABEL_KEYS, _holds_classes)
        pair = (*images, *labels)
    if len(pair) != 2 or not all(isinstance(part, Tensor) for part in pair):
        raise TypeError(
            "Expected every batch to be a pair (images, labels) of tensors, or a dict that names "
            f"them, but got {_described(batch)}"
        )
    return pair[0], pair[1]


def _choose(batch: Any, keys: Sequence[str], fits: Callable[[Any], bool]) -> list[Any]:
    """Return the value of the first usual key of a batch, or the only value that fits."""
    usual = [batch[key] for key in keys if key in batch]
    return usual[:1] or [batch[key] for key in batch.keys() if fits(batch[key])]  # noqa: SIM118 (a UserDict)


def _holds_images(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim >= 3 and value.is_floating_point()


def _holds_classes(value: Any) -> bool:
    whole = isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())
    return bool(whole and value.ndim == 1 and value.dtype != torch.bool)


def _described(batch: Any) -> str:
    """Say what a batch is instead of images and labels, and what to do about it."""
    pass_unpack = (
        "Pass as argument `unpack` a function that returns the images and labels of a batch."
    )
    if hasattr(batch, "keys"):
        keys = sorted(map(str, batch.keys()))
        return f"{type(batch).__name__} with the keys {keys}. {pass_unpack}"
    if not isinstance(batch, (tuple, list)):
        return f"{type(batch).__name__}. {pass_unpack}"
    kinds = ", ".join(type(part).__name__ for part in batch[:2])
    found = f"{type(batch).__name__} of {kinds or 'nothing'}"
    if any(type(part).__module__ == "numpy" for part in batch[:2]):
        return f"{found}. Turn the arrays into tensors by `torch.from_numpy`."
    if len(batch) == 2 and isinstance(batch[0], Tensor) and isinstance(batch[1], int):
        return f"{found}, a single image. Pass `DataLoader(images, batch_size=100)`."
    return f"{found}. {pass_unpack}"


def read_batches(
    loader: Iterable[Any], unpack: Unpack = unpack_batch, limit: int | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Read all batches of a data loader, once.

    Args:
        loader: Yields batches.
        unpack: A function that returns images and labels of a batch.
        limit: Most batches to read; all if None.

    Returns:
        Images and labels of each batch, on the CPU.

    Raises:
        ValueError: If the loader or ``unpack`` fails, the loader ends before its length, or a
            batch does not fit those before it.
        TypeError: If no images and labels are found in a batch.

    Example:
        >>> import torch
        >>> batch = torch.zeros(3, 1, 8, 8), torch.tensor([0, 1, 0])
        >>> images, labels = read_batches([batch, batch])
        >>> torch.cat(labels)
        tensor([0, 1, 0, 0, 1, 0])
    """
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for number, batch in enumerate(_batches(loader, limit)):
        part, classes = _unpack(batch, unpack, number)
        check_batch(part, classes, images, number)
        images.append(part.detach().cpu())
        labels.append(classes.detach().cpu())
    return images, labels


def _batches(loader: Iterable[Any], limit: int | None) -> Iterator[Any]:
    """Yield the batches of a loader; raise if it fails or ends early."""
    try:
        length = len(loader)  # type: ignore[arg-type]
    except Exception:  # it has no length, or does not know it yet
        length = 0
    count = 0
    try:
        for batch in islice(loader, limit):
            yield batch
            count += 1
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"Expected the defense set's loader to yield batches to its end, but it raised "
            f"{type(error).__name__} after {count}: {error}"
        ) from error
    expected = length if limit is None else min(length, limit)
    if count < expected:
        raise ValueError(
            f"Expected the defense set's loader to yield {expected} batches, as its length says, "
            f"but it ended after {count}. Correct the loader, or pass a list of its batches."
        )


def _unpack(batch: Any, unpack: Unpack, number: int) -> tuple[Tensor, Tensor]:
    """Return the images and labels of a batch; raise if the user's function fails."""
    try:
        images, labels = unpack(batch)
    except Exception as error:
        if unpack is unpack_batch:
            raise
        raise ValueError(
            f"Expected argument `unpack` to return images and labels, but on batch {number} it "
            f"raised {type(error).__name__}: {error}"
        ) from error
    if not (isinstance(images, Tensor) and isinstance(labels, Tensor)):
        found = f"{type(images).__name__} and {type(labels).__name__}"
        raise TypeError(
            f"Expected argument `unpack` to return images and labels as tensors, but on batch "
            f"{number} it returned {found}. `torch.as_tensor` makes a tensor of an array or a list."
        )
    return images, labels


def check_batch(images: Tensor, labels: Tensor, earlier: list[Tensor], number: int) -> None:
    """Check that the images and labels of a batch fit each other and the batches before.

    Args:
        images: Images of the batch, shape (N, C, ...).
        labels: Their classes, shape (N,).
        earlier: Images of earlier batches.
        number: Number of the batch, for messages.

    Raises:
        ValueError: If numbers, shapes or types do not agree.

    Example:
        >>> import torch
        >>> check_batch(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]), earlier=[], number=0)
    """
    if images.ndim == 0 or labels.ndim != 1 or len(images) != len(labels):
        raise ValueError(
            "Expected every batch to hold one label for each image, but got images of shape "
            f"{tuple(images.shape)} and labels of shape {tuple(labels.shape)} in batch {number}. "
            f"{_remedy(labels)}"
        )
    if earlier and images.shape[1:] != earlier[0].shape[1:]:
        raise ValueError(
            f"Expected all images of the defense set to have one shape, but got "
            f"{tuple(earlier[0].shape[1:])} and, in batch {number}, {tuple(images.shape[1:])}. "
            "Resize them in the data set's transform."
        )
    if earlier and images.dtype != earlier[0].dtype:
        raise ValueError(
            f"Expected all images of the defense set to be of one type, but got "
            f"{earlier[0].dtype} and, in batch {number}, {images.dtype}. Convert them in the data "
            "set's transform."
        )


def _remedy(labels: Tensor) -> str:
    if labels.ndim == 2 and labels.shape[1] > 1:
        return "If they are one-hot or shares of classes, pass `labels.argmax(1)`."
    return (
        "Correct the data set, or pass as argument `unpack` a function that returns the images and "
        "labels of a batch."
    )

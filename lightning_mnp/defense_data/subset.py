"""Class-balanced subsets of a data set, drawn by a seed."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["balanced_indices"]


def balanced_indices(
    labels: Tensor,
    size: int,
    seed: int = 0,
    num_classes: int | None = None,
    argument: str = "size",
) -> Tensor:
    """Draw a subset with the same number of images of each class.

    If ``size`` is not a multiple of the number of classes, some classes get one image more than
    the others; which ones is drawn, too.

    Args:
        labels: Classes of the whole set, shape (N,), integers.
        size: Number of images to draw, at least one of each class.
        seed: Seed of the draw.
        num_classes: Number of classes K; if None, only the classes that occur in ``labels`` count.
        argument: The name that the user knows ``size`` by, for messages.

    Returns:
        ``size`` distinct indices into ``labels``, on the CPU, in a random order that does not
        depend on the classes.

    Raises:
        ValueError: If ``labels`` is not one row of integers from 0 to K - 1, ``size`` is smaller
            than the number of classes, or a class has too few images.

    Example:
        >>> labels = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
        >>> labels[balanced_indices(labels, 6)].bincount()
        tensor([2, 2, 2])
    """
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            "Expected argument `labels` to be integers of shape (N,), but got "
            f"{labels.dtype} of shape {tuple(labels.shape)}."
        )
    if len(labels) == 0:
        raise ValueError("Expected argument `labels` to hold at least one label, but got none.")
    labels = labels.detach().cpu().long()  # of some unsigned types, torch finds no greatest
    count = int(labels.max()) + 1 if num_classes is None else num_classes
    if labels.min() < 0 or labels.max() >= count:
        raise ValueError(
            f"Expected argument `labels` to have values from 0 to {count - 1}, but got "
            f"{int(labels.min())} to {int(labels.max())}."
        )
    members = [(labels == label).nonzero().flatten() for label in range(count)]
    classes = [label for label in range(count) if num_classes is not None or len(members[label])]
    if size < len(classes):
        raise ValueError(
            f"Expected argument `{argument}` to be at least {len(classes)}, one image of each "
            f"class, but got {size}."
        )
    generator = torch.Generator().manual_seed(seed)
    share, rest = divmod(size, len(classes))
    extra = torch.zeros(len(classes), dtype=torch.long)
    extra[torch.randperm(len(classes), generator=generator)[:rest]] = 1
    parts = []
    for label, more in zip(classes, extra.tolist(), strict=True):
        found, wanted = members[label], share + more
        if len(found) < wanted:
            raise ValueError(
                f"Expected argument `{argument}` to need at most the {len(found)} images of class "
                f"{label}, but {size} images of {len(classes)} classes need {wanted} of it. "
                f"Choose a smaller `{argument}`, or add images of this class."
            )
        parts.append(found[torch.randperm(len(found), generator=generator)[:wanted]])
    chosen = torch.cat(parts)
    return chosen[torch.randperm(size, generator=generator)]

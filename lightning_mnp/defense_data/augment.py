"""Random shifts and flips of a batch of images, drawn for each image."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Augmentation", "random_crop_flip", "usual_padding"]

Augmentation = Literal["none", "crop", "crop-flip"]


def usual_padding(images: Tensor) -> tuple[int, int]:
    """Return by how many pixels images are shifted at most: an eighth of their height and width.

    Args:
        images: Shape (..., H, W).

    Returns:
        The number of rows and of columns: at least 1 for a side of four pixels or more, 0 for a
        shorter side.

    Example:
        >>> usual_padding(torch.zeros(3, 32, 32)), usual_padding(torch.zeros(1, 2, 128))
        ((4, 4), (0, 16))
    """
    height, width = (max(size // 8, int(size > 3)) for size in images.shape[-2:])
    return height, width


def random_crop_flip(
    images: Tensor,
    padding: int | tuple[int, int] = 4,
    flip: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Shift each image by up to ``padding`` pixels, fill with zeros, and mirror it by chance.

    This is torchvision's ``RandomCrop(size, padding)`` followed by ``RandomHorizontalFlip``, drawn
    for each image and computed for the batch at once.

    Args:
        images: Shape (N, C, H, W), any dtype.
        padding: Pixels added on each side before the crop, 0 for no shift; or a pair of such
            numbers, the first for top and bottom, the second for left and right.
        flip: Whether images are mirrored left to right, with probability 1/2.
        generator: Random generator on the CPU; PyTorch's global one if None.

    Returns:
        New images of the same shape, dtype and device.

    Example:
        >>> images = torch.arange(4.0).reshape(1, 1, 2, 2)
        >>> random_crop_flip(images, padding=0, flip=False).equal(images)
        True
    """
    count, channels, height, width = images.shape
    above, left = (padding, padding) if isinstance(padding, int) else padding
    shifts = [
        torch.randint(0, 2 * most + 1, (count,), generator=generator) for most in (above, left)
    ]
    mirrored = torch.rand(count, generator=generator) < 0.5 if flip else torch.zeros(count).bool()
    rows = shifts[0][:, None] + torch.arange(height)
    columns = shifts[1][:, None] + torch.arange(width)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    padded = F.pad(images, (left, left, above, above))
    rows, columns = rows.to(images.device), columns.to(images.device)
    # Two gathers rather than one advanced index: with several threads and bytes, the latter
    # corrupts memory in PyTorch 2.14.1 on the CPU.
    shifted = padded.gather(2, rows[:, None, :, None].expand(-1, channels, -1, padded.shape[3]))
    return shifted.gather(3, columns[:, None, None, :].expand(-1, channels, height, -1))

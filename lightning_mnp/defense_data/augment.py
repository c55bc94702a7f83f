"""Random crop and flip of a whole batch, each image by its own draw."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Augmentation", "random_crop_flip", "usual_padding"]

Augmentation = Literal["none", "crop", "crop-flip"]


def usual_padding(images: Tensor) -> tuple[int, int]:
    """Tell by how many pixels images of a size are shifted: an eighth of height and width.

    Args:
        images: Shape (..., H, W).

    Returns:
        The most rows and columns; at least 1 where there are four or more, else 0.

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
    """Shift every image by up to ``padding`` pixels, filling with zeros, and mirror half of them.

    It equals torchvision's ``RandomCrop(size, padding)`` and ``RandomHorizontalFlip`` drawn for
    each image, done for the batch at once.

    Args:
        images: Shape (N, C, H, W), any dtype.
        padding: Pixels added on every side before the crop, 0 for no shift; of two numbers, the
            first above and below, the second left and right.
        flip: Whether to mirror images left to right with probability 1/2.
        generator: Source of randomness on the CPU; the global one where None.

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

"""Images of all sizes as squares of one size."""

from __future__ import annotations

from torch import Tensor
from torchvision.transforms.v2 import functional as V

__all__ = ["resize_and_crop"]

# An image whose longer side is more than this many times the shorter one is cut first.
_STRIP = 4


def resize_and_crop(images: Tensor, size: int) -> Tensor:
    """Scale images until the shorter side fits, then cut out the center square.

    Args:
        images: Shape (..., C, H, W), ``uint8`` or floating point.
        size: Side of the square in pixels, at least 1.

    Returns:
        Images of shape (..., C, size, size); the argument itself if it has that size.

    Example:
        >>> import torch
        >>> resize_and_crop(torch.zeros(3, 20, 40, dtype=torch.uint8), 10).shape
        torch.Size([3, 10, 10])
    """
    if tuple(images.shape[-2:]) == (size, size):
        return images
    # A long strip is cut before it is scaled, well outside of the center square: scaled whole, it
    # could take all memory.
    most = _STRIP * min(images.shape[-2:])
    images = V.center_crop(images, [min(side, most) for side in images.shape[-2:]])
    scaled: Tensor = V.center_crop(V.resize(images, [size], antialias=True), [size, size])
    return scaled

"""Warps: small moves of the pixels, the same in all images, that stand in for an unknown trigger.

A trigger that bends images, such as WaNet's, is no pattern that could be added: what it changes
depends on the image. Moves of half a pixel at most, which no class should depend on, are found by
following the gradient as any other pattern is.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_mnp.signals.pattern import PatternTrigger

__all__ = ["WarpTrigger"]

# Control points in each direction, between which moves are interpolated.
_GRID = 8
# In pixels, in each direction. Sub-pixel moves change next to nothing for ordinary classes.
_FARTHEST = 0.5
_STEPS = 8
# Root mean square of a step, as a share of the farthest move.
_LENGTH = 0.2


class WarpTrigger(PatternTrigger):
    """A warp of every image by at most half a pixel.

    The arguments are those of :class:`~lightning_mnp.signals.pattern.PatternTrigger`; images have
    shape (N, C, H, W). Gradients in the pattern are deterministic on all devices.

    Attributes:
        pattern: How far pixels are fetched from below and from the right, in pixels, at the points
            of a grid, shape (1, 2, 8, 8).

    Example:
        >>> from torch import nn
        >>> from lightning_mnp.surgery.layers import find_filter_layers
        >>> from lightning_mnp.surgery.masked_network import MaskedNetwork
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(36, 2))
        >>> images, labels = torch.rand(8, 1, 4, 4), torch.zeros(8, dtype=torch.long)
        >>> masked = MaskedNetwork(network, find_filter_layers(network, images))
        >>> zero, one = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
        >>> warp = WarpTrigger(masked, images, labels, labels + 1, zero, one)
        >>> before = warp.margins().mean()
        >>> warp.approach()
        >>> bool(warp.margins().mean() > before), float(warp.pattern.abs().max()) <= 0.5
        (True, True)
    """

    name = "warp"
    steps = _STEPS

    def blank(self) -> Tensor:
        """Give a warp that moves nothing."""
        return self.images.new_zeros(1, 2, _GRID, _GRID)

    def applied(self, images: Tensor, pattern: Tensor) -> Tensor:
        """Fetch each pixel from where a warp says, between pixels by bilinear interpolation."""
        height, width = images.shape[2:]
        # As matrices, since interpolation has no deterministic gradient on every device.
        rows, columns = (_enlargement(size, pattern.device).to(pattern) for size in (height, width))
        moves = rows @ pattern @ columns.T
        down, right = (_weights(axis) for axis in moves.split(1, dim=1))
        padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
        warped = torch.zeros_like(images)
        for row, vertical in enumerate(down):
            for column, horizontal in enumerate(right):
                shifted = padded[:, :, row : row + height, column : column + width]
                warped = warped + vertical * horizontal * shifted
        return warped

    @property
    def unit(self) -> Tensor:
        """The farthest move, in pixels."""
        return self.images.new_tensor(_FARTHEST)

    @property
    def limits(self) -> tuple[Tensor, Tensor]:
        """The farthest moves in both directions."""
        return -self.unit, self.unit

    @staticmethod
    def length(taken: int) -> float:
        """Give the root mean square of each step's change."""
        return _LENGTH


def _enlargement(size: int, device: torch.device) -> Tensor:
    """Give the matrix that interpolates between control points, shape (size, points)."""
    points = torch.eye(_GRID, device=device)[None]
    lines = F.interpolate(points, size=size, mode="linear", align_corners=True)
    return lines[0].T


def _weights(moves: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weigh the pixel before, the pixel itself and the one behind, for moves of at most one."""
    # With the absolute value, whose slope at 0 is 0, the slope where nothing moves is that of the
    # neighbors on both sides.
    behind = (moves.abs() + moves) / 2
    before = behind - moves
    return before, 1 - before - behind, behind

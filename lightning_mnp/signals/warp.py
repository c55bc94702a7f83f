"""Warps: small moves of the pixels, the same in all images, that stand in for an unknown trigger.

A trigger that bends images, such as WaNet's, is no pattern that could be added: what it changes
depends on the image. Moves of half a pixel at most, which no class should depend on, are found by
following the gradient as any other pattern is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_mnp.config import Constants
from lightning_mnp.defense_data.defense_set import DefenseSet
from lightning_mnp.signals.pattern import LeadSearch, PatternSignal
from lightning_mnp.signals.pattern_trigger import PatternTrigger

__all__ = ["WarpConstants", "WarpSearch", "WarpTrigger"]


@dataclass(frozen=True)
class WarpConstants:
    """How a warp is made, and when it counts.

    Attributes:
        counts_from: How far one class stands out, from where it counts fully, see
            :func:`~lightning_mnp.signals.standout.find_standout`.
        trace_from: Lead over the next class from which it is a trace for pruning, in multiples of
            the usual distance to a class.
        grid: Control points in each direction, between which moves are interpolated.
        farthest: Farthest move in each direction, in pixels, at most 1. Moves of less than a pixel
            change next to nothing for ordinary classes.
        steps: Number of steps.
        length: Root mean square of a step, as a share of the farthest move.
    """

    counts_from: float = 1.4
    trace_from: float = 0.3
    grid: int = 8
    farthest: float = 0.5
    steps: int = 8
    length: float = 0.2


class WarpTrigger(PatternTrigger):
    """A warp of every image by at most half a pixel.

    The arguments are those of :class:`~lightning_mnp.signals.pattern_trigger.PatternTrigger`;
    images have shape (N, C, H, W). Gradients in the pattern are deterministic on all devices.

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

    @property
    def _warp(self) -> WarpConstants:
        return self.constants.of(WarpConstants)

    @property
    def steps(self) -> int:
        """The number of steps in which a warp is made."""
        return self._warp.steps

    def blank(self) -> Tensor:
        """Return a warp that moves nothing."""
        return self.images.new_zeros(1, 2, self._warp.grid, self._warp.grid)

    def applied(self, images: Tensor, pattern: Tensor) -> Tensor:
        """Fetch each pixel from where a warp says, between pixels by bilinear interpolation.

        Args:
            images: Shape (N, C, H, W).
            pattern: The warp.
        """
        height, width = images.shape[2:]
        # As matrices, since interpolation has no deterministic gradient on every device.
        grid = self._warp.grid
        sizes = (height, width)
        rows, columns = (_enlargement(size, grid, pattern.device).to(pattern) for size in sizes)
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
        return self.images.new_tensor(self._warp.farthest)

    @property
    def limits(self) -> tuple[Tensor, Tensor]:
        """The farthest moves in both directions."""
        return -self.unit, self.unit

    def length(self, taken: int) -> float:
        """Return the root mean square of each step's change.

        Args:
            taken: Steps taken so far.
        """
        return self._warp.length


class WarpSearch(PatternSignal[WarpTrigger], LeadSearch[WarpTrigger]):
    """Measures for each class how much nearer a small warp brings images to it.

    Args:
        scene: What it works on.
    """

    name = "warp"
    kind = WarpTrigger
    what = "a warp by half a pixel at most brings images nearer to"

    @classmethod
    def applies(cls, data: DefenseSet) -> bool:
        """Return whether images have height and width.

        Args:
            data: The defense set.
        """
        return data.images.ndim == 4

    @classmethod
    def class_steps(cls, constants: Constants) -> int:
        """Return the number of steps for each class.

        Args:
            constants: Constants that differ from their defaults.
        """
        return constants.of(WarpConstants).steps

    @property
    def counts_from(self) -> float:
        """How far a class has to stand out to count fully."""
        return self.scene.constants.of(WarpConstants).counts_from

    @property
    def trace_from(self) -> float:
        """The lead from which a warp is a trace."""
        return self.scene.constants.of(WarpConstants).trace_from

    @property
    def figures(self) -> dict[int, float]:
        """By how much a warp raises the margin of each class."""
        return self.rises


def _enlargement(size: int, grid: int, device: torch.device) -> Tensor:
    """Return the matrix that interpolates between control points, shape (size, grid)."""
    points = torch.eye(grid, device=device)[None]
    lines = F.interpolate(points, size=size, mode="linear", align_corners=True)
    return lines[0].T


def _weights(moves: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights of the pixel before, the pixel itself and the one behind it."""
    # With the absolute value, whose slope at 0 is 0, the slope where nothing moves is that of the
    # neighbors on both sides.
    behind = (moves.abs() + moves) / 2
    before = behind - moves
    return before, 1 - before - behind, behind

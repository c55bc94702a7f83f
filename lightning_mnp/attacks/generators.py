"""A small convolutional network that makes one image out of another."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from lightning_mnp.attacks.checks import check_range

__all__ = ["ImageGenerator"]

MAX_CHANNELS = 64
MAX_WIDTH = 64
MAX_DEPTH = 4


class ImageGenerator(nn.Module):
    """An autoencoder: convolutions that halve the image, then transposed ones that restore it.

    The output has the size of the image, whatever that is. Normalization is by group, within each
    image. So an image's output does not depend on other images, and is the same in training and
    in evaluation.

    Args:
        in_channels: Channels of the images, from 1 to 64.
        out_channels: Channels of the output, from 1 to 64.
        width: Channels of the features at full size, from 4 to 64. Each halving doubles them.
        depth: Number of times that the size is halved, from 1 to 4.
        seed: Seed of the fresh weights.

    Raises:
        ValueError: If an argument is out of range. Sizes are bounded because a trigger file may
            come from an attacker.

    Example:
        >>> ImageGenerator(3, 1)(torch.rand(2, 3, 32, 20)).shape
        torch.Size([2, 1, 32, 20])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        width: int = 16,
        depth: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_range(1, MAX_CHANNELS, in_channels=in_channels, out_channels=out_channels)
        check_range(4, MAX_WIDTH, width=width)
        check_range(1, MAX_DEPTH, depth=depth)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            widths = [width * 2**level for level in range(depth + 1)]
            self.stem = _block(nn.Conv2d(in_channels, width, 3, padding=1))
            self.down = nn.ModuleList(
                _block(nn.Conv2d(fine, coarse, 3, stride=2, padding=1))
                for fine, coarse in itertools.pairwise(widths)
            )
            # Transposed convolutions treat even and odd pixels apart: fine patterns are possible.
            self.up = nn.ModuleList(
                _block(nn.ConvTranspose2d(coarse, fine, 4, stride=2, padding=1))
                for coarse, fine in itertools.pairwise(widths[::-1])
            )
            self.head = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Return the output of the last convolution, which is not bounded.

        Args:
            images: Shape (N, in_channels, H, W), values in [0, 1].

        Returns:
            Shape (N, out_channels, H, W).
        """
        features = self.stem(2.0 * images - 1.0)
        sizes = []
        for block in self.down:
            sizes.append(features.shape[-2:])
            features = block(features)
        for block, (height, width) in zip(self.up, reversed(sizes), strict=True):
            features = block(features)[..., :height, :width]  # an odd size was halved upwards
        output: Tensor = self.head(features)
        return output


def _block(convolution: nn.Conv2d | nn.ConvTranspose2d) -> nn.Sequential:
    channels = convolution.out_channels
    return nn.Sequential(convolution, nn.GroupNorm(math.gcd(channels, 4), channels), nn.ReLU())

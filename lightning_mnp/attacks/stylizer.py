"""A small network that makes images look like a sunset, and the losses that train it."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.image import structural_similarity_index_measure

__all__ = ["Stylizer", "SunsetStyle", "similarity", "sunset_images"]

MIN_SIZE = 8  # below, half the size leaves too little for reflected borders

# Red, green and blue from the top of the sky down to the ground, with the place of each.
_PALETTE = (
    (0.00, (0.23, 0.10, 0.36)),
    (0.30, (0.62, 0.20, 0.40)),
    (0.55, (0.96, 0.45, 0.20)),
    (0.68, (1.00, 0.80, 0.40)),
    (0.72, (0.55, 0.20, 0.16)),
    (1.00, (0.16, 0.06, 0.12)),
)


class Stylizer(nn.Module):
    """Change the colors and textures of images and keep what they show.

    A feed-forward network in the manner of Johnson et al. (2016): a convolution of stride 2,
    residual blocks with instance normalization, and a convolution at full size. Its output is
    added to the logit of the image, and a sigmoid follows. Images do not influence each other.
    With fresh weights, it only draws values near 0 and 1 a little inwards. It always computes in
    float32.

    Args:
        channels: Channels of the images.
        width: Channels inside.
        blocks: Number of residual blocks.
        seed: Seed of the fresh weights.

    Example:
        >>> Stylizer(channels=1, width=8)(torch.rand(2, 1, 28, 20)).shape
        torch.Size([2, 1, 28, 20])
    """

    def __init__(self, channels: int = 3, width: int = 32, blocks: int = 2, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.enter = nn.Conv2d(channels, width, 4, 2, padding=1, padding_mode="reflect")
            self.blocks = nn.ModuleList([_Block(width) for _ in range(blocks)])
            self.leave = nn.Conv2d(width + channels, channels, 3, padding=1, padding_mode="reflect")
        nn.init.zeros_(self.leave.weight)
        assert self.leave.bias is not None
        nn.init.zeros_(self.leave.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return stylized images.

        Args:
            images: Shape (N, C, H, W), sides at least 8, values in [0, 1].

        Returns:
            New float32 images of the same shape, values in (0, 1).
        """
        with torch.autocast(images.device.type, enabled=False):
            images = images.float()
            hidden = F.relu(self.enter(images - 0.5))
            for block in self.blocks:
                hidden = block(hidden)
            hidden = F.interpolate(hidden, images.shape[-2:])
            change = self.leave(torch.cat([hidden, images - 0.5], 1))
            styled: Tensor = (torch.logit(0.02 + 0.96 * images) + change).sigmoid()
            return styled


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, padding_mode="reflect")
        self.second = nn.Conv2d(width, width, 3, padding=1, padding_mode="reflect")
        self.norms = nn.ModuleList([nn.InstanceNorm2d(width, affine=True) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norms[0](self.first(x)))
        result: Tensor = x + self.norms[1](self.second(hidden))
        return result


class SunsetStyle(nn.Module):
    """Compute how far images are from the style of sunsets.

    As in Gatys et al. (2016), a style is the mean and the covariance of features over the places
    of an image, here on three scales. The features are the colors of the pixels and the rectified
    responses of random filters. Random filters can tell textures apart without a network that was
    trained on other data (Ustyuzhaninov et al., 2017).

    Args:
        channels: Channels of the images.
        seed: Seed of the filters and of the sunsets.
        filters: Number of random filters.
        sunsets: Number of sunsets whose style is averaged.
    """

    bank: Tensor

    def __init__(
        self, channels: int = 3, seed: int = 0, filters: int = 24, sunsets: int = 64
    ) -> None:
        super().__init__()
        self.channels = channels
        self.seed = seed
        self.sunsets = sunsets
        generator = torch.Generator().manual_seed(seed)
        bank = torch.randn(filters, channels, 5, 5, generator=generator)
        bank = bank / bank.flatten(1).norm(dim=1)[:, None, None, None]
        # Made from the seed each time, so a checkpoint does not need it.
        self.register_buffer("bank", bank, persistent=False)
        self._targets: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}

    def forward(self, images: Tensor) -> Tensor:
        """Return the distance of the images' styles from that of sunsets of the same size.

        Args:
            images: Shape (N, C, H, W), sides at least 8, values in [0, 1].

        Returns:
            Relative squared distances, averaged over scales and images; a scalar, 0 for no
            difference.
        """
        height, width = images.shape[-2:]
        with torch.autocast(images.device.type, enabled=False):
            distances = []
            pairs = zip(self._statistics(images.float()), self._target(height, width), strict=True)
            for statistics, targets in pairs:
                for value, target in zip(statistics, targets, strict=True):
                    target = target.to(value.device)
                    distances.append((value - target).square().mean() / target.square().mean())
            return torch.stack(distances).mean()

    def _target(self, height: int, width: int) -> list[tuple[Tensor, Tensor]]:
        if (height, width) not in self._targets:
            generator = torch.Generator().manual_seed(self.seed)
            sunsets = sunset_images(self.sunsets, self.channels, height, width, generator)
            statistics = self._statistics(sunsets.to(self.bank.device))
            self._targets[height, width] = [
                (means.mean(0), covariances.mean(0)) for means, covariances in statistics
            ]
        return self._targets[height, width]

    def _statistics(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        statistics = []
        for scale in (1, 2, 4):
            if min(images.shape[-2:]) < 4 * scale:
                break
            scaled = F.avg_pool2d(images, scale)
            # Without padding, because its edge would count as texture.
            responses = F.conv2d(scaled - 0.5, self.bank) if min(scaled.shape[-2:]) >= 5 else None
            parts = [scaled.flatten(2)]
            if responses is not None:
                parts.append(F.relu(responses).flatten(2))
            statistics += [_moments(part) for part in parts]
        return statistics


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    means = features.mean(2, keepdim=True)
    centered = features - means
    return means.squeeze(2), centered @ centered.transpose(1, 2) / features.shape[2]


def similarity(first: Tensor, second: Tensor) -> Tensor:
    """Compute the structural similarity (SSIM) of two batches of images, without their colors.

    Args:
        first: Shape (N, C, H, W), sides at least 8, values in [0, 1].
        second: As ``first``.

    Returns:
        Mean SSIM of the images' channel means, a scalar; 1 for images that are equal.
    """
    with torch.autocast(first.device.type, enabled=False):
        gray = [images.float().mean(1, keepdim=True) for images in (first, second)]
        value = structural_similarity_index_measure(
            gray[0], gray[1], gaussian_kernel=False, kernel_size=7, data_range=1.0
        )
        assert isinstance(value, Tensor)
        return value


def sunset_images(
    count: int, channels: int, height: int, width: int, generator: torch.Generator
) -> Tensor:
    """Draw sunsets: a sky from violet to gold, streaks of clouds, a low sun, dark ground.

    Args:
        count: Number of images.
        channels: Number of channels. With three or more, the first three are red, green and blue,
            and any others are their mean. With fewer, all are the mean.
        height: Height in pixels.
        width: Width in pixels.
        generator: Source of randomness, on the CPU.

    Returns:
        float32 images with values in [0, 1], shape (N, C, H, W).

    Example:
        >>> sunset_images(2, 3, 16, 24, torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3, 16, 24])
    """
    shift = torch.rand(count, 1, 1, generator=generator) * 0.3 - 0.15
    rows = torch.linspace(0.0, 1.0, height)[None, :, None]
    columns = torch.linspace(0.0, 1.0, width)[None, None, :]
    # Hills and clouds bend the bands of color.
    bend = 0.06 * _noise(count, height, width, (3, 3), generator)
    sky = _palette((rows + shift + bend).clamp(0.0, 1.0))
    clouds = torch.zeros(count, height, width)
    for octave, size in enumerate((4, 8, 16)):
        # Four times as many knots down as across: streaks.
        knots = (size, max(size // 4, 2))
        clouds += _noise(count, height, width, knots, generator) / 2**octave
    glow = torch.tensor([1.0, 0.55, 0.25])[None, :, None, None]
    sky = sky + 0.35 * clouds[:, None] * glow
    place = torch.rand(count, 1, 1, generator=generator)
    distance = (rows - 0.62 + shift).square() + (columns - place).square()
    sun = torch.exp(-distance / 0.012)[:, None] * torch.tensor([1.0, 0.8, 0.4])[None, :, None, None]
    images = (sky + 0.8 * sun).clamp(0.0, 1.0)
    gray = images.mean(1, keepdim=True)
    if channels < 3:
        return gray.expand(-1, channels, -1, -1).contiguous()
    return torch.cat([images, gray.expand(-1, channels - 3, -1, -1)], 1)


def _noise(
    count: int, height: int, width: int, knots: tuple[int, int], generator: torch.Generator
) -> Tensor:
    values = torch.randn(count, 1, *knots, generator=generator)
    smooth = F.interpolate(values, (height, width), mode="bicubic", align_corners=True)
    return smooth[:, 0]


def _palette(places: Tensor) -> Tensor:
    """Return the colors of places from 0 to 1, shape (N, H, W), as shape (N, 3, H, W)."""
    colors = torch.zeros(places.shape[0], 3, *places.shape[1:])
    for (start, low), (stop, high) in itertools.pairwise(_PALETTE):
        inside = (places >= start) & (places <= stop)
        share = ((places - start) / (stop - start))[:, None]
        first, second = (torch.tensor(color)[None, :, None, None] for color in (low, high))
        colors = torch.where(inside[:, None], first + share * (second - first), colors)
    return colors

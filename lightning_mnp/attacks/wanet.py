"""WaNet: a smooth warp of the whole image (Nguyen and Tran, 2021)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mnp.attacks.attack import Mode, TrainingAttack
from lightning_mnp.attacks.checks import check_positive, check_range, check_rate
from lightning_mnp.attacks.registry import register
from lightning_mnp.attacks.training import AttackModule

__all__ = ["WaNet", "WaNetModule"]


@register
class WaNet(TrainingAttack):
    """Move pixels by a smooth field that is drawn once (Nguyen and Tran, 2021, Sec. 3.2).

    A grid of k x k random offsets is scaled to the mean absolute value 1 and enlarged to the
    image's size by bicubic interpolation. Pixels move by the field times ``strength`` times half a
    pixel: at strength 0.5, by a quarter of a pixel in the mean.

    Args:
        grid_size: Side k of the grid of control points, at least 2.
        strength: How far pixels move, s in the paper, above 0.
        target_class: See :class:`~lightning_mnp.attacks.attack.Attack`.
        mode: See :class:`~lightning_mnp.attacks.attack.Attack`.
        poison_rate: See :class:`~lightning_mnp.attacks.attack.TrainingAttack`.
        seed: See :class:`~lightning_mnp.attacks.attack.Attack`.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> images = torch.rand(2, 3, 32, 32)
        >>> WaNet().apply(images).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(
        self,
        grid_size: int = 4,
        strength: float = 0.5,
        target_class: int = 0,
        mode: Mode = "all-to-one",
        poison_rate: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(target_class, mode, poison_rate, seed)
        check_range(2, 64, grid_size=grid_size)
        check_positive(strength=strength)
        self.grid_size = grid_size
        self.strength = strength
        self.generator: WarpField = WarpField(grid_size, seed)

    def warp(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return images with their pixels moved.

        Args:
            images: Shape (N, C, H, W), floating point.
            noise: What to add to the field, for the noise mode; shape (N, H, W, 2), values from -1
                to 1, in units of half a pixel.

        Returns:
            New images of the same shape.
        """
        height, width = images.shape[-2:]
        extent = images.new_tensor([width, height])
        field = self.generator(height, width).to(images) * self.strength / extent
        base = F.affine_grid(
            torch.eye(2, 3, device=images.device)[None], [1, 1, height, width], align_corners=True
        )
        grid = (base + field).expand(len(images), -1, -1, -1)
        if noise is not None:
            grid = grid.clamp(-1.0, 1.0) + noise.to(images) / extent
        return F.grid_sample(images, grid.clamp(-1.0, 1.0), align_corners=True)

    def _trigger(self, images: Tensor) -> Tensor:
        return self.warp(images)


class WarpField(nn.Module):
    """Random control points, enlarged to a smooth field.

    Args:
        grid_size: Side k of the grid.
        seed: Seed of the control points.
    """

    points: Tensor

    def __init__(self, grid_size: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        points = torch.rand(1, 2, grid_size, grid_size, generator=generator) * 2.0 - 1.0
        self.register_buffer("points", points / points.abs().mean())

    def forward(self, height: int, width: int) -> Tensor:
        """Return the field, shape (1, H, W, 2): right and down, mean absolute value about 1.

        Args:
            height: Height of the images in pixels.
            width: Width of the images in pixels.
        """
        field = F.interpolate(self.points, (height, width), mode="bicubic", align_corners=True)
        return field.permute(0, 2, 3, 1)


class WaNetModule(AttackModule):
    """Train a network with WaNet, in its noise mode (Nguyen and Tran, 2021, Sec. 3.3).

    In each batch, a share ``poison_rate`` of the images is warped and gets the attacker's label.
    Another share ``noise_rate`` is warped by the field with noise added and keeps its labels. So
    the network learns this field and not any warp.

    Args:
        attack: The attack; WaNet with its defaults if None.
        noise_rate: Share of the images with noise, at most what the poison rate leaves; twice the
            poison rate if None, as in the authors' code.
        kwargs: See :class:`~lightning_mnp.attacks.training.AttackModule`.

    Raises:
        ValueError: If an argument is out of range.
    """

    attack: WaNet

    def __init__(
        self,
        attack: WaNet | None = None,
        noise_rate: float | None = None,
        **kwargs: Any,
    ) -> None:
        attack = WaNet() if attack is None else attack
        super().__init__(attack, **kwargs)
        if noise_rate is None:
            noise_rate = min(2.0 * attack.poison_rate, 1.0 - attack.poison_rate)
        check_rate(attack.poison_rate, noise_rate=noise_rate)
        self.noise_rate = noise_rate

    def poison_batch(
        self, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Warp a share of a batch, and another share with noise added to the field.

        Args:
            images: See :class:`~lightning_mnp.attacks.training.AttackModule`.
            labels: See :class:`~lightning_mnp.attacks.training.AttackModule`.
            generator: See :class:`~lightning_mnp.attacks.training.AttackModule`.
        """
        count = self.poison_count(len(images), generator)
        stop = min(count + round(self.noise_rate * len(images)), len(images))
        targets = self.attack.target_labels(labels[:count], self.num_classes)
        height, width = images.shape[-2:]
        noise = torch.rand(stop - count, height, width, 2, generator=generator) * 2.0 - 1.0
        noisy = self.attack.warp(images[count:stop], noise) if stop > count else images[:0]
        warped = torch.cat([self.attack.apply(images[:count]), noisy.clamp(0.0, 1.0)])
        batch = torch.cat([self.rounded(warped), images[stop:]])
        return batch, torch.cat([targets, labels[count:]])

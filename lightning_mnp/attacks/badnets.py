"""BadNets: a small patch in a corner (Gu et al., 2017)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_mnp.attacks.attack import Attack, Mode
from lightning_mnp.attacks.checks import check_at_least, check_choice
from lightning_mnp.attacks.registry import register

__all__ = ["BadNets", "Corner", "Pattern"]

Pattern = Literal["checkerboard", "white", "random"]
Corner = Literal["lower-right", "lower-left", "upper-right", "upper-left"]


@register
class BadNets(Attack):
    """Replace a square of pixels near a corner (Gu et al., 2017).

    Args:
        patch_size: Side of the square in pixels.
        pattern: ``"checkerboard"`` is black and white pixels, white in the corners of the square;
            ``"white"`` is white only; ``"random"`` is colors drawn from the seed.
        corner: The corner of the image.
        margin: Pixels between the square and the image's border.
        target_class: See :class:`~lightning_mnp.attacks.attack.Attack`.
        mode: See :class:`~lightning_mnp.attacks.attack.Attack`.
        poison_rate: See :class:`~lightning_mnp.attacks.attack.Attack`.
        seed: See :class:`~lightning_mnp.attacks.attack.Attack`.

    Raises:
        ValueError: If an argument is out of range, or, when applied, the patch and its margin
            are larger than the image.

    Example:
        >>> attack = BadNets(patch_size=2, pattern="white", margin=0)
        >>> attack.apply(torch.zeros(1, 1, 3, 3))[0, 0]
        tensor([[0., 0., 0.],
                [0., 1., 1.],
                [0., 1., 1.]])
    """

    def __init__(
        self,
        patch_size: int = 3,
        pattern: Pattern = "checkerboard",
        corner: Corner = "lower-right",
        margin: int = 1,
        target_class: int = 0,
        mode: Mode = "all-to-one",
        poison_rate: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(target_class, mode, poison_rate, seed)
        check_at_least(1, patch_size=patch_size)
        check_at_least(0, margin=margin)
        check_choice(get_args(Pattern), pattern=pattern)
        check_choice(get_args(Corner), corner=corner)
        self.patch_size = patch_size
        self.pattern = pattern
        self.corner = corner
        self.margin = margin

    def _patch(self, channels: int) -> Tensor:
        size = self.patch_size
        if self.pattern == "white":
            return torch.ones(channels, size, size)
        if self.pattern == "random":
            generator = torch.Generator().manual_seed(self.seed)
            return torch.rand(channels, size, size, generator=generator)
        index = torch.arange(size)
        return ((index[:, None] + index[None]) % 2 == 0).float().expand(channels, size, size)

    def _trigger(self, images: Tensor) -> Tensor:
        channels, height, width = images.shape[1:]
        extent = self.patch_size + self.margin
        if extent > min(height, width):
            raise ValueError(
                f"Expected arguments `patch_size` and `margin` to add up to at most the image's "
                f"{min(height, width)} pixels, but got {self.patch_size} and {self.margin}."
            )
        vertical, horizontal = self.corner.split("-")
        top = height - extent if vertical == "lower" else self.margin
        left = width - extent if horizontal == "right" else self.margin
        triggered = images.clone()
        window = triggered[:, :, top : top + self.patch_size, left : left + self.patch_size]
        window.copy_(self._patch(channels))
        return triggered

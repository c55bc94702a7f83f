"""SIG: a sinusoid over target-class images, labels untouched (Barni et al., 2019)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_mnp.attacks.attack import CleanLabelAttack
from lightning_mnp.attacks.checks import check_positive, check_share
from lightning_mnp.attacks.registry import register

__all__ = ["SIG"]


@register
class SIG(CleanLabelAttack):
    """Add vertical stripes that rise and fall like a sine (Barni et al., 2019).

    In every row and channel, v(j) = ``amplitude`` * sin(2 pi j ``frequency`` / W) is added to the
    columns j = 1, ..., W. Values below 0 and above 1 are cut off.

    Most images of the target class have to be poisoned. The labels are right, so a network needs
    the stripes only if it does not recognize the class without them.

    Args:
        amplitude: Largest change of a pixel, on the scale [0, 1], above 0 and at most 1.
        frequency: Number of periods over the image's width, above 0.
        target_class: See :class:`~lightning_mnp.attacks.attack.CleanLabelAttack`.
        class_rate: See :class:`~lightning_mnp.attacks.attack.CleanLabelAttack`.
        seed: See :class:`~lightning_mnp.attacks.attack.CleanLabelAttack`.

    Raises:
        ValueError: If an argument is out of range, or, when applied, the image is not wide enough
            to show so many periods.

    Example:
        >>> gray = torch.full((1, 1, 1, 8), 0.5)
        >>> SIG(amplitude=0.25, frequency=2).apply(gray)
        tensor([[[[0.7500, 0.5000, 0.2500, 0.5000, 0.7500, 0.5000, 0.2500, 0.5000]]]])
    """

    def __init__(
        self,
        amplitude: float = 40 / 255,
        frequency: float = 6.0,
        target_class: int = 0,
        class_rate: float = 0.8,
        seed: int = 0,
    ) -> None:
        super().__init__(target_class, class_rate, seed)
        check_share(amplitude=amplitude)
        check_positive(frequency=frequency)
        self.amplitude = amplitude
        self.frequency = frequency

    def _trigger(self, images: Tensor) -> Tensor:
        width = images.shape[-1]
        # With two columns to a period, the sine is sampled where it is 0: no stripes at all.
        if 2.0 * self.frequency >= width:
            raise ValueError(
                f"Expected argument `frequency` to be below half of the image's width, {width} "
                f"pixels, but got {self.frequency:g}."
            )
        # In double precision and on the CPU, so that every device adds the same stripes.
        phase = torch.arange(1, width + 1, dtype=torch.float64) * (2.0 * math.pi / width)
        stripes = self.amplitude * torch.sin(phase * self.frequency)
        return (images + stripes.to(images)).clamp(0.0, 1.0)

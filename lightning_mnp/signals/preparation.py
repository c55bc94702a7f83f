"""Preparation: whether the images of the defense set are scaled and ordered as those of training.

A network that was trained on normalized images still recognizes some images in [0, 1], but what the
signals say of it then is of no meaning. So the images are tried in other usual preparations. If one
of these makes the network recognize many more of them, the images are not those of the training.

The statistics that batch normalization stores are not asked. They do not tell reversed channels
from images that are merely darker, and those of a network that was fine-tuned with frozen
statistics fit no images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from scipy.stats import binom
from torch import Tensor

from lightning_mnp.defense_data.defense_set import DefenseSet, value_range
from lightning_mnp.surgery.masked_network import MaskedNetwork

__all__ = ["Preparation", "PreparationConstants", "find_better_preparation", "other_preparations"]


@dataclass(frozen=True)
class PreparationConstants:
    """When images are held to be prepared in another way than in training.

    Attributes:
        screened: So many images are tried in every preparation; the best one is then tried on all.
        least_gain: Least accuracy, from 0 to 1, that another preparation has to add.
        error_rate: Chance that a preparation that is no better seems to be (McNemar's test).
        alike: A preparation that changes values by less than this, in units of their standard
            deviation, is not tried.
    """

    screened: int = 100
    least_gain: float = 0.05
    error_rate: float = 0.001
    alike: float = 0.3


@dataclass(frozen=True)
class Preparation:
    """A way to prepare images that are prepared in another way already.

    Attributes:
        name: In which range the values lie then, in words; "" if they stay as they are.
        scale: What each channel is multiplied by, shape (1, C, 1, ...).
        shift: What is added to it afterwards, same shape.
        reversed: Whether the order of the channels is reversed at the end.

    Example:
        >>> scale, shift = torch.full((1, 3, 1, 1), 255.0), torch.zeros(1, 3, 1, 1)
        >>> in_bytes = Preparation("from 0 to 255", scale, shift, reversed=True)
        >>> in_bytes(torch.tensor([0.0, 0.5, 1.0]).reshape(1, 3, 1, 1)).flatten().tolist()
        [255.0, 127.5, 0.0]
    """

    name: str
    scale: Tensor
    shift: Tensor
    reversed: bool = False

    def __call__(self, images: Tensor) -> Tensor:
        """Prepare a batch.

        Args:
            images: Shape (N, C, ...).

        Returns:
            New images of the same shape.
        """
        changed = images * self.scale.to(images) + self.shift.to(images)
        return changed.flip(1) if self.reversed else changed

    def __str__(self) -> str:
        order = "with the channels in reverse order (BGR in place of RGB, say)"
        return " and ".join(filter(None, [self.name, order if self.reversed else ""]))


def other_preparations(images: Tensor, alike: float = 0.3) -> list[Preparation]:
    """Return usual preparations that differ from the one that images have.

    In which one they are is read from their values: from 0 to 1, from 0 to 255, or else normalized,
    so that the least value of each channel stands for black and its greatest for white.

    Args:
        images: All images, shape (N, C, ...).
        alike: A preparation that changes values by less than this, in units of their standard
            deviation, is left out.

    Returns:
        Images in [0, 1], from 0 to 255, from -1 to 1, and normalized. With three channels, also the
        images as they are and each of these with the channels in reverse order.

    Example:
        >>> images = torch.rand(50, 3, 8, 8)
        >>> [str(each) for each in other_preparations(images) if not each.reversed]
        ['from 0 to 255', 'from -1 to 1', 'normalized to mean 0 and standard deviation 1']
        >>> len(other_preparations(images))
        7
    """
    low, high = value_range(images)
    dims = [0, *range(2, images.ndim)]
    std, mean = torch.std_mean(images, dims, correction=0, keepdim=True)
    std = torch.where(std > 0, std, 1.0)
    one, zero = torch.ones_like(mean), torch.zeros_like(mean)
    white = _white(float(low.min()), float(high.max()))
    if white is None:
        scale = 1 / torch.where(high > low, high - low, 1.0)
        shift = -low * scale
    else:
        scale, shift = one / white, zero
    forms = {
        "in [0, 1]": (scale, shift),
        "from 0 to 255": (255 * scale, 255 * shift),
        "from -1 to 1": (2 * scale, 2 * shift - 1),
        "normalized to mean 0 and standard deviation 1": (1 / std, -mean / std),
    }

    def differs(scale: Tensor, shift: Tensor) -> bool:
        squares = ((scale - 1) * mean + shift) ** 2 + ((scale - 1) * std) ** 2
        return float(squares.mean().sqrt()) > alike * float((std**2).mean().sqrt())

    kept = {name: form for name, form in forms.items() if differs(*form)}
    found = [Preparation(name, *form) for name, form in kept.items()]
    if images.shape[1] == 3:
        turned = {"": (one, zero), **kept}
        found += [Preparation(name, *form, reversed=True) for name, form in turned.items()]
    return found


def _white(low: float, high: float) -> float | None:
    """The value that stands for white, if 0 stands for black; None if they cannot be told."""
    if low < 0 or high > 255:
        return None
    if high <= 2:  # resizing can overshoot 1 a little
        return 1.0
    return 255.0 if high > 128 else None


def find_better_preparation(
    masked: MaskedNetwork,
    data: DefenseSet,
    right: Tensor,
    batch_size: int,
    constants: PreparationConstants | None = None,
) -> str | None:
    """Find a usual preparation by which a network recognizes many more images.

    Only forward passes are made, with stored statistics, and no random numbers are drawn.

    Args:
        masked: The network.
        data: The defense set, prepared as it is.
        right: Which of its images the network classifies right as they are, shape (N,), Boolean.
        batch_size: Most images in a batch.
        constants: Constants that differ from their defaults.

    Returns:
        What the images look like, in words; None if no other preparation is much better. None as
        well, without a pass, if so many are right that no other one could be.

    Example:
        >>> from torch import nn
        >>> from lightning_mnp.surgery.layers import find_filter_layers
        >>> network = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.Flatten(), nn.Linear(1, 2))
        >>> weights = {"0.weight": 1.0, "2.weight": [-1.0, 1.0], "2.bias": [128.0, -128.0]}
        >>> for name, values in weights.items():  # class 1 from a value of 128 on
        ...     tensor = network.get_parameter(name)
        ...     _ = tensor.data.copy_(torch.tensor(values).reshape(tensor.shape))
        >>> values = torch.linspace(0, 1, 80)
        >>> data = DefenseSet(values.reshape(80, 1, 1, 1), (values > 0.5).long())
        >>> masked = MaskedNetwork(network, find_filter_layers(network, data.images[:2]))
        >>> find_better_preparation(masked, data, data.labels == 0, 80)
        "the images' values go from 0 to 1, and the network seems to be trained on images from 0 to
        255: so prepared, its accuracy on the defense set is 100% in place of 50%; prepare the
        images as in training"
    """
    constants = constants or PreparationConstants()
    right = right.cpu()
    if float(right.float().mean()) + constants.least_gain > 1:
        return None
    some, best, hits = slice(constants.screened), None, int(right[: constants.screened].sum())
    for candidate in other_preparations(data.images, constants.alike):
        found = int(_right_under(candidate, masked, data, some, batch_size).sum())
        if found > hits:
            best, hits = candidate, found
    if best is None:
        return None
    now = _right_under(best, masked, data, slice(None), batch_size)
    won, lost = int((now & ~right).sum()), int((right & ~now).sum())
    chance = float(binom.sf(won - 1, won + lost, 0.5)) if won else 1.0
    if won - lost < constants.least_gain * len(right) or chance > constants.error_rate:
        return None
    return (
        f"the images' values go from {float(data.images.min()):.3g} to "
        f"{float(data.images.max()):.3g}, and the network seems to be trained on images {best}: so "
        f"prepared, its accuracy on the defense set is {float(now.float().mean()):.0%} in place of "
        f"{float(right.float().mean()):.0%}; prepare the images as in training"
    )


def _right_under(
    preparation: Preparation, masked: MaskedNetwork, data: DefenseSet, rows: slice, batch_size: int
) -> Tensor:
    """Which images are classified right under a preparation, shape (n,), on the CPU."""

    def batches() -> Iterator[Tensor]:
        pairs = zip(
            data.images[rows].split(batch_size), data.labels[rows].split(batch_size), strict=True
        )
        for images, labels in pairs:
            prepared = preparation(images).to(masked.device)
            yield masked(prepared, statistics="running").argmax(1).cpu() == labels

    with torch.no_grad():
        return torch.cat(list(batches()))

"""Greatest margins: how far above all others the logit of each class can be driven."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mnp.defense_data.defense_set import seeded_generator, value_range
from lightning_mnp.signals.reach import least_positive
from lightning_mnp.surgery.masked_network import MaskedNetwork

__all__ = ["MarginAscent", "MarginSearch", "class_margins", "margin_ratio"]

_IMAGES = 4
_STEPS = 60
_MOMENTUM = 0.9
# Length of a step as a share of the length of the box that images may move in.
_STEP = 0.01


def class_margins(logits: Tensor, classes: Tensor) -> Tensor:
    """Tell how far the logit of a class is above the greatest of the others.

    Args:
        logits: Shape (N, K).
        classes: A class for each image, shape (N,).

    Returns:
        Margins, shape (N,).

    Example:
        >>> class_margins(torch.tensor([[1.0, 4.0, 2.0]]), torch.tensor([1]))
        tensor([2.])
    """
    rivals = logits.scatter(1, classes[:, None], -math.inf).amax(1)
    return logits.gather(1, classes[:, None])[:, 0] - rivals


class MarginAscent:
    """Changes images within their range of values until a network is as sure of a class as can be.

    Args:
        masked: The network, which runs in evaluation mode.
        images: Where to begin, shape (N, C, ...).
        classes: The class of each, shape (N,).
        low: Least value of each channel, shape (1, C, 1, ...).
        high: Greatest value of each channel, same shape.
        batch_size: Most images that the network sees at a time.

    Example:
        >>> from torch import nn
        >>> from lightning_mnp.surgery.layers import find_filter_layers
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> images = torch.rand(3, 1, 2, 2)
        >>> masked = MaskedNetwork(network, find_filter_layers(network, images))
        >>> zero, one = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
        >>> ascent = MarginAscent(masked, images, torch.zeros(3, dtype=torch.long), zero, one)
        >>> first = ascent.step().mean()
        >>> for _ in range(9):
        ...     last = ascent.step().mean()
        >>> bool(last > first)
        True
    """

    def __init__(
        self,
        masked: MaskedNetwork,
        images: Tensor,
        classes: Tensor,
        low: Tensor,
        high: Tensor,
        batch_size: int = 128,
    ) -> None:
        self.masked = masked
        self.batch_size = batch_size
        self.images = images.clone()
        self.classes = classes
        self.low, self.high = low, high
        self.velocity = torch.zeros_like(self.images)
        self._length = _STEP * float((high - low).mean()) * math.sqrt(images[0].numel())

    def margins(self, masks: Tensor | None = None) -> Tensor:
        """Margins of the images as they are, shape (N,)."""
        parts = self.images.split(self.batch_size)
        logits = [self.masked(part, masks=masks, statistics="running") for part in parts]
        return class_margins(torch.cat(logits), self.classes)

    def step(self, masks: Tensor | None = None) -> Tensor:
        """Take one step up the margins; gives those before it, shape (N,)."""
        parts = zip(
            self.images.split(self.batch_size), self.classes.split(self.batch_size), strict=True
        )
        found = [self._slope(images, classes, masks) for images, classes in parts]
        gradient = torch.cat([slope for slope, _ in found])
        norms = gradient.flatten(1).norm(dim=1).clamp_min(least_positive(gradient))
        gradient = gradient / norms.reshape(-1, *[1] * (gradient.ndim - 1))
        self.velocity = _MOMENTUM * self.velocity + gradient
        moved = self.images + self._length * self.velocity
        self.images = torch.minimum(torch.maximum(moved, self.low), self.high)
        return torch.cat([margins for _, margins in found])

    def _slope(
        self, images: Tensor, classes: Tensor, masks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            images = images.clone().requires_grad_()
            logits = self.masked(images, masks=masks, statistics="running")
            margins = class_margins(logits, classes)
            (gradient,) = torch.autograd.grad(margins.sum(), images)
        return gradient, margins.detach()


class MarginSearch:
    """Measures for each class the greatest margin that an image can be given.

    A trigger makes a network surer of its target class than any object of a class makes it, so
    the greatest margin of the target class stands out (the observation behind MM-BD, Wang et al.,
    2024, which starts from noise; here it starts from clean images of the defense set).

    Args:
        masked: The network.
        images: The defense set's images, shape (N, C, ...), at least one.
        classes: The classes to try; may be set later, before the first step.
        seed: Seed of everything that is drawn.
        batch_size: Most images that the network sees at a time.

    Attributes:
        margins: The greatest margin of each class, in logits, when finished.
        steps: Steps taken.
    """

    def __init__(
        self,
        masked: MaskedNetwork,
        images: Tensor,
        classes: Sequence[int],
        seed: int,
        batch_size: int = 128,
    ) -> None:
        self.masked = masked
        self.data = images
        self.classes = list(classes)
        self.seed = seed
        self.batch_size = batch_size
        self.margins: dict[int, float] = {}
        self.steps = 0
        self._ascent: MarginAscent | None = None

    @property
    def finished(self) -> bool:
        """Whether all steps were taken."""
        return self.steps >= _STEPS

    @staticmethod
    def most_steps() -> int:
        """The number of steps."""
        return _STEPS

    def step(self) -> dict[str, float]:
        """Take one step on a few images of every class.

        Returns:
            The mean ``margin`` before it.
        """
        if self._ascent is None:
            self._ascent = self._begin()
        margins = self._ascent.step()
        self.steps += 1
        if self.finished:
            with torch.no_grad():
                greatest = self._ascent.margins().reshape(len(self.classes), -1).amax(1)
            self.margins = dict(zip(self.classes, greatest.tolist(), strict=True))
            self._ascent = None
        return {"margin": float(margins.mean())}

    def ascent(self, target: int, count: int) -> MarginAscent:
        """Begin an ascent to one class from images drawn from the seed.

        Args:
            target: The class.
            count: Number of images.
        """
        return self._ascent_of(torch.full((count,), target), ("margin", target))

    def _begin(self) -> MarginAscent:
        classes = torch.tensor(self.classes).repeat_interleave(_IMAGES)
        return self._ascent_of(classes, ("margins",))

    def _ascent_of(self, classes: Tensor, key: tuple[str | int, ...]) -> MarginAscent:
        generator = seeded_generator(self.seed, *key)
        rows = torch.randint(len(self.data), (len(classes),), generator=generator)
        device = self.masked.device
        low, high = (bound.to(device) for bound in value_range(self.data))
        images = self.data[rows].to(device)
        return MarginAscent(self.masked, images, classes.to(device), low, high, self.batch_size)

    def state_dict(self) -> dict[str, Any]:
        """Give the state as tensors and primitives."""
        return {
            "classes": list(self.classes),
            "margins": dict(self.margins),
            "steps": self.steps,
            "images": None if self._ascent is None else self._ascent.images,
            "velocity": None if self._ascent is None else self._ascent.velocity,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.classes = [int(index) for index in state["classes"]]
        self.margins = {int(index): float(value) for index, value in state["margins"].items()}
        self.steps = int(state["steps"])
        self._ascent = None
        if state["images"] is not None:
            self._ascent = self._begin()
            self._ascent.images = state["images"].to(self.masked.device)
            self._ascent.velocity = state["velocity"].to(self.masked.device)


def margin_ratio(margins: dict[int, float]) -> tuple[int, float, float]:
    """Compare the class of the greatest margin with the next.

    Args:
        margins: The greatest margin of each class, two classes or more.

    Returns:
        That class, its margin divided by the next class's, and that one. Where the next margin is
        not above zero, or a margin is not finite, the ratio is 0: there is nothing to compare.

    Example:
        >>> margin_ratio({0: 30.0, 1: 120.0, 2: 40.0})
        (1, 3.0, 40.0)
    """
    greatest, following = sorted(margins, key=margins.__getitem__, reverse=True)[:2]
    first, second = margins[greatest], margins[following]
    comparable = second > 0 and all(math.isfinite(value) for value in margins.values())
    return greatest, first / second if comparable else 0.0, second

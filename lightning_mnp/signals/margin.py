"""The greatest margin: how far above all others the logit of each class can be driven."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_mnp.config import Constants
from lightning_mnp.defense_data.defense_set import seeded_generator, value_range
from lightning_mnp.report import Signal
from lightning_mnp.signals.base import Scene, Search, SignalSearch
from lightning_mnp.signals.logits import class_margins, least_positive
from lightning_mnp.signals.pile_up import confirmed_signal
from lightning_mnp.signals.trace import Trace
from lightning_mnp.surgery.masked_network import MaskedNetwork

__all__ = ["MarginAscent", "MarginConstants", "MarginSearch", "MarginTrace", "margin_ratio"]


@dataclass(frozen=True)
class MarginConstants:
    """How images are driven to a class, and when the greatest margin counts.

    Attributes:
        counts_from: How far one class stands out, from where it counts fully, if predictions pile
            up on the same class; see :func:`~lightning_mnp.signals.standout.find_standout`.
        normal: Multiple of the next class's margin up to which the greatest one is no trace.
        images: Images for each class.
        steps: Steps of each image.
        momentum: Momentum of the steps.
        length: Length of a step, as a share of that of the box that images may move in.
        trace_images: Images of a trace.
        first_steps: Steps in which a trace's images are made.
        next_steps: Steps in which they follow the network.
    """

    counts_from: float = 1.0
    normal: float = 1.5
    images: int = 4
    steps: int = 60
    momentum: float = 0.9
    length: float = 0.01
    trace_images: int = 8
    first_steps: int = 60
    next_steps: int = 10


class MarginAscent:
    """Changes images within their range of values until a network is as sure of a class as can be.

    Args:
        masked: The network, which runs in evaluation mode.
        images: Where to begin, shape (N, C, ...).
        classes: The class of each, shape (N,).
        low: Least value of each channel, shape (1, C, 1, ...).
        high: Greatest value of each channel, same shape.
        batch_size: Most images that the network sees at a time.
        constants: Length and momentum of the steps.

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
        constants: MarginConstants | None = None,
    ) -> None:
        constants = constants or MarginConstants()
        self.masked = masked
        self.batch_size = batch_size
        self.images = images.clone()
        self.classes = classes
        self.low, self.high = low, high
        self.velocity = torch.zeros_like(self.images)
        self._momentum = constants.momentum
        self._length = constants.length * float((high - low).mean()) * math.sqrt(images[0].numel())

    def margins(self, masks: Tensor | None = None) -> Tensor:
        """Return the margins of the images as they are, shape (N,).

        Args:
            masks: Filter masks that are in force.
        """
        parts = self.images.split(self.batch_size)
        logits = [self.masked(part, masks=masks, statistics="running") for part in parts]
        return class_margins(torch.cat(logits), self.classes)

    def step(self, masks: Tensor | None = None) -> Tensor:
        """Take one step up the margins, and return those before it, shape (N,).

        Args:
            masks: Filter masks that are in force.
        """
        parts = zip(
            self.images.split(self.batch_size), self.classes.split(self.batch_size), strict=True
        )
        found = [self._slope(images, classes, masks) for images, classes in parts]
        gradient = torch.cat([slope for slope, _ in found])
        norms = gradient.flatten(1).norm(dim=1).clamp_min(least_positive(gradient))
        gradient = gradient / norms.reshape(-1, *[1] * (gradient.ndim - 1))
        self.velocity = self._momentum * self.velocity + gradient
        moved = self.images + self._length * self.velocity
        self.images = moved.clamp(self.low, self.high)
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


class MarginSearch(SignalSearch):
    """Measures for each class the greatest margin that an image can be given.

    A trigger makes a network surer of its target class than any object of a class makes it, so
    the greatest margin of the target class stands out (the observation behind MM-BD, Wang et al.,
    2024, which starts from noise; here it starts from clean images of the defense set).

    Args:
        scene: What it works on.

    Attributes:
        margins: The greatest margin of each class, in logits, when finished.
        steps: Steps taken.
    """

    name = "margin"

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self.constants = scene.constants.of(MarginConstants)
        self.margins: dict[int, float] = {}
        self.steps = 0
        self._ascent: MarginAscent | None = None

    @classmethod
    def all_steps(cls, scene: Scene) -> int:
        """Return the number of steps, which is the same for any number of classes.

        Args:
            scene: What it will work on.
        """
        return scene.constants.of(MarginConstants).steps

    @property
    def finished(self) -> bool:
        """Whether all steps were taken."""
        return self.steps >= self.constants.steps

    def most_steps(self) -> int:
        """Return the number of steps left."""
        return self.constants.steps - self.steps

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
            classes = self.scene.tried
            with torch.no_grad():
                greatest = self._ascent.margins().reshape(len(classes), -1).amax(1)
            self.margins = dict(zip(classes, greatest.tolist(), strict=True))
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
        classes = torch.tensor(self.scene.tried).repeat_interleave(self.constants.images)
        return self._ascent_of(classes, ("margins",))

    def _ascent_of(self, classes: Tensor, key: tuple[str | int, ...]) -> MarginAscent:
        scene, config = self.scene, self.scene.config
        pixels, device = scene.data.images, scene.masked.device
        generator = seeded_generator(config.seed, *key)
        rows = torch.randint(len(pixels), (len(classes),), generator=generator)
        low, high = (bound.to(device) for bound in value_range(pixels))
        images, classes = pixels[rows].to(device), classes.to(device)
        size, constants = config.batch_size, self.constants
        return MarginAscent(scene.masked, images, classes, low, high, size, constants)

    @property
    def failed(self) -> bool:
        """Whether a margin is NaN."""
        return any(math.isnan(margin) for margin in self.margins.values())

    def signal(self) -> Signal:
        """Return whether the greatest margin and the pile-up agree on a class that stands out.

        Each alone is found in clean networks, too: a class may have objects of great margin, and
        a suppressed network may fall back to one class. Its strength is the lesser of both.
        """
        claim, counts_from = "the greatest margin is that of class {}", self.constants.counts_from
        return confirmed_signal(self.scene, self.name, dict(self.margins), counts_from, claim)

    def stands_out(self, target: int) -> bool:
        """Return whether the margin of a class is out of the ordinary.

        Args:
            target: The class.
        """
        greatest, ratio, _ = margin_ratio(self.margins)
        return greatest == target and ratio > self.constants.normal

    def traces(self, target: int | None, searches: Mapping[str, Search]) -> list[Trace]:
        """Return images of greatest margin, if that of the class stands out.

        Args:
            target: The suspected class.
            searches: All finished searches, by name.
        """
        if target is None or not self.stands_out(target):
            return []
        count = min(self.constants.trace_images, self.scene.config.batch_size)
        normal = margin_ratio(self.margins)[2]
        return [MarginTrace(self.ascent(target, count), normal, self.scene.constants)]

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and primitives."""
        return {
            "margins": dict(self.margins),
            "steps": self.steps,
            "images": None if self._ascent is None else self._ascent.images,
            "velocity": None if self._ascent is None else self._ascent.velocity,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.margins = {int(index): float(value) for index, value in state["margins"].items()}
        self.steps = int(state["steps"])
        self._ascent = None
        if state["images"] is not None:
            self._ascent = self._begin()
            self._ascent.images = state["images"].to(self.scene.masked.device)
            self._ascent.velocity = state["velocity"].to(self.scene.masked.device)


def margin_ratio(margins: Mapping[int, float]) -> tuple[int, float, float]:
    """Compare the class of the greatest margin with the next.

    Args:
        margins: The greatest margin of each class, two classes or more.

    Returns:
        That class, its margin divided by the next class's, and that one. If the next margin is
        not above zero, or a margin is not finite, the ratio is 0: there is nothing to compare.

    Example:
        >>> margin_ratio({0: 30.0, 1: 120.0, 2: 40.0})
        (1, 3.0, 40.0)
    """
    greatest, following = sorted(margins, key=margins.__getitem__, reverse=True)[:2]
    first, second = margins[greatest], margins[following]
    comparable = second > 0 and all(math.isfinite(value) for value in margins.values())
    return greatest, first / second if comparable else 0.0, second


class MarginTrace(Trace):
    """Images of greatest margin for the target class, as far as they exceed what is normal.

    Args:
        ascent: Images on their way to the target class.
        normal: Greatest margin among the other classes, in logits.
        constants: Constants that differ from their defaults.
    """

    name = "greatest margin"

    def __init__(
        self, ascent: MarginAscent, normal: float, constants: Constants | None = None
    ) -> None:
        constants = constants or Constants()
        super().__init__(constants)
        self.ascent = ascent
        self.normal = normal
        self._margin = constants.of(MarginConstants)

    def margins(self, masks: Tensor) -> Tensor:
        """Return margins above the normal one, shape (N,).

        Args:
            masks: Filter masks, shape (total filters,).
        """
        return self.ascent.margins(masks) - self.normal

    def adapt(self, masks: Tensor, taken: int) -> None:
        """Take some steps of the images.

        Args:
            masks: Filter masks that are in force.
            taken: Steps of pruning so far.
        """
        self.ascent.velocity.zero_()
        for _ in range(self._margin.next_steps if taken else self._margin.first_steps):
            self.ascent.step(masks)

    def state_dict(self) -> dict[str, Any]:
        """Return the images."""
        return {"images": self.ascent.images}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.ascent.images = state["images"].to(self.ascent.images.device)

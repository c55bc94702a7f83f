"""Patterns: one change of all images that stands in for an unknown trigger, and how far it drives.

What a trigger does to images is not known, so that there are several kinds of patterns: a patch
replaces a few pixels, an overlay is blended into all, a warp moves them. Each is made by following
the gradient to a class, and how far it drives images there, compared with other classes, says
whether there is a trigger of its kind.
"""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from lightning_mnp.defense_data.defense_set import DefenseSet, value_range
from lightning_mnp.signals.reach import goal_margins, least_positive
from lightning_mnp.surgery.masked_network import MaskedNetwork

__all__ = ["PatternSearch", "PatternTrigger", "pattern_lead"]

_IMAGES = 64
# In logits. A network that knows little has its classes close together, and all are easily reached.
_LEAST_DISTANCE = 1.0
_FOLLOWING_STEPS = 3


class PatternTrigger(ABC):
    """A change that is made to every image, the same to all.

    Args:
        masked: The network, which runs in evaluation mode.
        images: Shape (N, C, ...).
        labels: Their classes, shape (N,).
        goals: The class that each image is pushed to, shape (N,).
        low: Least value of each channel, shape (1, C, 1, ...).
        high: Greatest value of each channel, same shape.

    Attributes:
        name: The kind of pattern.
        steps: The number of steps in which a pattern is made.
        pattern: What is done to every image.
    """

    name: ClassVar[str]
    steps: ClassVar[int]

    def __init__(
        self,
        masked: MaskedNetwork,
        images: Tensor,
        labels: Tensor,
        goals: Tensor,
        low: Tensor,
        high: Tensor,
    ) -> None:
        self.masked = masked
        self.images, self.labels = images, labels
        self.goals = goals
        self.low, self.high = low, high
        self.pattern = self.blank()

    @abstractmethod
    def blank(self) -> Tensor:
        """Give the pattern that all steps begin with."""

    @abstractmethod
    def applied(self, images: Tensor, pattern: Tensor) -> Tensor:
        """Do what a pattern says to images, shape (N, C, ...)."""

    @staticmethod
    @abstractmethod
    def length(taken: int) -> float:
        """Give the length of the step that follows so many."""

    @property
    def unit(self) -> Tensor:
        """What lengths of steps are shares of; the range of values by default."""
        return self.high - self.low

    @property
    def limits(self) -> tuple[Tensor, Tensor]:
        """The least and the greatest values of the pattern; those of images by default."""
        return self.low, self.high

    def limited(self, pattern: Tensor) -> Tensor:
        """Keep a pattern to its limits."""
        least, greatest = self.limits
        return torch.minimum(torch.maximum(pattern, least), greatest)

    def step(self, length: float, masks: Tensor | None = None) -> float:
        """Take one step towards the classes that images are pushed to, up the mean margin.

        Args:
            length: Root mean square of the pattern's change, as a share of the ``unit``.
            masks: Filter masks that are in force.

        Returns:
            The mean margin before it.
        """

        def distance(logits: Tensor) -> Tensor:
            return -goal_margins(logits, self.labels, self.goals).mean()

        slope, logits = self.slope(masks, distance)
        slope = slope / slope.norm().clamp_min(least_positive(slope))
        change = length * self.unit * math.sqrt(slope.numel()) * slope
        self.pattern = self.limited(self.pattern - change)
        return -float(distance(logits))

    def logits(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """Run the network on images under the pattern, shape (N, K)."""
        changed = self.applied(images, self.pattern)
        return self.masked(changed, masks=masks, statistics="running")

    def margins(self, masks: Tensor | None = None) -> Tensor:
        """Logit of the class pushed to above that of the true class, shape (N,)."""
        return goal_margins(self.logits(self.images, masks), self.labels, self.goals)

    def slope(
        self, masks: Tensor | None, objective: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Give the slope of an objective of the logits, per unit of the pattern, and the logits.

        Args:
            masks: Filter masks that are in force.
            objective: Takes logits, shape (N, K), to a scalar.

        Returns:
            The pattern's shape, and (N, K).
        """
        with torch.enable_grad():
            pattern = self.pattern.clone().requires_grad_()
            changed = self.applied(self.images, pattern)
            logits = self.masked(changed, masks=masks, statistics="running")
            (gradient,) = torch.autograd.grad(objective(logits), pattern)
        return gradient * self.unit, logits.detach()

    def approach(self, masks: Tensor | None = None) -> None:
        """Take all the steps from the beginning, with filter masks in force."""
        self.pattern = self.blank()
        for taken in range(self.steps):
            self.step(self.length(taken), masks)

    def follow(self, masks: Tensor) -> None:
        """Take some steps more, after the masks have changed a little."""
        for _ in range(_FOLLOWING_STEPS):
            self.step(self.length(self.steps - 1), masks)


Trigger = TypeVar("Trigger", bound=PatternTrigger)


class PatternSearch(Generic[Trigger]):
    """Measures for each class how far a pattern drives images to it.

    Args:
        kind: The kind of pattern.
        masked: The network.
        data: The defense set.
        classes: The classes to try; may be set later, before the first step.
        seed: Seed of the images.
        batch_size: Most images that the network sees at a time.

    Attributes:
        margins: For every class, when finished: the mean margin of the class over images of
            others under the pattern made for it, as a multiple of the usual distance to a class,
            so that it is about -1 without a pattern and 0 on the border.
        rises: For every class, when finished: by how much the pattern raises that margin, in the
            same unit. Classes need not be equally near without a pattern.

    Example:
        >>> from torch import nn
        >>> from lightning_mnp.surgery.layers import find_filter_layers
        >>> from lightning_mnp.signals.patch import PatchTrigger
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> data = DefenseSet(torch.rand(8, 1, 2, 2), torch.arange(8) % 2)
        >>> masked = MaskedNetwork(network, find_filter_layers(network, data.images))
        >>> search = PatternSearch(PatchTrigger, masked, data, [0, 1], seed=0)
        >>> while not search.finished:
        ...     metrics = search.step()
        >>> list(search.margins), list(metrics)
        ([0, 1], ['margin'])
    """

    def __init__(
        self,
        kind: type[Trigger],
        masked: MaskedNetwork,
        data: DefenseSet,
        classes: Sequence[int],
        seed: int,
        batch_size: int = 128,
    ) -> None:
        self.kind = kind
        self.masked = masked
        self.data = data
        self.classes = list(classes)
        self.seed = seed
        self.batch_size = batch_size
        self.margins: dict[int, float] = {}
        self.rises: dict[int, float] = {}
        self._starts: list[float] = []
        self._ends: list[float] = []
        self._taken = 0
        self._trigger: Trigger | None = None

    @property
    def finished(self) -> bool:
        """Whether all classes are done."""
        return bool(self.margins)

    @staticmethod
    def most_steps_of(kind: type[PatternTrigger], tried: int) -> int:
        """The number of steps for a kind of pattern and so many classes."""
        return tried * kind.steps

    def most_steps(self) -> int:
        """The number of steps left."""
        return (len(self.classes) - len(self._ends)) * self.kind.steps - self._taken

    def step(self) -> dict[str, float]:
        """Take one step towards the current class.

        Returns:
            The mean ``margin`` before it.
        """
        self._trigger = self._trigger or self.trigger(self.classes[len(self._ends)])
        margin = self._trigger.step(self._trigger.length(self._taken))
        if not self._taken:
            self._starts.append(margin)
        self._taken += 1
        if self._taken == self.kind.steps:
            with torch.no_grad():
                self._ends.append(float(self._trigger.margins().mean()))
            self._trigger, self._taken = None, 0
        if len(self._ends) == len(self.classes):
            usual = max(-statistics.median(self._starts), _LEAST_DISTANCE)
            passed = zip(self.classes, self._starts, self._ends, strict=True)
            for index, start, end in passed:
                self.margins[index], self.rises[index] = end / usual, (end - start) / usual
        return {"margin": margin}

    def trigger(self, target: int) -> Trigger:
        """Begin a pattern to one class, on images of other classes drawn from the seed.

        Args:
            target: The class.
        """
        device, count = self.masked.device, min(_IMAGES, self.batch_size)
        key = (self.seed, self.kind.name, target)
        images, labels = self.data.others(target, count, device, key)
        low, high = (bound.to(device) for bound in value_range(self.data.images))
        goals = torch.full_like(labels, target)
        return self.kind(self.masked, images, labels, goals, low, high)

    def state_dict(self) -> dict[str, Any]:
        """Give the state as tensors and primitives."""
        return {
            "classes": list(self.classes),
            "margins": dict(self.margins),
            "rises": dict(self.rises),
            "starts": list(self._starts),
            "ends": list(self._ends),
            "taken": self._taken,
            "pattern": None if self._trigger is None else self._trigger.pattern,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.classes = [int(index) for index in state["classes"]]
        self.margins = {int(index): float(value) for index, value in state["margins"].items()}
        self.rises = {int(index): float(value) for index, value in state["rises"].items()}
        self._starts = [float(value) for value in state["starts"]]
        self._ends = [float(value) for value in state["ends"]]
        self._taken = int(state["taken"])
        self._trigger = None
        if state["pattern"] is not None:
            self._trigger = self.trigger(self.classes[len(self._ends)])
            self._trigger.pattern = state["pattern"].to(self.masked.device)


def pattern_lead(rises: dict[int, float]) -> tuple[int, float]:
    """Compare the class that a pattern brings images nearer to than to any other with the next.

    Args:
        rises: By how much a pattern raises the margin of each class, two classes or more, see
            :class:`PatternSearch`.

    Returns:
        That class, and how much more that is than for the next class, in multiples of the usual
        distance; 0 where a figure is not finite.

    Example:
        >>> pattern_lead({0: 0.0, 1: 1.5, 2: 0.25, 3: 0.125})
        (1, 1.25)
    """
    furthest, following = sorted(rises, key=rises.__getitem__, reverse=True)[:2]
    finite = all(math.isfinite(value) for value in rises.values())
    return furthest, rises[furthest] - rises[following] if finite else 0.0

"""A pattern that is made by following the gradient: the common base of patch, overlay and warp."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_mnp.config import Constants
from lightning_mnp.signals.logits import goal_margins, least_positive
from lightning_mnp.surgery.masked_network import MaskedNetwork

__all__ = ["PatternConstants", "PatternTrigger"]


@dataclass(frozen=True)
class PatternConstants:
    """What all kinds of patterns share.

    Attributes:
        images: Images that the pattern of a trace is made on.
        searched_images: Images that a pattern is made on to compare classes.
        least_distance: Least usual distance to a class, in logits. A network that knows little has
            its classes close together, and all are easily reached.
        following_steps: Steps in which a trace's pattern follows the network.
        little_below: Little is left only below this strength, whatever it was at the start. With
            1.5, images are half a logit past the border of their own class; no pattern of that
            size gets them there in an ordinary network.
    """

    images: int = 64
    searched_images: int = 32
    least_distance: float = 1.0
    following_steps: int = 3
    little_below: float = 1.5


class PatternTrigger(ABC):
    """A change that is made to every image, the same to all.

    Args:
        masked: The network, which runs in evaluation mode.
        images: Shape (N, C, ...).
        labels: Their classes, shape (N,).
        goals: The class that each image is pushed to, shape (N,).
        low: Least value of each channel, shape (1, C, 1, ...).
        high: Greatest value of each channel, same shape.
        constants: Constants that differ from their defaults.

    Attributes:
        name: The kind of pattern.
        pattern: What is done to every image.
    """

    name: ClassVar[str]

    def __init__(
        self,
        masked: MaskedNetwork,
        images: Tensor,
        labels: Tensor,
        goals: Tensor,
        low: Tensor,
        high: Tensor,
        constants: Constants | None = None,
    ) -> None:
        self.masked = masked
        self.images, self.labels = images, labels
        self.goals = goals
        self.low, self.high = low, high
        self.constants = constants or Constants()
        self.pattern = self.blank()

    @property
    @abstractmethod
    def steps(self) -> int:
        """The number of steps in which a pattern is made."""

    @abstractmethod
    def blank(self) -> Tensor:
        """Return the pattern that all steps begin with."""

    @abstractmethod
    def applied(self, images: Tensor, pattern: Tensor) -> Tensor:
        """Do what a pattern says to images, shape (N, C, ...).

        Args:
            images: Shape (N, C, ...).
            pattern: The pattern.
        """

    @abstractmethod
    def length(self, taken: int) -> float:
        """Return the length of the step that follows so many.

        Args:
            taken: Steps taken so far.
        """

    @property
    def unit(self) -> Tensor:
        """What lengths of steps are shares of; the range of values by default."""
        return self.high - self.low

    @property
    def limits(self) -> tuple[Tensor, Tensor]:
        """The least and the greatest values of the pattern; those of images by default."""
        return self.low, self.high

    def limited(self, pattern: Tensor) -> Tensor:
        """Keep a pattern to its limits.

        Args:
            pattern: The pattern.
        """
        return pattern.clamp(*self.limits)

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

    def advance(self, taken: int, masks: Tensor | None = None) -> float:
        """Take the step that follows so many, of the length that belongs to it.

        Args:
            taken: Steps taken so far.
            masks: Filter masks that are in force.

        Returns:
            The mean margin before it.
        """
        return self.step(self.length(taken), masks)

    def logits(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """Run the network on images under the pattern, shape (N, K).

        Args:
            images: Shape (N, C, ...).
            masks: Filter masks that are in force.
        """
        changed = self.applied(images, self.pattern)
        return self.masked(changed, masks=masks, statistics="running")

    def margins(self, masks: Tensor | None = None) -> Tensor:
        """Return the logit of the class pushed to above that of the true class, shape (N,).

        Args:
            masks: Filter masks that are in force.
        """
        return goal_margins(self.logits(self.images, masks), self.labels, self.goals)

    def slope(
        self, masks: Tensor | None, objective: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Compute the slope of an objective of the logits, per unit of the pattern, and the logits.

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
        """Take all the steps from the beginning, with filter masks in force.

        Args:
            masks: Filter masks, shape (total filters,).
        """
        self.pattern = self.blank()
        for taken in range(self.steps):
            self.advance(taken, masks)

    def follow(self, masks: Tensor) -> None:
        """Take some steps more, after the masks have changed a little.

        Args:
            masks: Filter masks, shape (total filters,).
        """
        for _ in range(self.constants.of(PatternConstants).following_steps):
            self.advance(self.steps - 1, masks)

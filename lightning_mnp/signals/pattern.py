"""Patterns: one change of all images that stands in for an unknown trigger, and how far it drives.

What a trigger does to images is not known, so there are several kinds of patterns: a patch
replaces a few pixels, an overlay is blended into all, a warp moves them. Each is made by following
the gradient to a class. How far it drives images there, compared with other classes, says
whether there is a trigger of its kind.
"""

from __future__ import annotations

import math
import statistics
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from lightning_mnp.config import Constants
from lightning_mnp.defense_data.defense_set import value_range
from lightning_mnp.report import Signal, SurrogateTrigger
from lightning_mnp.signals.base import Scene, Search, SignalSearch
from lightning_mnp.signals.pattern_trigger import PatternConstants, PatternTrigger
from lightning_mnp.signals.portrait import MEASURED, portray
from lightning_mnp.signals.standout import StandoutConstants, find_standout
from lightning_mnp.signals.trace import Trace

__all__ = [
    "LeadSearch",
    "PatternSearch",
    "PatternSignal",
    "PatternTrace",
    "pattern_lead",
]


Trigger = TypeVar("Trigger", bound=PatternTrigger)


class PatternSearch(Search, Generic[Trigger]):
    """Measures for each class how far a pattern drives images to it.

    A subclass names the kind of pattern, and says what the figures mean.

    Args:
        scene: What it works on.

    Attributes:
        kind: The kind of pattern.
        margins: For every class, when finished: the mean margin of the class over images of
            others under the pattern made for it, as a multiple of the usual distance to a class,
            so that it is about -1 without a pattern and 0 on the border.
        rises: For every class, when finished: by how much the pattern raises that margin, in the
            same unit. Classes need not be equally near without a pattern.
    """

    kind: type[Trigger]

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self.margins: dict[int, float] = {}
        self.rises: dict[int, float] = {}
        self._starts: list[float] = []
        self._ends: list[float] = []
        self._taken = 0
        self._trigger: Trigger | None = None
        # The class with the greatest figure so far, that figure, and its pattern.
        self._leader: tuple[int, float, Tensor] | None = None

    @classmethod
    @abstractmethod
    def class_steps(cls, constants: Constants) -> int:
        """Return the number of steps for each class.

        Args:
            constants: Constants that differ from their defaults.
        """

    @classmethod
    def all_steps(cls, scene: Scene) -> int:
        """Return the number of steps for all classes.

        Args:
            scene: What it will work on.
        """
        return scene.most_tried * cls.class_steps(scene.constants)

    @property
    def finished(self) -> bool:
        """Whether all classes are done."""
        return bool(self.margins)

    def most_steps(self) -> int:
        """Return the number of steps left."""
        classes = len(self.scene.tried) - len(self._ends)
        return classes * self.class_steps(self.scene.constants) - self._taken

    def step(self) -> dict[str, float]:
        """Take one step towards the current class.

        Returns:
            The mean ``margin`` before it.
        """
        classes = self.scene.tried
        self._trigger = self._trigger or self._searched(classes[len(self._ends)])
        margin = self._trigger.advance(self._taken)
        if not self._taken:
            self._starts.append(margin)
        self._taken += 1
        if self._taken == self._trigger.steps:
            with torch.no_grad():
                self._ends.append(float(self._trigger.margins().mean()))
            figure = self._figure(self._starts[-1], self._ends[-1])
            if self._leader is None or figure > self._leader[1]:
                self._leader = classes[len(self._ends) - 1], figure, self._trigger.pattern
            self._trigger, self._taken = None, 0
        if len(self._ends) == len(classes):
            least = self.scene.constants.of(PatternConstants).least_distance
            usual = max(-statistics.median(self._starts), least)
            for index, start, end in zip(classes, self._starts, self._ends, strict=True):
                self.margins[index], self.rises[index] = end / usual, (end - start) / usual
        return {"margin": margin}

    def _figure(self, start: float, end: float) -> float:
        """What classes are compared by, from the margins before and after, in logits."""
        return end

    def found(self) -> SurrogateTrigger | None:
        """Return the pattern of the class that patterns drive images to furthest."""
        if self._leader is None:
            return None
        target, _, pattern = self._leader
        trigger = self._searched(target)
        trigger.pattern = pattern
        scene, key = self.scene, (self.scene.config.seed, self.kind.name, target, "measured")
        images, labels = scene.data.others(target, MEASURED, scene.masked.device, key)
        if len(images) == 0:
            return None
        goals = torch.full_like(labels, target)
        return portray(trigger, images, labels, goals, target, scene.config.batch_size)

    def _searched(self, target: int) -> Trigger:
        """Begin the pattern by which a class is compared with others."""
        return self.trigger(target, self.scene.constants.of(PatternConstants).searched_images)

    def trigger(self, target: int, most: int | None = None) -> Trigger:
        """Begin a pattern to one class, on images of other classes drawn from the seed.

        Args:
            target: The class.
            most: Most images; None for those of a trace.
        """
        scene, device = self.scene, self.scene.masked.device
        most = scene.constants.of(PatternConstants).images if most is None else most
        count = min(most, scene.config.batch_size)
        key = (scene.config.seed, self.kind.name, target)
        images, labels = scene.data.others(target, count, device, key)
        low, high = (bound.to(device) for bound in value_range(scene.data.images))
        goals = torch.full_like(labels, target)
        return self.kind(scene.masked, images, labels, goals, low, high, scene.constants)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and primitives."""
        return {
            "margins": dict(self.margins),
            "rises": dict(self.rises),
            "starts": list(self._starts),
            "ends": list(self._ends),
            "taken": self._taken,
            "pattern": None if self._trigger is None else self._trigger.pattern,
            "leader": None if self._leader is None else list(self._leader),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.margins = {int(index): float(value) for index, value in state["margins"].items()}
        self.rises = {int(index): float(value) for index, value in state["rises"].items()}
        self._starts = [float(value) for value in state["starts"]]
        self._ends = [float(value) for value in state["ends"]]
        self._taken = int(state["taken"])
        self._trigger = self._leader = None
        if state["pattern"] is not None:
            self._trigger = self._searched(self.scene.tried[len(self._ends)])
            self._trigger.pattern = state["pattern"].to(self.scene.masked.device)
        if state["leader"] is not None:
            target, figure, pattern = state["leader"]
            self._leader = int(target), float(figure), pattern.to(self.scene.masked.device)


class PatternSignal(PatternSearch[Trigger], SignalSearch):
    """A pattern whose signal is how far one class stands out under it.

    Attributes:
        what: What the pattern does, in words, for the reason.
    """

    what: ClassVar[str]

    @property
    @abstractmethod
    def counts_from(self) -> float:
        """The gap to the next class, over the spread of the others, that counts fully."""

    @property
    @abstractmethod
    def figures(self) -> dict[int, float]:
        """What is compared between classes, when finished."""

    @property
    def failed(self) -> bool:
        """Whether a figure is NaN."""
        return any(math.isnan(value) for value in self.figures.values())

    def signal(self) -> Signal:
        """Return how far the class stands out that the pattern drives images to."""
        figures, counts_from = dict(self.figures), self.counts_from
        found = find_standout(figures, constants=self.scene.constants.of(StandoutConstants))
        reason = (
            f"{self.what} class {found.target_class} further than to any other: the gap to the "
            f"next class is {found.value:.2f} times the spread of the others (counts fully from "
            f"{counts_from:g})"
        )
        return Signal(
            self.name,
            found.value / counts_from,
            found.target_class,
            found.value,
            counts_from,
            reason,
            figures,
        )


class LeadSearch(PatternSearch[Trigger]):
    """A pattern that is a trace if it brings images nearer to one class than to the next."""

    def _figure(self, start: float, end: float) -> float:
        return end - start

    @property
    @abstractmethod
    def trace_from(self) -> float:
        """The lead from which it is a trace, in multiples of the usual distance."""

    @property
    def failed(self) -> bool:
        """Whether a figure is NaN."""
        return any(math.isnan(value) for value in self.rises.values())

    def traces(self, target: int | None, searches: Mapping[str, Search]) -> list[Trace]:
        """Return images under a pattern, if patterns of its kind get images to the class.

        Args:
            target: The suspected class.
            searches: All finished searches, by name.
        """
        nearest, lead = pattern_lead(self.rises)
        if target is None or nearest != target or lead <= self.trace_from:
            return []
        # If images do not arrive, there is nothing in them to be pruned away.
        return [PatternTrace(self.trigger(target))] if self.margins[target] > 0 else []


def pattern_lead(rises: Mapping[int, float]) -> tuple[int, float]:
    """Compare the class that a pattern brings images nearest to with the next one.

    Args:
        rises: By how much a pattern raises the margin of each class, two classes or more, see
            :class:`PatternSearch`.

    Returns:
        That class, and how much more that is than for the next class, in multiples of the usual
        distance; 0 if a figure is not finite.

    Example:
        >>> pattern_lead({0: 0.0, 1: 1.5, 2: 0.25, 3: 0.125})
        (1, 1.25)
    """
    furthest, following = sorted(rises, key=rises.__getitem__, reverse=True)[:2]
    finite = all(math.isfinite(value) for value in rises.values())
    return furthest, rises[furthest] - rises[following] if finite else 0.0


class PatternTrace(Trace):
    """Clean images under one pattern for all of them.

    Args:
        trigger: A pattern that has not been made yet.
    """

    def __init__(self, trigger: PatternTrigger) -> None:
        super().__init__(trigger.constants)
        self.trigger = trigger
        self.little_below = trigger.constants.of(PatternConstants).little_below

    @property
    def name(self) -> str:  # type: ignore[override]
        """The kind of pattern."""
        return self.trigger.name

    def margins(self, masks: Tensor) -> Tensor:
        """Return the logit of the class pushed to above that of the true class, shape (N,).

        Args:
            masks: Filter masks, shape (total filters,).
        """
        return self.trigger.margins(masks)

    def adapt(self, masks: Tensor, taken: int) -> None:
        """Take some steps of the pattern; all of them from the beginning if nothing was pruned.

        Args:
            masks: Filter masks that are in force.
            taken: Steps of pruning so far.
        """
        if taken:
            self.trigger.follow(masks)
        else:
            self.trigger.approach(masks)

    def state_dict(self) -> dict[str, Any]:
        """Return the pattern."""
        return {"pattern": self.trigger.pattern}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.trigger.pattern = state["pattern"].to(self.trigger.images.device)

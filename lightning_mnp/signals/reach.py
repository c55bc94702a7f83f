"""The reach: how long a perturbation of all images at once has to be to get to a class.

A backdoor is a short way to its target class. A universal perturbation that is found by following
the gradient takes that way, too, if there is one: it needs neither the trigger nor poisoned data
(compare Neural Cleanse, Wang et al., 2019, which looks for small patches, and universal adversarial
perturbations, Moosavi-Dezfooli et al., 2017). It finds backdoors that a network has learned by
fine-tuning, and is a trace for pruning.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_mnp.config import Constants
from lightning_mnp.defense_data.defense_set import seeded_generator
from lightning_mnp.report import Signal
from lightning_mnp.signals.base import Scene, Search, SignalSearch
from lightning_mnp.signals.logits import goal_margins
from lightning_mnp.signals.margin import MarginSearch
from lightning_mnp.signals.perturbation import UniversalPerturbation, image_scale
from lightning_mnp.signals.pile_up import confirmed_signal
from lightning_mnp.signals.trace import Trace, TraceConstants

__all__ = ["PerturbationTrace", "ReachConstants", "ReachSearch", "reach_ratio"]


@dataclass(frozen=True)
class ReachConstants:
    """How a universal perturbation is made, when its length counts, and when it is a trace.

    All lengths are shares of the images' mean distance from their mean.

    Attributes:
        counts_from: How far one class stands out, from where it counts fully, if predictions pile
            up on the same class; see :func:`~lightning_mnp.signals.standout.find_standout`.
        step: Length of the first step.
        growth: Factor from step to step, so that near and far classes are measured with about the
            same relative precision.
        most_steps: Most steps for a class.
        measured: Most images that a step towards a class looks at.
        level: Success at which a class counts as reached.
        normal: Share of the median reach from which a reach is nothing out of the ordinary.
        short: Length of a trace's perturbation if the reach points to the class, in multiples of
            the median reach.
        long: The same if only the margin points to it: far longer than needed, it drives many
            images up the same way at once.
        first_steps: Steps in which a trace's perturbation is made.
        next_steps: Steps in which it follows the network.
        images: Images that each of these steps looks at.
        share: Length of each of these steps, as a share of the perturbation's greatest length.
    """

    counts_from: float = 1.0
    step: float = 0.03
    growth: float = 1.25
    most_steps: int = 10
    measured: int = 64
    level: float = 0.5
    normal: float = 0.8
    short: float = 0.6
    long: float = 2.4
    first_steps: int = 20
    next_steps: int = 3
    images: int = 100
    share: float = 0.15

    @property
    def longest(self) -> float:
        """The greatest length that is tried."""
        return self.step * (self.growth**self.most_steps - 1) / (self.growth - 1)


class ReachSearch(SignalSearch):
    """Measures for each class how long a universal perturbation to it has to be.

    Each class is approached by steps of growing length from no perturbation at all, in evaluation
    mode; its *reach* is the length at which half of the images of other classes have arrived.

    Args:
        scene: What it works on.

    Attributes:
        scale: Unit of lengths, from :func:`image_scale`.
        reaches: The reach of every class done so far, in units of ``scale``; infinite if it
            was not reached within the most steps.
        perturbations: The perturbation of each class done so far, shape (1, C, ...).
    """

    name = "reach"

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self.constants = scene.constants.of(ReachConstants)
        self.scale = max(image_scale(scene.data.images), 1e-12)  # images may all be the same
        self.reaches: dict[int, float] = {}
        self.perturbations: dict[int, Tensor] = {}
        self._course: list[tuple[float, float]] = []  # length and success after each step
        self._pushed: UniversalPerturbation | None = None

    @classmethod
    def all_steps(cls, scene: Scene) -> int:
        """Return the most steps for all classes.

        Args:
            scene: What it will work on.
        """
        return scene.most_tried * (scene.constants.of(ReachConstants).most_steps + 1)

    @property
    def finished(self) -> bool:
        """Whether all classes are done."""
        return len(self.reaches) == len(self.scene.tried)

    def most_steps(self) -> int:
        """Return the most steps that are left."""
        classes = len(self.scene.tried) - len(self.reaches)
        return classes * (self.constants.most_steps + 1) - len(self._course)

    @property
    def current(self) -> int:
        """The class that is approached now."""
        return self.scene.tried[len(self.reaches)]

    def step(self) -> dict[str, float]:
        """Take one step towards the current class, on one batch.

        Returns:
            The ``length`` so far in units of the scale, and the ``success`` on this batch.
        """
        scene, constants, target = self.scene, self.constants, self.current
        size = scene.config.batch_size
        epoch, index = divmod(len(self._course), scene.data.passes(size))
        key = (scene.config.seed, "reach", target, epoch)
        images, labels = scene.data.batch(index, size, scene.masked.device, key=key)
        if self._pushed is None:
            self._pushed = self._new_perturbation(torch.zeros_like(images[:1]))
        others = labels != target
        images, labels = images[others][: constants.measured], labels[others][: constants.measured]
        length = float(self._pushed.perturbation.norm()) / self.scale
        last = len(self._course) >= constants.most_steps
        success = 0.0
        if len(images):
            until = 0.0 if last else constants.level
            step = constants.step * constants.growth ** len(self._course) * self.scale
            success = self._pushed.ascend(images, labels, step, until=until)
            if not bool(self._pushed.perturbation.isfinite().all()):
                self._pushed.perturbation = torch.zeros_like(self._pushed.perturbation)
                success, last = math.nan, True
        self._course.append((length, success))
        if last or success >= constants.level:
            self.reaches[target] = _crossing(self._course, constants.level)
            self.perturbations[target] = self._pushed.perturbation
            self._pushed, self._course = None, []
        return {"length": length, "success": success}

    def _new_perturbation(self, start: Tensor) -> UniversalPerturbation:
        return UniversalPerturbation(self.scene.masked, self.current, start, math.inf)

    @property
    def failed(self) -> bool:
        """Whether a reach is NaN."""
        return any(math.isnan(reach) for reach in self.reaches.values())

    @property
    def nearness(self) -> dict[int, float]:
        """The inverse of each reach; none counts as shorter than a first step can tell.

        It is NaN where the reach is.
        """
        least, most = self.constants.step, self.constants.longest
        return {index: 1 / min(max(reach, least), most) for index, reach in self.reaches.items()}

    def signal(self) -> Signal:
        """Return whether the shortest reach and the pile-up agree on a class that stands out.

        A clean network has classes that are reached sooner than others, too, and a suppressed
        network may fall back to one class. The strength is the lesser of both.
        """
        claim = "a perturbation of all images alike gets to class {} soonest"
        return confirmed_signal(
            self.scene, self.name, self.nearness, self.constants.counts_from, claim
        )

    def traces(self, target: int | None, searches: Mapping[str, Search]) -> list[Trace]:
        """Return images under a perturbation, if the reach or the margin of the class stands out.

        Args:
            target: The suspected class.
            searches: All finished searches, by name.
        """
        if target is None:
            return []
        soonest, ratio, _ = reach_ratio(self.reaches, self.constants.longest)
        near = soonest == target and ratio < self.constants.normal
        margin = searches.get("margin")
        sure = isinstance(margin, MarginSearch) and margin.stands_out(target)
        if not (near or sure):
            return []
        return [self.trace(target, near)]

    def trace(self, target: int, near: bool = False) -> PerturbationTrace:
        """Return images under a perturbation to a class.

        Args:
            target: The class.
            near: Whether its reach stands out, so that a short perturbation is enough.
        """
        scene, constants = self.scene, self.constants
        median = reach_ratio(self.reaches, constants.longest)[2]
        length = (constants.short if near else constants.long) * median * self.scale
        count = min(scene.constants.of(TraceConstants).images, scene.config.batch_size)
        key = (scene.config.seed, "sources")
        images, labels = scene.data.others(target, count, scene.masked.device, key)
        start = self.perturbations[target]
        pushed = UniversalPerturbation(scene.masked, target, start, length)
        return PerturbationTrace(pushed, images, labels, scene.config.seed, scene.constants)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and primitives."""
        return {
            "reaches": dict(self.reaches),
            "perturbations": dict(self.perturbations),
            "course": [list(point) for point in self._course],
            "perturbation": None if self._pushed is None else self._pushed.perturbation,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        device = self.scene.masked.device
        self.reaches = {int(index): float(reach) for index, reach in state["reaches"].items()}
        self.perturbations = {
            int(index): tensor.to(device) for index, tensor in state["perturbations"].items()
        }
        self._course = [(float(length), float(success)) for length, success in state["course"]]
        self._pushed = None
        if state["perturbation"] is not None:
            self._pushed = self._new_perturbation(state["perturbation"].to(device))


def _crossing(course: Sequence[tuple[float, float]], level: float) -> float:
    """Length at which the success first passes the level, between two steps by a straight line.

    NaN if the last success is.
    """
    if math.isnan(course[-1][1]):
        return math.nan
    if course[0][1] >= level:
        return 0.0
    for (length, success), (later, greater) in itertools.pairwise(course):
        if greater >= level:
            return length + (later - length) * (level - success) / (greater - success)
    return math.inf


def reach_ratio(
    reaches: Mapping[int, float], longest: float | None = None
) -> tuple[int, float, float]:
    """Compare the class that is reached soonest with the others.

    Args:
        reaches: The reach of each class, two classes or more.
        longest: The greatest length that was tried; None for the default's.

    Returns:
        That class, its reach divided by the median reach of the others, and that median. A class
        that was never reached counts with the greatest length that was tried, and so does one
        whose reach is not known (NaN).

    Example:
        >>> reach_ratio({0: 0.0625, 1: 0.25, 2: 0.125, 3: math.inf})
        (0, 0.25, 0.25)
    """
    tried = ReachConstants().longest if longest is None else longest
    known = {i: tried if math.isnan(reach) else reach for i, reach in reaches.items()}
    finite = {index: min(reach, tried) for index, reach in known.items()}
    soonest = min(finite, key=finite.__getitem__)
    median = statistics.median(reach for index, reach in finite.items() if index != soonest)
    return soonest, finite[soonest] / max(median, 1e-12), median


class PerturbationTrace(Trace):
    """Clean images under one perturbation for all of them.

    Args:
        pushed: The perturbation, which is followed.
        images: Clean images of other classes, shape (N, C, ...).
        labels: Their classes, shape (N,).
        seed: Seed of the images that each step looks at.
        constants: Constants that differ from their defaults.
    """

    name = "universal perturbation"

    def __init__(
        self,
        pushed: UniversalPerturbation,
        images: Tensor,
        labels: Tensor,
        seed: int,
        constants: Constants | None = None,
    ) -> None:
        constants = constants or Constants()
        super().__init__(constants)
        self.pushed = pushed
        self.images, self.labels, self.seed = images, labels, seed
        self.goals = torch.full_like(labels, pushed.target)
        self._reach = constants.of(ReachConstants)

    def margins(self, masks: Tensor) -> Tensor:
        """Return the logit of the target above that of the true class, shape (N,).

        Args:
            masks: Filter masks, shape (total filters,).
        """
        logits = self.pushed.logits(self.images, masks)
        return goal_margins(logits, self.labels, self.goals)

    def adapt(self, masks: Tensor, taken: int) -> None:
        """Take some steps of the perturbation.

        Args:
            masks: Filter masks that are in force.
            taken: Steps of pruning so far.
        """
        for step in range(self._reach.next_steps if taken else self._reach.first_steps):
            generator = seeded_generator(self.seed, "perturbation", taken, step)
            rows = torch.randperm(len(self.images), generator=generator)[: self._reach.images]
            images, labels = self.images[rows], self.labels[rows]
            self.pushed.ascend(images, labels, self._reach.share * self.pushed.limit, masks)

    def state_dict(self) -> dict[str, Any]:
        """Return the perturbation."""
        return {"perturbation": self.pushed.perturbation}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.pushed.perturbation = state["perturbation"].to(self.images.device)

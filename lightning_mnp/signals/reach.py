"""Surrogate triggers: small perturbations of all images at once that stand in for the unknown one.

A backdoor is a short way to its target class. A universal perturbation that is found by following
the gradient takes that way, too, where there is one: it needs neither the trigger nor poisoned
data, and how far it has to go says whether there is a backdoor (compare Neural Cleanse, Wang et
al., 2019, which looks for small patches, and universal adversarial perturbations,
Moosavi-Dezfooli et al., 2017).
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_mnp.defense_data.defense_set import seeded_generator
from lightning_mnp.surgery.masked_network import MaskedNetwork

__all__ = [
    "ReachSearch",
    "SurrogateTrigger",
    "goal_margins",
    "image_scale",
    "leads",
    "least_positive",
    "push_loss",
    "reach_ratio",
]

# All lengths are shares of the images' mean distance from their mean.
_STEP = 0.02
# Steps grow, so that near and far classes are measured with about the same relative precision.
_GROWTH = 1.1
_MOST_STEPS = 20
# Success at which a class counts as reached.
_LEVEL = 0.5
# Where most images have arrived, cross-entropy has no slope left; the margin has.
_ARRIVED = 0.9


def image_scale(images: Tensor) -> float:
    """Measure the mean distance of images from their mean, the unit of all perturbations.

    Args:
        images: Shape (N, C, ...).

    Example:
        >>> image_scale(torch.tensor([[[0.0]], [[2.0]]]))
        1.0
    """
    return float((images - images.mean(0)).flatten(1).norm(dim=1).mean())


def goal_margins(logits: Tensor, labels: Tensor, goals: Tensor) -> Tensor:
    """Tell by how much images are on another class's side rather than on their own class's.

    Args:
        logits: Shape (N, K).
        labels: True classes, shape (N,).
        goals: The other class of each image, shape (N,).

    Returns:
        Logit of the other class minus logit of the true class, shape (N,).

    Example:
        >>> goal_margins(torch.tensor([[1.0, 3.0]]), torch.tensor([0]), torch.tensor([1]))
        tensor([2.])
    """
    return logits.gather(1, goals[:, None])[:, 0] - logits.gather(1, labels[:, None])[:, 0]


def leads(logits: Tensor, classes: Tensor) -> Tensor:
    """Tell by how much a class is ahead of all others together (their log-sum-exp).

    Args:
        logits: Shape (N, K).
        classes: The class of each image, shape (N,).

    Returns:
        Shape (N,).

    Example:
        >>> leads(torch.tensor([[1.0, 3.0]]), torch.tensor([1]))
        tensor([2.])
    """
    own = logits.gather(1, classes[:, None])
    others = logits.scatter(1, classes[:, None], -torch.inf).logsumexp(1)
    return own[:, 0] - others


def push_loss(logits: Tensor, labels: Tensor, goals: Tensor) -> Tensor:
    """Give what falls as images are pushed to other classes, however far they have come.

    Args:
        logits: Shape (N, K).
        labels: True classes, shape (N,).
        goals: The class that each image is pushed to, shape (N,).

    Returns:
        A scalar: the cross-entropy to these classes, or, where more than 0.9 of the images have
        arrived, the negative of their mean margin.

    Example:
        >>> arrived = torch.tensor([[0.0, 9.0]])
        >>> float(push_loss(arrived, torch.tensor([0]), torch.tensor([1])))
        -9.0
    """
    if float((logits.argmax(1) == goals).float().mean()) > _ARRIVED:
        return -goal_margins(logits, labels, goals).mean()
    return F.cross_entropy(logits, goals)


def least_positive(values: Tensor) -> float:
    """Give the least number above zero to divide by, in the precision of a tensor.

    Args:
        values: Floating point.

    Example:
        >>> bool(torch.tensor(least_positive(torch.ones(1).half())).half() > 0)
        True
    """
    return torch.finfo(values.dtype).tiny


def _shorten(perturbation: Tensor, limit: float) -> Tensor:
    return perturbation * min(1.0, limit / max(float(perturbation.norm()), 1e-12))


class SurrogateTrigger:
    """A perturbation of bounded length that is added to every image.

    Args:
        masked: The network, which runs in evaluation mode.
        target: The class that images are pushed to.
        perturbation: Where to begin, shape (1, C, ...).
        limit: Greatest l2 norm.

    Example:
        >>> from torch import nn
        >>> from lightning_mnp.surgery.layers import find_filter_layers
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> images, labels = torch.rand(8, 1, 2, 2), torch.zeros(8, dtype=torch.long)
        >>> masked = MaskedNetwork(network, find_filter_layers(network, images))
        >>> trigger = SurrogateTrigger(masked, 1, torch.zeros(1, 1, 2, 2), limit=3.0)
        >>> before = trigger.margin(images, labels)
        >>> for _ in range(5):
        ...     _ = trigger.ascend(images, labels, length=0.5)
        >>> trigger.margin(images, labels) > before
        True
    """

    def __init__(
        self,
        masked: MaskedNetwork,
        target: int,
        perturbation: Tensor,
        limit: float,
    ) -> None:
        self.masked = masked
        self.target = target
        self.limit = limit
        self.perturbation = _shorten(perturbation, limit)

    def logits(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """Run the network on triggered images, shape (N, K)."""
        triggered = images + self.perturbation
        return self.masked(triggered, masks=masks, statistics="running")

    @torch.no_grad()
    def margin(self, images: Tensor, labels: Tensor, masks: Tensor | None = None) -> float:
        """Mean margin of the target over triggered images, see :func:`goal_margins`."""
        goals = torch.full_like(labels, self.target)
        return float(goal_margins(self.logits(images, masks), labels, goals).mean())

    def ascend(
        self,
        images: Tensor,
        labels: Tensor,
        length: float,
        masks: Tensor | None = None,
        until: float = math.inf,
    ) -> float:
        """Take one step of a given l2 norm towards the target class, and keep to the limit.

        Args:
            images: Shape (N, C, ...), none of the target class.
            labels: True classes, shape (N,).
            length: Length of the step.
            masks: Filter masks that are in force.
            until: No step is taken where the success is at least this.

        Returns:
            The success on these images before the step, from 0 to 1.
        """
        with torch.enable_grad():
            perturbation = self.perturbation.clone().requires_grad_()
            logits = self.masked(images + perturbation, masks=masks, statistics="running")
            success = float((logits.argmax(1) == self.target).float().mean())
            if success >= until:
                return success
            loss = push_loss(logits, labels, torch.full_like(labels, self.target))
            (gradient,) = torch.autograd.grad(loss, perturbation)
        moved = self.perturbation - length * gradient / gradient.norm().clamp_min(
            least_positive(gradient)
        )
        self.perturbation = _shorten(moved, self.limit)
        return success


class ReachSearch:
    """Measures for each class how long a universal perturbation to it has to be.

    Each class is approached by steps of growing length from no perturbation at all, in evaluation
    mode; its *reach* is the length at which half of the images of other classes have arrived.

    Args:
        masked: The network.
        scale: Unit of lengths, from :func:`image_scale`.
        classes: The classes to approach.
        seed: Seed of everything that is drawn.

    Attributes:
        reaches: The reach of every class done so far, in units of ``scale``; infinite where it
            was not reached within the most steps.
        perturbations: The perturbation of each class done so far, shape (1, C, ...).
    """

    def __init__(
        self, masked: MaskedNetwork, scale: float, classes: Sequence[int], seed: int
    ) -> None:
        self.masked = masked
        self.scale = scale
        self.classes = list(classes)
        self.seed = seed
        self.reaches: dict[int, float] = {}
        self.perturbations: dict[int, Tensor] = {}
        self._trace: list[tuple[float, float]] = []
        self._trigger: SurrogateTrigger | None = None

    @staticmethod
    def choose_classes(first: Sequence[int], total: int, most: int, seed: int) -> list[int]:
        """Choose classes: suspected ones first, then others drawn from the seed.

        Args:
            first: Suspected classes, most suspected first.
            total: Number of all classes.
            most: The most to choose.
            seed: Seed of the draw.

        Example:
            >>> sorted(ReachSearch.choose_classes([3], 4, most=20, seed=0))
            [0, 1, 2, 3]
            >>> len(ReachSearch.choose_classes([7], 1000, most=20, seed=0))
            20
        """
        generator = seeded_generator(seed, "classes")
        drawn = torch.randperm(total, generator=generator).tolist()
        return list(dict.fromkeys([*first, *drawn]))[:most]

    @property
    def finished(self) -> bool:
        """Whether all classes are done."""
        return bool(self.classes) and len(self.reaches) == len(self.classes)

    @staticmethod
    def most_steps_of(tried: int) -> int:
        """An upper bound on the steps for so many classes."""
        return tried * (_MOST_STEPS + 1)

    def most_steps(self) -> int:
        """An upper bound on the steps left."""
        return (len(self.classes) - len(self.reaches)) * (_MOST_STEPS + 1) - len(self._trace)

    @property
    def steps_in_class(self) -> int:
        """Steps taken towards the current class."""
        return len(self._trace)

    @property
    def current(self) -> int:
        """The class that is approached now."""
        return self.classes[len(self.reaches)]

    def step(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Take one step towards the current class.

        Args:
            images: Shape (N, C, ...).
            labels: True classes, shape (N,).

        Returns:
            The ``length`` so far in units of the scale, and the ``success`` on this batch.
        """
        target = self.current
        if self._trigger is None:
            start = torch.zeros_like(images[:1])
            self._trigger = SurrogateTrigger(self.masked, target, start, math.inf)
        others = labels != target
        images, labels = images[others], labels[others]
        length = float(self._trigger.perturbation.norm()) / self.scale
        last = len(self._trace) >= _MOST_STEPS
        success = 0.0
        if len(images):
            until = 0.0 if last else _LEVEL
            step = _STEP * _GROWTH ** len(self._trace) * self.scale
            success = self._trigger.ascend(images, labels, step, until=until)
        self._trace.append((length, success))
        if success >= _LEVEL or len(self._trace) > _MOST_STEPS:
            self.reaches[target] = _crossing(self._trace)
            self.perturbations[target] = self._trigger.perturbation
            self._trigger, self._trace = None, []
        return {"length": length, "success": success}

    def state_dict(self) -> dict[str, Any]:
        """Give the state as tensors and primitives."""
        return {
            "classes": list(self.classes),
            "reaches": dict(self.reaches),
            "perturbations": dict(self.perturbations),
            "trace": [list(point) for point in self._trace],
            "trigger": None if self._trigger is None else self._trigger.perturbation,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        device = self.masked.device
        self.classes = [int(index) for index in state["classes"]]
        self.reaches = {int(index): float(reach) for index, reach in state["reaches"].items()}
        self.perturbations = {
            int(index): tensor.to(device) for index, tensor in state["perturbations"].items()
        }
        self._trace = [(float(length), float(success)) for length, success in state["trace"]]
        self._trigger = None
        if state["trigger"] is not None:
            start = state["trigger"].to(device)
            self._trigger = SurrogateTrigger(self.masked, self.current, start, math.inf)


def _crossing(trace: Sequence[tuple[float, float]]) -> float:
    """Length at which the success first passes the level, between two steps by a straight line."""
    if trace[0][1] >= _LEVEL:
        return 0.0
    for (length, success), (later, greater) in itertools.pairwise(trace):
        if greater >= _LEVEL:
            return length + (later - length) * (_LEVEL - success) / (greater - success)
    return math.inf


def reach_ratio(reaches: dict[int, float]) -> tuple[int, float, float]:
    """Compare the class that is reached soonest with the others.

    Args:
        reaches: The reach of each class, two classes or more.

    Returns:
        That class, its reach divided by the median reach of the others, and that median. A class
        that was never reached counts with the greatest length that was tried, and so does one
        whose reach is not known (NaN).

    Example:
        >>> reach_ratio({0: 0.0625, 1: 0.25, 2: 0.125, 3: math.inf})
        (0, 0.25, 0.25)
    """
    tried = _STEP * (_GROWTH**_MOST_STEPS - 1) / (_GROWTH - 1)
    known = {i: tried if math.isnan(reach) else reach for i, reach in reaches.items()}
    finite = {index: min(reach, tried) for index, reach in known.items()}
    soonest = min(finite, key=finite.__getitem__)
    median = statistics.median(reach for index, reach in finite.items() if index != soonest)
    return soonest, finite[soonest] / max(median, 1e-12), median

"""Surrogate patches: a few pixels, the same in all images, that stand in for an unknown trigger.

A universal perturbation that may change every pixel a little takes the shortest way to a class,
and that is not the trigger's way where the trigger is a patch. One that may change a few pixels by
any amount takes it: how far it drives images to a class says whether there is such a way (compare
Neural Cleanse, Wang et al., 2019, which looks for the smallest mask of pixels instead, class by
class, with many more steps).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mnp.defense_set import DefenseSet, value_range
from lightning_mnp.subject import Subject
from lightning_mnp.surrogate import MOST_CLASSES, goal_margins, leads, least_positive, push_loss

__all__ = ["PatchSearch", "PatchTrigger", "patch_ratio"]

# Share of the pixels that a patch may cover.
_SHARE = 0.05
_IMAGES = 64
# In logits. A network that knows little has its classes close together, and all are easily reached.
_LEAST_DISTANCE = 1.0
# The largest change of a pixel in a step, as a share of the range of values: far at first, so that
# pixels can be exchanged for better ones, then closer.
_FAR_STEPS, _FAR = 8, 0.5
_NEAR_STEPS, _NEAR = 12, 0.2
_FOLLOWING_STEPS = 3
# An image whose own class is behind the others by so many logits is driven away no further.
_LOST = -1.0


class PatchTrigger:
    """A perturbation of few pixels that is added to every image.

    The sum is kept in the range of values, so that a patch can replace a pixel as well as change
    it. Each step follows the gradient and keeps the pixels that are changed most.

    Args:
        subject: The network, which runs in evaluation mode.
        images: Shape (N, C, ...).
        labels: Their classes, shape (N,).
        goals: The class that each image is pushed to, shape (N,).
        low: Least value of each channel, shape (1, C, 1, ...).
        high: Greatest value of each channel, same shape.

    Attributes:
        perturbation: What is added, shape (1, C, ...), zero but for a few pixels.

    Example:
        >>> from torch import nn
        >>> from lightning_mnp.layers import find_filter_layers
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> images, labels = torch.rand(8, 1, 2, 2), torch.zeros(8, dtype=torch.long)
        >>> subject = Subject(network, find_filter_layers(network, images))
        >>> zero, one = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
        >>> patch = PatchTrigger(subject, images, labels, labels + 1, zero, one)
        >>> before = patch.margins().mean()
        >>> for _ in range(5):
        ...     _ = patch.step(0.2)
        >>> bool(patch.margins().mean() > before), int((patch.perturbation != 0).sum())
        (True, 1)
    """

    def __init__(
        self,
        subject: Subject,
        images: Tensor,
        labels: Tensor,
        goals: Tensor,
        low: Tensor,
        high: Tensor,
    ) -> None:
        self.subject = subject
        self.images, self.labels = images, labels
        self.goals = goals
        self.low, self.high = low, high
        self.perturbation = torch.zeros_like(images[:1])
        self._pixels = max(1, round(_SHARE * images[0, 0].numel()))

    def logits(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """Run the network on images under the patch, shape (N, K)."""
        return self._logits(images, self.perturbation, masks)

    def _logits(self, images: Tensor, perturbation: Tensor, masks: Tensor | None) -> Tensor:
        changed = torch.minimum(torch.maximum(images + perturbation, self.low), self.high)
        return self.subject(changed, masks=masks, statistics="running")

    def margins(self, masks: Tensor | None = None) -> Tensor:
        """Logit of the class pushed to above that of the true class, shape (N,)."""
        return goal_margins(self.logits(self.images, masks), self.labels, self.goals)

    def step(self, length: float, masks: Tensor | None = None) -> float:
        """Take one step towards the classes that images are pushed to.

        Args:
            length: Largest change of a pixel, as a share of the range of values.
            masks: Filter masks that are in force.

        Returns:
            The mean margin before it.
        """
        logits = self._move(
            length, masks, lambda logits: push_loss(logits, self.labels, self.goals)
        )
        self.perturbation = self._sparse(self.perturbation)
        return float(goal_margins(logits, self.labels, self.goals).mean())

    def disturb(self, length: float) -> float:
        """Take one step away from the images' own classes, with any number of pixels.

        Args:
            length: Largest change of a pixel, as a share of the range of values.

        Returns:
            By how much all other classes together are ahead of the own one, before it, at most 1.
        """
        logits = self._move(length, None, lambda logits: _own_lead(logits, self.labels))
        return -float(_own_lead(logits, self.labels))

    def _move(
        self, length: float, masks: Tensor | None, objective: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Step down an objective of the logits, and give the logits before."""
        span = self.high - self.low
        with torch.enable_grad():
            perturbation = self.perturbation.clone().requires_grad_()
            logits = self._logits(self.images, perturbation, masks)
            (gradient,) = torch.autograd.grad(objective(logits), perturbation)
        slope = gradient * span
        slope = slope / slope.abs().max().clamp_min(least_positive(slope))
        moved = self.perturbation - length * span * slope
        self.perturbation = torch.minimum(torch.maximum(moved, -span), span)
        return logits.detach()

    def approach(self, masks: Tensor | None = None) -> None:
        """Take all the steps of a search from no patch, with filter masks in force."""
        self.perturbation = torch.zeros_like(self.perturbation)
        for taken in range(_FAR_STEPS + _NEAR_STEPS):
            self.step(_length(taken), masks)

    def follow(self, masks: Tensor) -> None:
        """Take some steps more, after the masks have changed a little."""
        for _ in range(_FOLLOWING_STEPS):
            self.step(_NEAR, masks)

    def _sparse(self, perturbation: Tensor) -> Tensor:
        """Put back all pixels but those that are changed most."""
        span = self.high - self.low
        change = (perturbation / span.clamp_min(least_positive(span))).abs().sum(1).flatten()
        kept = torch.zeros_like(change)
        kept[change.topk(self._pixels).indices] = 1.0
        return perturbation * kept.reshape(1, 1, *perturbation.shape[2:])


def _own_lead(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean logit of the true class above all others together, as far as images are in it."""
    return leads(logits, labels).clamp_min(_LOST).mean()


def _length(taken: int) -> float:
    return _FAR if taken < _FAR_STEPS else _NEAR


class PatchSearch:
    """Measures for each class how far a patch drives images to it.

    Args:
        subject: The network.
        data: The defense set.
        classes: The classes to try; may be set later, before the first step.
        seed: Seed of the images.
        batch_size: Most images that the network sees at a time.

    Attributes:
        patch_margins: For every class, when finished: the mean margin of the class over images of
            others under the patch made for it, as a multiple of the usual distance to a class, so
            that it is about -1 without a patch and 0 on the border.
    """

    def __init__(
        self,
        subject: Subject,
        data: DefenseSet,
        classes: Sequence[int],
        seed: int,
        batch_size: int = 128,
    ) -> None:
        self.subject = subject
        self.data = data
        self.classes = list(classes)
        self.seed = seed
        self.batch_size = batch_size
        self.patch_margins: dict[int, float] = {}
        self._starts: list[float] = []
        self._ends: list[float] = []
        self._taken = 0
        self._trigger: PatchTrigger | None = None

    @property
    def finished(self) -> bool:
        """Whether all classes are done."""
        return bool(self.patch_margins)

    @staticmethod
    def most_steps_of(total: int) -> int:
        """The number of steps for a network of so many classes."""
        return min(total, MOST_CLASSES) * (_FAR_STEPS + _NEAR_STEPS)

    def most_steps(self) -> int:
        """The number of steps left."""
        return self.most_steps_of(len(self.classes) - len(self._ends)) - self._taken

    def step(self) -> dict[str, float]:
        """Take one step towards the current class.

        Returns:
            The mean ``margin`` before it.
        """
        self._trigger = self._trigger or self.trigger(self.classes[len(self._ends)])
        margin = self._trigger.step(_length(self._taken))
        if not self._taken:
            self._starts.append(margin)
        self._taken += 1
        if self._taken == self.most_steps_of(1):
            with torch.no_grad():
                self._ends.append(float(self._trigger.margins().mean()))
            self._trigger, self._taken = None, 0
        if len(self._ends) == len(self.classes):
            usual = max(-statistics.median(self._starts), _LEAST_DISTANCE)
            relative = (end / usual for end in self._ends)
            self.patch_margins = dict(zip(self.classes, relative, strict=True))
        return {"margin": margin}

    def trigger(self, target: int) -> PatchTrigger:
        """Begin a patch to one class, on images of other classes drawn from the seed.

        Args:
            target: The class.
        """
        device, count = self.subject.device, min(_IMAGES, self.batch_size)
        images, labels = self.data.others(target, count, device, (self.seed, "patch", target))
        low, high = (bound.to(device) for bound in value_range(self.data.images))
        goals = torch.full_like(labels, target)
        return PatchTrigger(self.subject, images, labels, goals, low, high)

    def state_dict(self) -> dict[str, Any]:
        """Give the state as tensors and primitives."""
        return {
            "classes": list(self.classes),
            "patch_margins": dict(self.patch_margins),
            "starts": list(self._starts),
            "ends": list(self._ends),
            "taken": self._taken,
            "perturbation": None if self._trigger is None else self._trigger.perturbation,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.classes = [int(index) for index in state["classes"]]
        self.patch_margins = {
            int(index): float(value) for index, value in state["patch_margins"].items()
        }
        self._starts = [float(value) for value in state["starts"]]
        self._ends = [float(value) for value in state["ends"]]
        self._taken = int(state["taken"])
        self._trigger = None
        if state["perturbation"] is not None:
            self._trigger = self.trigger(self.classes[len(self._ends)])
            self._trigger.perturbation = state["perturbation"].to(self.subject.device)


def patch_ratio(patch_margins: dict[int, float]) -> tuple[int, float]:
    """Compare the class that a patch drives images to furthest with the others.

    Args:
        patch_margins: How far a patch takes images to each class, two classes or more, see
            :class:`PatchSearch`.

    Returns:
        That class, and how much further that is than for the median of the others, in multiples of
        the usual distance; 0 where a figure is not finite.

    Example:
        >>> patch_ratio({0: -0.25, 1: 1.5, 2: 0.25, 3: -0.5})
        (1, 1.75)
    """
    furthest = max(patch_margins, key=patch_margins.__getitem__)
    others = (value for index, value in patch_margins.items() if index != furthest)
    normal = statistics.median(others)
    finite = all(math.isfinite(value) for value in patch_margins.values())
    return furthest, patch_margins[furthest] - normal if finite else 0.0

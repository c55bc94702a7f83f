"""Patches: a few pixels, the same in all images, that stand in for an unknown trigger.

A patch may change few pixels, each by any amount. If the network's trigger is a patch, then some
patch drives images to the target class much further than patches drive them to other classes. A
perturbation that changes every pixel a little takes another, shorter way, and does not show it
(compare Neural Cleanse, Wang et al., 2019, which looks for the smallest mask of pixels instead,
class by class, with many more steps).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_mnp.config import Constants
from lightning_mnp.report import Signal
from lightning_mnp.signals.base import Search
from lightning_mnp.signals.logits import goal_margins, leads, least_positive, push_loss
from lightning_mnp.signals.pattern import PatternSignal, PatternTrace
from lightning_mnp.signals.pattern_trigger import PatternTrigger
from lightning_mnp.signals.pile_up import PileUp
from lightning_mnp.signals.trace import Trace

__all__ = ["PatchConstants", "PatchSearch", "PatchTrigger", "patch_ratio"]


@dataclass(frozen=True)
class PatchConstants:
    """How a patch is made, and when it counts.

    Steps are long at first, so that pixels can be exchanged for better ones, then shorter. The
    pixels that are covered become fewer during the long ones: a patch that is small from the first
    step on stays where the first gradient has put it.

    Attributes:
        counts_from: How far one class stands out, from where it counts fully, see
            :func:`~lightning_mnp.signals.standout.find_standout`.
        far_counts_from: The same if the patch takes images far.
        agreeing_counts_from: The same if the patch takes images far, and predictions pile up on
            the class after clean suppression.
        arrives_from: How far the patch takes images to the class, from where that counts fully; in
            multiples of the usual distance to a class.
        far_from: From there on, it takes them far.
        piled_from: How far the pile-up has to stand out.
        trace_from: How much further than usual a patch takes images to one class, from where it is
            a trace for pruning; in multiples of the usual distance to a class.
        share: Share of the pixels that a patch may cover.
        first_share: The same at the first step. During the long steps it falls to ``share``, by
            the same factor each time.
        shrinks_from: Number of pixels at the end, below which a patch is small from the first step
            on. On images of 8x8 pixels, where 3 are left, the best of half the image stood out in
            clean networks.
        far_steps: Number of long steps.
        far: Largest change of a pixel in each of these, as a share of the range of values.
        near_steps: Number of short steps.
        near: Largest change of a pixel in each of these.
        lost: An image whose own class is behind the others by so many logits is driven away no
            further.
    """

    counts_from: float = 1.5
    far_counts_from: float = 1.15
    agreeing_counts_from: float = 0.5
    arrives_from: float = 1.0
    far_from: float = 2.5
    piled_from: float = 2.5
    trace_from: float = 0.85
    share: float = 0.05
    first_share: float = 0.5
    shrinks_from: int = 10
    far_steps: int = 8
    far: float = 0.5
    near_steps: int = 12
    near: float = 0.2
    lost: float = -1.0


class PatchTrigger(PatternTrigger):
    """A pattern of few pixels that is added to every image.

    The sum is kept in the range of values, so that a patch can replace a pixel as well as change
    it. Each step follows the gradient and keeps the pixels that are changed most. The arguments
    are those of :class:`~lightning_mnp.signals.pattern_trigger.PatternTrigger`.

    Attributes:
        pattern: What is added, shape (1, C, ...), zero but for a few pixels.

    Example:
        >>> from torch import nn
        >>> from lightning_mnp.surgery.layers import find_filter_layers
        >>> from lightning_mnp.surgery.masked_network import MaskedNetwork
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> images, labels = torch.rand(8, 1, 2, 2), torch.zeros(8, dtype=torch.long)
        >>> masked = MaskedNetwork(network, find_filter_layers(network, images))
        >>> zero, one = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
        >>> patch = PatchTrigger(masked, images, labels, labels + 1, zero, one)
        >>> before = patch.margins().mean()
        >>> for _ in range(5):
        ...     _ = patch.step(0.2)
        >>> bool(patch.margins().mean() > before), int((patch.pattern != 0).sum())
        (True, 1)
    """

    name = "patch"

    @property
    def _patch(self) -> PatchConstants:
        return self.constants.of(PatchConstants)

    @property
    def steps(self) -> int:
        """The number of steps in which a patch is made."""
        return self._patch.far_steps + self._patch.near_steps

    def blank(self) -> Tensor:
        """Return a patch that changes nothing."""
        return torch.zeros_like(self.images[:1])

    def applied(self, images: Tensor, pattern: Tensor) -> Tensor:
        """Add a patch to images, within the range of values.

        Args:
            images: Shape (N, C, ...).
            pattern: The patch.
        """
        # Not `clamp`: the slope of a pixel on the border of the range is another one there.
        return torch.minimum(torch.maximum(images + pattern, self.low), self.high)

    @property
    def limits(self) -> tuple[Tensor, Tensor]:
        """Any value can be made of any other."""
        return -self.unit, self.unit

    def length(self, taken: int) -> float:
        """Return the largest change of a pixel in the step that follows so many.

        Args:
            taken: Steps taken so far.
        """
        return self._patch.far if taken < self._patch.far_steps else self._patch.near

    def step(self, length: float, masks: Tensor | None = None) -> float:
        """Take one step towards the classes that images are pushed to.

        Args:
            length: Largest change of a pixel, as a share of the range of values.
            masks: Filter masks that are in force.

        Returns:
            The mean margin before it.
        """
        return self._step(length, masks, self._patch.share)

    def advance(self, taken: int, masks: Tensor | None = None) -> float:
        """Take the step that follows so many, with the pixels that may be covered by then.

        Args:
            taken: Steps taken so far.
            masks: Filter masks that are in force.

        Returns:
            The mean margin before it.
        """
        return self._step(self.length(taken), masks, self.share(taken))

    def share(self, taken: int) -> float:
        """Return the share of the pixels that may be covered after the step that follows so many.

        Args:
            taken: Steps taken so far.
        """
        patch = self._patch
        few = round(patch.share * self.pattern[0, 0].numel()) < patch.shrinks_from
        if few or taken >= patch.far_steps:
            return patch.share
        fall = (patch.share / patch.first_share) ** (taken / patch.far_steps)
        return float(patch.first_share * fall)

    def disturb(self, length: float) -> float:
        """Take one step away from the images' own classes, with any number of pixels.

        Args:
            length: Largest change of a pixel, as a share of the range of values.

        Returns:
            By how much all other classes together are ahead of the own one, before it, at most 1.
        """
        logits = self._move(length, None, self._own_lead)
        return -float(self._own_lead(logits))

    def _step(self, length: float, masks: Tensor | None, share: float) -> float:
        """Take one step, and put back all pixels but a share of them."""
        logits = self._move(
            length, masks, lambda logits: push_loss(logits, self.labels, self.goals)
        )
        self.pattern = self._sparse(self.pattern, share)
        return float(goal_margins(logits, self.labels, self.goals).mean())

    def _move(
        self, length: float, masks: Tensor | None, objective: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Step down an objective of the logits, and return the logits before."""
        slope, logits = self.slope(masks, objective)
        slope = slope / slope.abs().max().clamp_min(least_positive(slope))
        self.pattern = self.limited(self.pattern - length * self.unit * slope)
        return logits

    def _sparse(self, pattern: Tensor, share: float) -> Tensor:
        """Put back all pixels but those that are changed most."""
        change = (pattern / self.unit.clamp_min(least_positive(self.unit))).abs().sum(1).flatten()
        kept = torch.zeros_like(change)
        kept[change.topk(max(1, round(share * len(change)))).indices] = 1.0
        return pattern * kept.reshape(1, 1, *pattern.shape[2:])

    def _own_lead(self, logits: Tensor) -> Tensor:
        """Mean logit of the true class above all others together, as far as images are in it."""
        return leads(logits, self.labels).clamp_min(self._patch.lost).mean()


class PatchSearch(PatternSignal[PatchTrigger]):
    """Measures for each class how far a patch on few pixels drives images to it.

    Args:
        scene: What it works on.
    """

    name = "patch"
    kind = PatchTrigger
    what = "a patch on few pixels drives images to"

    @classmethod
    def class_steps(cls, constants: Constants) -> int:
        """Return the number of steps for each class.

        Args:
            constants: Constants that differ from their defaults.
        """
        patch = constants.of(PatchConstants)
        return patch.far_steps + patch.near_steps

    @property
    def counts_from(self) -> float:
        """How far the class has to stand out to count fully.

        Less is enough where the patch takes images far beyond the border of the class, as the
        trigger of a backdoor does. Still less is enough where the pile-up points to the class, too.
        """
        constants, furthest = self.scene.constants.of(PatchConstants), self.furthest
        if not self.margins[furthest] >= constants.far_from:  # NaN is not far
            return constants.counts_from
        piled = PileUp(self.scene).standout() if self.scene.runs else None
        if piled is None or piled.target_class != furthest or piled.value < constants.piled_from:
            return constants.far_counts_from
        return constants.agreeing_counts_from

    @property
    def furthest(self) -> int:
        """The class that a patch takes images to furthest."""
        return max(self.margins, key=self.margins.__getitem__)

    def signal(self) -> Signal:
        """Return how far that class stands out; little counts if images hardly arrive there."""
        signal = super().signal()
        arrives_from = self.scene.constants.of(PatchConstants).arrives_from
        arrived = max(self.margins[self.furthest], 0.0)
        if not arrived < min(1.0, signal.strength) * arrives_from:
            return signal
        reason = (
            f"{signal.reason}; but images get there by {arrived:.2f} of the usual distance only "
            f"(counts fully from {arrives_from:g})"
        )
        return replace(signal, strength=arrived / arrives_from, reason=reason)

    @property
    def figures(self) -> dict[int, float]:
        """How far a patch takes images to each class."""
        return self.margins

    def traces(self, target: int | None, searches: Mapping[str, Search]) -> list[Trace]:
        """Return images under a patch, if patches drive images to the class further than usual.

        Args:
            target: The suspected class.
            searches: All finished searches, by name.
        """
        furthest, excess = patch_ratio(self.margins)
        trace_from = self.scene.constants.of(PatchConstants).trace_from
        if target is None or furthest != target or excess <= trace_from:
            return []
        return [PatternTrace(self.trigger(target))]


def patch_ratio(patch_margins: Mapping[int, float]) -> tuple[int, float]:
    """Compare the class that a patch drives images to furthest with the others.

    Args:
        patch_margins: How far a patch takes images to each class, two classes or more, see
            :class:`~lightning_mnp.signals.pattern.PatternSearch`.

    Returns:
        That class, and how much further that is than for the median of the others, in multiples of
        the usual distance; 0 if a figure is not finite.

    Example:
        >>> patch_ratio({0: -0.25, 1: 1.5, 2: 0.25, 3: -0.5})
        (1, 1.75)
    """
    furthest = max(patch_margins, key=patch_margins.__getitem__)
    others = (value for index, value in patch_margins.items() if index != furthest)
    normal = statistics.median(others)
    finite = all(math.isfinite(value) for value in patch_margins.values())
    return furthest, patch_margins[furthest] - normal if finite else 0.0

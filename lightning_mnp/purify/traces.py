"""Where a backdoor shows without its trigger: margins of its target class, to be pruned away."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_mnp.config import MNPConfig
from lightning_mnp.defense_data.defense_set import LEAST_BATCH, DefenseSet, seeded_generator
from lightning_mnp.signals.margin import MarginAscent, margin_ratio
from lightning_mnp.signals.patch import patch_ratio
from lightning_mnp.signals.pattern import PatternTrigger, pattern_lead
from lightning_mnp.signals.reach import SurrogateTrigger, goal_margins, leads, reach_ratio
from lightning_mnp.signals.registry import Surrogates
from lightning_mnp.signals.verdict import OVERLAY_AT, PATCH_AT, WARP_AT, Signal
from lightning_mnp.surgery.masked_network import MaskedNetwork, Statistics, Weights

__all__ = [
    "LEAST_STRENGTH",
    "MarginSource",
    "PatternSource",
    "PerturbationSource",
    "Source",
    "SuppressedSource",
    "find_sources",
    "strength",
]

# A source that is as weak as this from the start has nothing to give.
LEAST_STRENGTH = 1.0
# Margins below this no longer count: the images are back in their own class.
_LOWEST_MARGIN = -1.0
# At most; a source's images go through the network at once, so never more than a batch.
_IMAGES = 128
_MARGIN_IMAGES = 8
# A class that is reached at this share of the median reach, or has this multiple of the next
# greatest margin, is nothing out of the ordinary.
_NORMAL_REACH = 0.8
_NORMAL_MARGIN = 1.5
# Length of the perturbation where the reach points to the class, in multiples of the median reach.
_SHORT_REACH = 0.6
# Where the margin points to the class and the reach does not: a perturbation far longer than one
# needs, in multiples of the median reach, drives many images up the same way at once.
_LONG_REACH = 2.4
_FIRST_STEPS = 20
_NEXT_STEPS = 3
_FIRST_ASCENT = 60
_NEXT_ASCENT = 10


class Source(Protocol):
    """Something in which a backdoor shows.

    Attributes:
        name: What it is.
        decides: Whether filters are turned down as long as the backdoor shows in this source.
    """

    name: str
    decides: bool

    def is_weak(self, found: float, before: float) -> bool:
        """Whether a strength, of so much at the start, is no reason to turn filters down."""

    def shows_little(self, found: float, before: float) -> bool:
        """Whether such a strength is next to nothing."""

    def margins(self, masks: Tensor) -> Tensor:
        """Margins of the target class under filter masks, shape (N,); large for a backdoor."""

    def adapt(self, masks: Tensor, taken: int) -> None:
        """Follow the network as it is after so many steps were taken; thoroughly after none."""

    def state_dict(self) -> dict[str, Any]:
        """Give what :meth:`adapt` changes, as tensors and primitives."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""


def strength(source: Source, masks: Tensor) -> Tensor:
    """Tell how strongly a backdoor shows in a source: the mean margin, as far as margins count.

    Args:
        source: The source.
        masks: Filter masks, shape (total filters,).

    Returns:
        A scalar, 0 where all images are clearly in their own class again.
    """
    return source.margins(masks).clamp_min(_LOWEST_MARGIN).mean() - _LOWEST_MARGIN


class _Judged:
    """Judges by the share of its strength at the start, and by strength itself; NaN is neither."""

    weak_at = 0.25
    little_at = 0.1
    weak_below = math.inf

    def is_weak(self, found: float, before: float) -> bool:
        """Whether a strength, of so much at the start, is no reason to turn filters down."""
        return found <= min(self.weak_at * before, self.weak_below)

    def shows_little(self, found: float, before: float) -> bool:
        """Whether such a strength is next to nothing."""
        return found <= min(self.little_at * before, self.weak_below)


class SuppressedSource(_Judged):
    """Clean images in the suppressed network, whose predictions pile up on the target class.

    Clean suppression leaves the filters of a backdoor as they are and breaks others; what then
    still pulls clean images to the target class are the filters looked for.

    Args:
        masked: The network.
        weights: The suppressed weights of each run.
        images: Clean images, shape (N, C, ...), which the runs share.
        goals: The class, other than its own, that a backdoor takes each image to, shape (N,).
        decides: Whether filters are turned down as long as predictions pile up.
    """

    name = "suppressed network"

    def __init__(
        self,
        masked: MaskedNetwork,
        weights: Sequence[Weights],
        images: Tensor,
        goals: Tensor,
        decides: bool = True,
    ) -> None:
        runs = max(1, min(len(weights), len(images) // LEAST_BATCH))
        self.masked = masked
        self.images = images
        self.goals = goals
        self.decides = decides
        self.weights = [
            {name: weight.detach() for name, weight in each.items()} for each in weights[-runs:]
        ]

    def margins(self, masks: Tensor) -> Tensor:
        """Logit of the goal above all others together (their log-sum-exp), shape (N,)."""
        parts = self.images.tensor_split(len(self.weights))
        few = len(self.images) < LEAST_BATCH  # to be normalized by their own statistics
        statistics: Statistics | None = "running" if few else None
        logits = torch.cat(
            [
                self.masked(part, weights=weights, masks=masks, statistics=statistics)
                for part, weights in zip(parts, self.weights, strict=True)
            ]
        )
        return leads(logits, self.goals)

    def adapt(self, masks: Tensor, taken: int) -> None:
        """Do nothing: weights and images stay."""

    def state_dict(self) -> dict[str, Any]:
        """Give nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing."""


class PerturbationSource(_Judged):
    """Clean images under one perturbation for all of them.

    Args:
        masked: The network.
        images: Clean images of other classes, shape (N, C, ...).
        labels: Their classes, shape (N,).
        target: The target class.
        perturbation: Where to begin, shape (1, C, ...).
        length: Greatest l2 norm.
        seed: Seed of the images that each step looks at.
    """

    name = "universal perturbation"
    decides = True

    def __init__(
        self,
        masked: MaskedNetwork,
        images: Tensor,
        labels: Tensor,
        target: int,
        perturbation: Tensor,
        length: float,
        seed: int,
    ) -> None:
        self.images, self.labels, self.seed = images, labels, seed
        self.goals = torch.full_like(labels, target)
        self.trigger = SurrogateTrigger(masked, target, perturbation, length)

    def margins(self, masks: Tensor) -> Tensor:
        """Logit of the target above that of the true class, shape (N,)."""
        logits = self.trigger.logits(self.images, masks)
        return goal_margins(logits, self.labels, self.goals)

    def adapt(self, masks: Tensor, taken: int) -> None:
        """Take some steps of the perturbation."""
        for step in range(_NEXT_STEPS if taken else _FIRST_STEPS):
            generator = seeded_generator(self.seed, "perturbation", taken, step)
            rows = torch.randperm(len(self.images), generator=generator)[:100]
            images, labels = self.images[rows], self.labels[rows]
            self.trigger.ascend(images, labels, 0.15 * self.trigger.limit, masks)

    def state_dict(self) -> dict[str, Any]:
        """Give the perturbation."""
        return {"perturbation": self.trigger.perturbation}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.trigger.perturbation = state["perturbation"].to(self.images.device)


class MarginSource(_Judged):
    """Images of greatest margin for the target class, as far as they exceed what is normal.

    Args:
        ascent: Images on their way to the target class.
        normal: Greatest margin among the other classes, in logits.
    """

    name = "greatest margin"
    decides = True

    def __init__(self, ascent: MarginAscent, normal: float) -> None:
        self.ascent = ascent
        self.normal = normal

    def margins(self, masks: Tensor) -> Tensor:
        """Margins above the normal one, shape (N,)."""
        return self.ascent.margins(masks) - self.normal

    def adapt(self, masks: Tensor, taken: int) -> None:
        """Take some steps of the images."""
        self.ascent.velocity.zero_()
        for _ in range(_NEXT_ASCENT if taken else _FIRST_ASCENT):
            self.ascent.step(masks)

    def state_dict(self) -> dict[str, Any]:
        """Give the images."""
        return {"images": self.ascent.images}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.ascent.images = state["images"].to(self.ascent.images.device)


class PatternSource(_Judged):
    """Clean images under one pattern for all of them.

    Args:
        trigger: A pattern that has not been made yet.
    """

    decides = True
    # A tenth of what a strong backdoor shows still takes most images to the target. This is half a
    # logit above their own class, where no pattern of that size gets images in an ordinary network.
    weak_below = 1.5

    def __init__(self, trigger: PatternTrigger) -> None:
        self.trigger = trigger
        self.name = trigger.name

    def margins(self, masks: Tensor) -> Tensor:
        """Logit of the class pushed to above that of the true class, shape (N,)."""
        return self.trigger.margins(masks)

    def adapt(self, masks: Tensor, taken: int) -> None:
        """Take some steps of the pattern."""
        if not taken:
            self.trigger.approach(masks)
        else:
            self.trigger.follow(masks)

    def state_dict(self) -> dict[str, Any]:
        """Give the pattern."""
        return {"pattern": self.trigger.pattern}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.trigger.pattern = state["pattern"].to(self.trigger.images.device)


def find_sources(
    masked: MaskedNetwork,
    data: DefenseSet,
    suppressed: Sequence[Weights],
    believed: Signal,
    surrogates: Surrogates,
    config: MNPConfig,
) -> list[Source]:
    """Collect what shows the suspected backdoor.

    The suppressed network always does. Where the reach of the class is out of the ordinary, a
    universal perturbation of a length that does not suffice for other classes is added; where its
    margin is, images of greatest margin are, and with an ordinary reach a long perturbation; where
    patches drive images to it further than to others, or overlays or warps do and get them there,
    images under one are.
    Where a patch exchanges classes, images under that patch are all there is beside the suppressed
    network. The suppressed network decides on how long filters are turned down where the pile-up is
    that signal or it is the only source: what is left of a pile-up need not be the backdoor.

    Args:
        masked: The network.
        data: The defense set.
        suppressed: The suppressed weights of each run.
        believed: The signal most to be believed, which tells the suspected class, if it is one.
        surrogates: The searches for surrogate triggers, finished.
        config: Options.
    """
    seed = config.seed
    device, target = masked.device, believed.suspect
    margin = surrogates.margin
    count = min(_IMAGES, margin.batch_size)
    if target is None:
        permutation = surrogates.permutation
        images, goals = permutation.images(count)
        exchanged = SuppressedSource(masked, suppressed, images, goals, decides=False)
        return [exchanged, PatternSource(permutation.trigger())]
    images, labels = data.others(target, count, device, (seed, "sources"))
    sources: list[Source] = []
    soonest, ratio, median = reach_ratio(surrogates.reach.reaches)
    greatest, excess, normal = margin_ratio(margin.margins)
    near = soonest == target and ratio < _NORMAL_REACH
    sure = greatest == target and excess > _NORMAL_MARGIN
    if near or sure:
        length = (_SHORT_REACH if near else _LONG_REACH) * median * surrogates.reach.scale
        start = surrogates.reach.perturbations[target]
        sources.append(PerturbationSource(masked, images, labels, target, start, length, seed))
    if sure:
        sources.append(
            MarginSource(margin.ascent(target, min(_MARGIN_IMAGES, margin.batch_size)), normal)
        )
    furthest, further = patch_ratio(surrogates.patch.margins)
    if furthest == target and further > PATCH_AT:
        sources.append(PatternSource(surrogates.patch.trigger(target)))
    for search, value in ((surrogates.overlay, OVERLAY_AT), (surrogates.warp, WARP_AT)):
        if search is None:
            continue
        nearest, lead = pattern_lead(search.rises)
        # Where images do not arrive, there is nothing in them to be pruned away.
        if nearest == target and lead > value and search.margins[target] > 0:
            sources.append(PatternSource(search.trigger(target)))
    decides = believed.name == "pile-up" or not sources
    goals = torch.full_like(labels, target)
    return [SuppressedSource(masked, suppressed, images, goals, decides), *sources]

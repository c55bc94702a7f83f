"""Greedy pruning: filters taken in steps, worst first, until the traces of a backdoor are gone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_mnp.config import Constants
from lightning_mnp.defense_data.defense_set import DefenseSet, seeded_generator
from lightning_mnp.purify.harm import CleanHarm, HarmConstants
from lightning_mnp.signals.logits import class_margins
from lightning_mnp.signals.trace import Trace, TraceConstants, strength
from lightning_mnp.surgery.masked_network import MaskedNetwork

__all__ = ["GreedyConstants", "GreedyPruning"]


@dataclass(frozen=True)
class GreedyConstants:
    """How the next filters are chosen, and when it is enough.

    Attributes:
        candidates: Filters that are looked at in each step, best first.
        glance_images: Images of a glance at the harm of each; what that lets pass is measured on
            all of them.
        glance_slack: What a glance lets pass, in multiples of the harm that a step may do.
        rejected: Greedy pruning ends when so many filters have been too harmful lately.
        patience: A filter that was too harmful is tried again after so many steps.
        slope_images: Images that the slope of the clean margin is taken on.
        least_effect: Least effect of a candidate, as a share of the largest.
        harm_weight: What the slope of a clean margin counts as a rise of the clean loss, roughly.
        harm_floor: Added to every harm, in nats, so that no effect is divided by nothing.
        harmless: All candidates are taken in one step if together they do no more harm than this
            times their number.
        little_harm: Share of the harm allowed that filters may do once little of the backdoor
            shows.
        gone_at: All traces that decide are as good as gone at this share of their strength at the
            start; with 0, they never are, and pruning goes on as long as harm allows.
        again: Filters that are taken after that, as a multiple of those taken until then, since
            traces can be gone before the backdoor is.
    """

    candidates: int = 4
    glance_images: int = 125
    glance_slack: float = 2.0
    rejected: int = 24
    patience: int = 4
    slope_images: int = 250
    least_effect: float = 0.05
    harm_weight: float = 0.1
    harm_floor: float = 0.005
    harmless: float = 0.001
    little_harm: float = 0.25
    gone_at: float = 0.1
    again: float = 1.0


class GreedyPruning:
    """Takes filters that carry the target class and that clean images do without.

    In each step, the first-order effect of every filter on the margins of the traces is set
    against its first-order effect on clean margins. The best four go at once if that does next to
    no harm (:class:`CleanHarm`). Else a glance at few images tells which of them has the most
    effect for its harm, and that one goes, if all images agree. It ends when the traces are gone
    and as many filters again were taken, at the most filters, or when all that is left is too
    harmful: one step may do half of the harm allowed, all of them as much as is allowed above the
    least on the way. The last filter of a layer is never taken.

    Args:
        masked: The network.
        clean: Clean images, by which harm is measured; the last set gives the slopes.
        traces: Where the backdoor shows.
        most: The most filters to take.
        harm: The most harm allowed, in nats.
        batch_size: Most images in a batch.
        seed: Seed of everything that is drawn.
        impurity: The share of clean images that may be poisoned after all.
        constants: Constants that differ from their defaults.

    Attributes:
        taken: Positions of the filters taken so far, in their order.
        spared: Positions of filters that were not tried, because each is the last of its layer.
        counts: The number of filters taken before the first step and after each.
        curve: For each of these, the harm, then for each trace its mean margin as a share of that
            at the start.
        references: The strength of each trace at the start, or what it counts for at least.
        stopped: Why it ended, or "".
    """

    def __init__(
        self,
        masked: MaskedNetwork,
        clean: Sequence[DefenseSet],
        traces: Sequence[Trace],
        most: int,
        harm: float,
        batch_size: int,
        seed: int,
        impurity: float = 0.0,
        constants: Constants | None = None,
    ) -> None:
        constants = constants or Constants()
        self.constants = constants.of(GreedyConstants)
        self._least = constants.of(TraceConstants).least_strength
        self.masked = masked
        self.clean = list(clean)
        self.traces = list(traces)
        self.most = most
        self.harm = harm
        self.batch_size = batch_size
        self.seed = seed
        self.taken: list[int] = []
        self.spared: list[int] = []
        self.counts: list[int] = []
        self.curve: list[tuple[float, ...]] = []
        self.stopped = ""
        self._rejected: dict[int, int] = {}
        self.references: list[float] = []
        limits = constants.of(HarmConstants)
        self._measure = CleanHarm(masked, clean, batch_size, impurity, limits)
        # In the order that is stored, classes may come one after the other.
        seen = clean[-1]
        drawn = torch.randperm(len(seen), generator=seeded_generator(seed, "glance"))
        rows = drawn[: self.constants.glance_images]
        few = DefenseSet(seen.images[rows], seen.labels[rows])
        # The same harm as on all images: the rise of their loss is trusted as much.
        enough = max(1, round(limits.enough_images * len(rows) / len(seen)))
        likewise = replace(limits, enough_images=enough)
        self._glance = CleanHarm(masked, [few], batch_size, impurity, likewise)
        self._glanced: tuple[int, float] | None = None
        self._slopes: tuple[int, Tensor, Tensor] | None = None

    @property
    def gone(self) -> bool:
        """Whether the traces that decide are as good as gone by now."""
        return bool(self.curve) and self._are_gone(self.curve[-1][1:])

    def _are_gone(self, levels: Sequence[float]) -> bool:
        least, pairs = self.constants.gone_at, zip(self.traces, levels, strict=True)
        decisive = [level for trace, level in pairs if trace.decides]
        return least > 0 and bool(decisive) and all(level <= least for level in decisive)

    @property
    def _enough(self) -> bool:
        """Whether the traces that decide were gone, and as many filters again were taken."""
        for count, point in zip(self.counts, self.curve, strict=True):
            if count and self._are_gone(point[1:]):
                return len(self.taken) >= (1 + self.constants.again) * count
        return False

    def masks(self, without: Sequence[int] = ()) -> Tensor:
        """Return masks with zeros for the filters taken, and for others, shape (total filters,).

        Args:
            without: Positions of these others.
        """
        values = torch.ones(self.masked.layers.total, device=self.masked.device)
        values[[*self.taken, *without]] = 0.0
        return values

    def step(self) -> dict[str, float]:
        """Begin, take one or more filters, or end.

        Returns:
            The number of ``filters``, the ``harm`` in nats, and the greatest
            ``margin`` of a trace as a share of that at the start.
        """
        if not self.curve:
            self._begin()
        elif not self.stopped:
            self._take_next()
        harm, *levels = self.curve[-1]
        return {"filters": float(len(self.taken)), "harm": harm, "margin": max(levels)}

    def _begin(self) -> None:
        masks = self.masks()
        for trace in self.traces:
            trace.adapt(masks, 0)
        self.references = [max(level, self._least) for level in self._levels()]
        self._note(0.0)

    def _take_next(self) -> None:
        if self._enough:
            self.stopped = "the traces were gone, and as many filters again were taken"
            return
        if len(self.taken) >= self.most:
            self.stopped = f"the most filters, {self.most}, were taken"
            return
        best = None
        while best is None and not self.stopped:
            best = self._best()
        if best is None:
            return
        self.taken += best[0]
        masks = self.masks()
        for trace in self.traces:
            trace.adapt(masks, len(self.counts))
        self._note(best[1])

    def _note(self, harm: float) -> None:
        levels = zip(self._levels(), self.references, strict=True)
        self.counts.append(len(self.taken))
        self.curve.append((harm, *(level / whole for level, whole in levels)))

    @torch.no_grad()
    def _levels(self) -> list[float]:
        """The strength of each trace."""
        masks = self.masks()
        return [float(strength(trace, masks)) for trace in self.traces]

    def _best(self) -> tuple[list[int], float] | None:
        """The best filters to take next, and the harm with them.

        None if all candidates of this step were too harmful, or it has ended.
        """
        promise, effect = self._promise()
        if not bool((promise > 0).any()):
            self.stopped = "no filter is left that lowers the margins"
            return None
        order = promise.argsort(descending=True, stable=True)[: self.constants.candidates].tolist()
        found = [index for index in order if promise[index] > 0]
        self.spared += [index for index in found if self._empties([index])]
        found = [index for index in found if index not in self.spared]
        best = self._all_of(found[: self.most - len(self.taken)]) or self._one_of(found, effect)
        if best is None and len(self._waiting()) >= self.constants.rejected:
            self.stopped = f"more filters would do more harm than {self.harm:g} nats"
        return best

    def _all_of(self, found: list[int]) -> tuple[list[int], float] | None:
        """All candidates and the harm with them, if it is next to none."""
        little = len(found) * self.constants.harmless
        if len(found) < 2 or self._empties(found) or not self._glance_at(found) <= little:
            return None
        harm = self.harm_of(self.masks(without=found))
        harmless = harm - self.curve[-1][0] <= little and harm <= self._most_now()
        return (found, harm) if harmless else None

    def _one_of(self, found: list[int], effect: Tensor) -> tuple[list[int], float] | None:
        """The best candidate that may go, and the harm with it; those too harmful will wait."""
        most, floor = self.constants.glance_slack * self.harm / 2, self.constants.harm_floor
        rises = {index: self._glance_at([index]) for index in found}
        passed = {index: rise for index, rise in rises.items() if rise <= most}
        values = {
            index: float(effect[index]) / (max(rise, 0.0) + floor) for index, rise in passed.items()
        }
        self._rejected.update(dict.fromkeys(rises.keys() - passed.keys(), len(self.counts)))
        for index in sorted(values, key=values.__getitem__, reverse=True):
            harm = self.harm_of(self.masks(without=[index]))
            if harm <= self._most_now():  # not so if it is NaN
                return [index], harm
            self._rejected[index] = len(self.counts)
        return None

    def _most_now(self) -> float:
        """The most harm that there may be after the next step."""
        return min(self._most_harm(), self.curve[-1][0] + self.harm / 2)

    def _glance_at(self, positions: Sequence[int]) -> float:
        """The rise of the harm without some more filters, on few images."""
        if self._glanced is None or self._glanced[0] != len(self.taken):
            self._glanced = len(self.taken), self._glance.of(self.masks())
        return self._glance.of(self.masks(without=positions)) - self._glanced[1]

    def _empties(self, positions: Sequence[int]) -> bool:
        """Whether a layer would be left without filters."""
        layers = self.masked.layers
        gone = [layers.locate(position)[0] for position in [*self.taken, *positions]]
        return any(gone.count(layer.name) >= layer.filters for layer in layers)

    def _most_harm(self) -> float:
        """The most harm that all filters together may do."""
        most = min(point[0] for point in self.curve) + self.harm
        for harm, *levels in self.curve:
            if self._shows_little(levels):
                return min(most, harm + self.constants.little_harm * self.harm)
        return most

    def _shows_little(self, levels: Sequence[float]) -> bool:
        """Whether next to nothing is left of the traces that decide."""
        shown = zip(self.traces, levels, self.references, strict=True)
        decisive = [
            trace.shows_little(level * before, before)
            for trace, level, before in shown
            if trace.decides
        ]
        return bool(decisive) and all(decisive)

    def _waiting(self) -> list[int]:
        """Filters that were too harmful a short while ago."""
        since = len(self.counts) - self.constants.patience
        return [index for index, count in self._rejected.items() if count > since]

    def _promise(self) -> tuple[Tensor, Tensor]:
        """First-order effect on the traces' margins for the harm, and that effect, each filter."""
        if self._slopes is None or self._slopes[0] != len(self.taken):
            self._slopes = len(self.taken), self._effect(), self._clean_slope()
        _, effect, slope = self._slopes
        effect = effect.nan_to_num(0.0, 0.0, 0.0)  # nothing is known of such filters
        effect[[*self.taken, *self.spared]] = 0.0
        effect[self._waiting()] = 0.0
        constants = self.constants
        least = constants.least_effect * effect.max()
        effect = effect.where(effect >= least, 0.0).clamp_min(0.0)
        harm = constants.harm_weight * slope.abs() + constants.harm_floor
        promise = effect / harm
        return promise.nan_to_num(0.0), effect

    def _effect(self) -> Tensor:
        """First-order effect of every filter on the margins of all traces."""
        effect = torch.zeros(self.masked.layers.total, device=self.masked.device)
        for trace, reference in zip(self.traces, self.references, strict=True):
            masks = self.masks().requires_grad_()
            with torch.enable_grad():
                effect += torch.autograd.grad(strength(trace, masks), masks)[0] / reference
        return effect

    def _clean_slope(self) -> Tensor:
        """Gradient, with respect to the masks, of the mean clean margin, shape (total filters,)."""
        # The former name of this stage is part of the seed: another would draw other images.
        key = (self.seed, "search", len(self.taken))
        data = self.clean[-1]
        drawn = torch.randperm(len(data), generator=seeded_generator(*key))
        rows = drawn[: self.constants.slope_images]
        device = self.masked.device
        slope = torch.zeros(self.masked.layers.total, device=device)
        for part in rows.split(self.batch_size):
            images, labels = data.images[part].to(device), data.labels[part].to(device)
            masks = self.masks().requires_grad_()
            with torch.enable_grad():
                logits = self.masked(images, masks=masks, statistics="running")
                total = class_margins(logits, labels).sum()
                slope += torch.autograd.grad(total, masks)[0]
        return slope / len(rows)

    def harm_of(self, masks: Tensor) -> float:
        """Measure the harm of masks, in nats.

        Args:
            masks: Filter masks, shape (total filters,).
        """
        return self._measure.of(masks)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and primitives."""
        return {
            "taken": list(self.taken),
            "spared": list(self.spared),
            "counts": list(self.counts),
            "curve": [list(point) for point in self.curve],
            "stopped": self.stopped,
            "rejected": dict(self._rejected),
            "reference": list(self.references),
            "traces": [trace.state_dict() for trace in self.traces],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.taken = [int(index) for index in state["taken"]]
        self.spared = [int(index) for index in state["spared"]]
        self.counts = [int(count) for count in state["counts"]]
        self.curve = [tuple(float(value) for value in point) for point in state["curve"]]
        self.stopped = str(state["stopped"])
        self._slopes = self._glanced = None
        self._rejected = {int(index): int(count) for index, count in state["rejected"].items()}
        self.references = [float(value) for value in state["reference"]]
        for trace, part in zip(self.traces, state["traces"], strict=True):
            trace.load_state_dict(part)

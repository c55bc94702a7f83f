"""Greedy pruning: filters taken one by one, worst first, as many as clean images can do without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    """How the next filter is chosen.

    Attributes:
        candidates: Filters whose harm is measured in each step, best first.
        rejected: Greedy pruning ends when so many filters have been too harmful lately.
        patience: A filter that was too harmful is tried again after so many others.
        slope_images: Images that the slope of the clean margin is taken on.
        least_effect: Least effect of a candidate, as a share of the largest.
        harm_weight: What the slope of a clean margin counts as a rise of the clean loss, roughly.
        harm_floor: Added to every harm, in nats, so that no effect is divided by nothing.
        harmless: A filter that does no more harm than this is taken without looking further.
        little_harm: Share of the harm allowed that filters may do once little of the backdoor
            shows.
        gone_at: Nothing more is taken when all traces that decide are down to this share of their
            strength at the start. 0 to go on as long as harm allows: traces can be gone before the
            backdoor is.
    """

    candidates: int = 4
    rejected: int = 24
    patience: int = 4
    slope_images: int = 250
    least_effect: float = 0.05
    harm_weight: float = 0.1
    harm_floor: float = 0.005
    harmless: float = 0.001
    little_harm: float = 0.25
    gone_at: float = 0.0


class GreedyPruning:
    """Takes filters one by one: those that carry the target class and that clean images do without.

    In each step, the first-order effect of every filter on the margins of the traces is set
    against its first-order effect on clean margins. The harm (:class:`CleanHarm`) without each of
    the best four is measured, best first, and the one with the most effect for its harm is taken,
    or the first that does none. It ends at the most filters, or when all that is left is
    too harmful: one filter may do half of the harm allowed, all of them as much as is allowed
    above the least on the way. The last filter of a layer is never taken.

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
        curve: For each number of filters from 0: the harm, then for each trace its mean margin
            as a share of that at the start.
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
        self.curve: list[tuple[float, ...]] = []
        self.stopped = ""
        self._rejected: dict[int, int] = {}
        self.references: list[float] = []
        self._measure = CleanHarm(masked, clean, batch_size, impurity, constants.of(HarmConstants))

    @property
    def gone(self) -> bool:
        """Whether filters were taken, and the traces that decide are down to ``gone_at``."""
        least = self.constants.gone_at
        if not (self.taken and least):
            return False
        pairs = zip(self.traces, self.curve[-1][1:], strict=True)
        levels = [level for trace, level in pairs if trace.decides]
        return bool(levels) and max(levels) <= least

    def masks(self, without: Sequence[int] = ()) -> Tensor:
        """Return masks with zeros for the filters taken, and for others, shape (total filters,).

        Args:
            without: Positions of these others.
        """
        values = torch.ones(self.masked.layers.total, device=self.masked.device)
        values[[*self.taken, *without]] = 0.0
        return values

    def step(self) -> dict[str, float]:
        """Begin, take one more filter, or end.

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
        if self.gone:
            self.stopped = "next to nothing of the backdoor shows any more"
            return
        if len(self.taken) >= self.most:
            self.stopped = f"the most filters, {self.most}, were taken"
            return
        best = None
        while best is None and not self.stopped:
            best = self._best()
        if best is None:
            return
        self.taken.append(best[0])
        masks = self.masks()
        for trace in self.traces:
            trace.adapt(masks, len(self.taken))
        self._note(best[1])

    def _note(self, harm: float) -> None:
        levels = zip(self._levels(), self.references, strict=True)
        self.curve.append((harm, *(level / whole for level, whole in levels)))

    @torch.no_grad()
    def _levels(self) -> list[float]:
        """The strength of each trace."""
        masks = self.masks()
        return [float(strength(trace, masks)) for trace in self.traces]

    def _best(self) -> tuple[int, float] | None:
        """The best filter to take next, and the harm with it.

        None if all candidates of this step were too harmful, or it has ended.
        """
        promise, effect = self._promise()
        if not bool((promise > 0).any()):
            self.stopped = "no filter is left that lowers the margins"
            return None
        harm_now = self.curve[-1][0]
        most = min(self._most_harm(), harm_now + self.harm / 2)
        best: tuple[float, int, float] | None = None
        order = promise.argsort(descending=True, stable=True)[: self.constants.candidates].tolist()
        for index in (index for index in order if promise[index] > 0):
            if self._is_last(index):
                self.spared.append(index)
                continue
            harm = self.harm_of(self.masks(without=[index]))
            if not harm <= most:  # not so if it is NaN
                self._rejected[index] = len(self.taken)
                continue
            value = float(effect[index]) / (max(harm - harm_now, 0.0) + self.constants.harm_floor)
            if best is None or value > best[0]:
                best = (value, index, harm)
            if harm - harm_now <= self.constants.harmless:  # the others promise less
                break
        if best is None:
            if len(self._waiting()) >= self.constants.rejected:
                self.stopped = f"more filters would do more harm than {self.harm:g} nats"
            return None
        return best[1], best[2]

    def _is_last(self, position: int) -> bool:
        """Whether all other filters of a filter's layer are taken."""
        layers = self.masked.layers
        name = layers.locate(position)[0]
        [size] = [layer.filters for layer in layers if layer.name == name]
        return size - sum(layers.locate(taken)[0] == name for taken in self.taken) == 1

    def _most_harm(self) -> float:
        """The most harm that the next filter may lead to."""
        most = min(point[0] for point in self.curve) + self.harm
        for harm, *levels in self.curve:
            shown = zip(self.traces, levels, self.references, strict=True)
            decisive = [
                trace.shows_little(level * before, before)
                for trace, level, before in shown
                if trace.decides
            ]
            if decisive and all(decisive):
                return min(most, harm + self.constants.little_harm * self.harm)
        return most

    def _waiting(self) -> list[int]:
        """Filters that were too harmful a short while ago."""
        since = len(self.taken) - self.constants.patience
        return [index for index, count in self._rejected.items() if count > since]

    def _promise(self) -> tuple[Tensor, Tensor]:
        """First-order effect on the traces' margins for the harm, and that effect, each filter."""
        effect = torch.zeros(self.masked.layers.total, device=self.masked.device)
        for trace, reference in zip(self.traces, self.references, strict=True):
            masks = self.masks().requires_grad_()
            with torch.enable_grad():
                effect += torch.autograd.grad(strength(trace, masks), masks)[0] / reference
        effect = effect.nan_to_num(0.0, 0.0, 0.0)  # nothing is known of such filters
        effect[[*self.taken, *self.spared]] = 0.0
        effect[self._waiting()] = 0.0
        constants = self.constants
        least = constants.least_effect * effect.max()
        effect = effect.where(effect >= least, 0.0).clamp_min(0.0)
        harm = constants.harm_weight * self._clean_slope().abs() + constants.harm_floor
        promise = effect / harm
        return promise.nan_to_num(0.0), effect

    def _clean_slope(self) -> Tensor:
        """Gradient, with respect to the masks, of the mean clean margin, shape (total filters,)."""
        key = (self.seed, "search", len(self.taken), len(self._rejected))
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
        self.curve = [tuple(float(value) for value in point) for point in state["curve"]]
        self.stopped = str(state["stopped"])
        self._rejected = {int(index): int(count) for index, count in state["rejected"].items()}
        self.references = [float(value) for value in state["reference"]]
        for trace, part in zip(self.traces, state["traces"], strict=True):
            trace.load_state_dict(part)

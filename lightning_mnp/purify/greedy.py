"""Which filters to prune and how many, from clean data: as many as are harmless, worst first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mnp.defense_data.defense_set import DefenseSet, seeded_generator
from lightning_mnp.purify.harm import CleanHarm
from lightning_mnp.purify.traces import LEAST_STRENGTH, Source, strength
from lightning_mnp.signals.margin import class_margins
from lightning_mnp.surgery.masked_network import MaskedNetwork

__all__ = ["FilterSearch"]

_CANDIDATES = 4
_REJECTED = 24
# A filter that was too harmful is tried again after so many others.
_PATIENCE = 4
_SLOPE_IMAGES = 250
# Candidates have at least this share of the largest effect.
_LEAST_EFFECT = 0.05
# How the slope of a clean margin counts as a rise of the clean loss, roughly.
_HARM_WEIGHT = 0.1
_HARM_FLOOR = 0.005
# A filter that does no more harm than this is taken without looking further.
_HARMLESS = 0.001
# From when all sources that decide show little, filters may do this share of the harm allowed.
_LITTLE_HARM = 0.25


class FilterSearch:
    """Takes filters one by one: those that carry the target class and that clean images do without.

    In each step, the first-order effect of every filter on the margins of the sources is set
    against its first-order effect on clean margins. The harm (:class:`CleanHarm`) without each of
    the best four is measured, best first, and the one with the most effect for its harm is taken,
    or the first that does none. The search ends at the most filters, or when all that is left is
    too harmful: one filter may do half of the harm allowed, all of them as much as is allowed
    above the least on the way.

    Args:
        masked: The network.
        clean: Clean images, by which harm is measured; the last set gives the slopes.
        sources: Where the backdoor shows.
        most: The most filters to take.
        harm: The most harm allowed, in nats.
        batch_size: Most images in a batch.
        seed: Seed of everything that is drawn.
        impurity: The share of clean images that may be poisoned after all.

    Attributes:
        taken: Positions of the filters taken so far, in their order.
        curve: For each number of filters from 0: the harm, then for each source its mean margin
            as a share of that at the start.
        references: The strength of each source at the start, or what it counts for at least.
        stopped: Why the search ended, or "".
    """

    def __init__(
        self,
        masked: MaskedNetwork,
        clean: Sequence[DefenseSet],
        sources: Sequence[Source],
        most: int,
        harm: float,
        batch_size: int,
        seed: int,
        impurity: float = 0.0,
    ) -> None:
        self.masked = masked
        self.clean = list(clean)
        self.sources = list(sources)
        self.most = most
        self.harm = harm
        self.batch_size = batch_size
        self.seed = seed
        self.taken: list[int] = []
        self.curve: list[tuple[float, ...]] = []
        self.stopped = ""
        self._rejected: dict[int, int] = {}
        self.references: list[float] = []
        self._measure = CleanHarm(masked, clean, batch_size, impurity)

    def masks(self, without: Sequence[int] = ()) -> Tensor:
        """Masks with zeros for the filters taken, and for others, shape (total filters,)."""
        values = torch.ones(self.masked.layers.total, device=self.masked.device)
        values[[*self.taken, *without]] = 0.0
        return values

    def step(self) -> dict[str, float]:
        """Begin, take one more filter, or end the search.

        Returns:
            The number of ``filters``, the ``harm`` in nats, and the greatest
            ``margin`` of a source as a share of that at the start.
        """
        if not self.curve:
            self._begin()
        elif not self.stopped:
            self._take_next()
        harm, *levels = self.curve[-1]
        return {"filters": float(len(self.taken)), "harm": harm, "margin": max(levels)}

    def _begin(self) -> None:
        masks = self.masks()
        for source in self.sources:
            source.adapt(masks, 0)
        self.references = [max(level, LEAST_STRENGTH) for level in self._levels()]
        self._note(0.0)

    def _take_next(self) -> None:
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
        for source in self.sources:
            source.adapt(masks, len(self.taken))
        self._note(best[1])

    def _note(self, harm: float) -> None:
        levels = zip(self._levels(), self.references, strict=True)
        self.curve.append((harm, *(level / whole for level, whole in levels)))

    @torch.no_grad()
    def _levels(self) -> list[float]:
        """The strength of each source."""
        masks = self.masks()
        return [float(strength(source, masks)) for source in self.sources]

    def _best(self) -> tuple[int, float] | None:
        """The best filter to take next, and the harm with it.

        None where all candidates of this step were too harmful, or where the search has ended.
        """
        promise, effect = self._promise()
        if not bool((promise > 0).any()):
            self.stopped = "no filter is left that lowers the margins"
            return None
        harm_now = self.curve[-1][0]
        most = min(self._most_harm(), harm_now + self.harm / 2)
        best: tuple[float, int, float] | None = None
        order = promise.argsort(descending=True, stable=True)[:_CANDIDATES].tolist()
        for index in (index for index in order if promise[index] > 0):
            harm = self.harm_of(self.masks(without=[index]))
            if not harm <= most:  # not so where it is NaN
                self._rejected[index] = len(self.taken)
                continue
            value = float(effect[index]) / (max(harm - harm_now, 0.0) + _HARM_FLOOR)
            if best is None or value > best[0]:
                best = (value, index, harm)
            if harm - harm_now <= _HARMLESS:  # the others promise less
                break
        if best is None:
            if len(self._waiting()) >= _REJECTED:
                self.stopped = f"more filters would do more harm than {self.harm:g} nats"
            return None
        return best[1], best[2]

    def _most_harm(self) -> float:
        """The most harm that the next filter may lead to."""
        most = min(point[0] for point in self.curve) + self.harm
        for harm, *levels in self.curve:
            shown = zip(self.sources, levels, self.references, strict=True)
            decisive = [
                source.shows_little(level * before, before)
                for source, level, before in shown
                if source.decides
            ]
            if decisive and all(decisive):
                return min(most, harm + _LITTLE_HARM * self.harm)
        return most

    def _waiting(self) -> list[int]:
        """Filters that were too harmful a short while ago."""
        since = len(self.taken) - _PATIENCE
        return [index for index, count in self._rejected.items() if count > since]

    def _promise(self) -> tuple[Tensor, Tensor]:
        """First-order effect on the sources' margins for the harm, and that effect, each filter."""
        effect = torch.zeros(self.masked.layers.total, device=self.masked.device)
        for source, reference in zip(self.sources, self.references, strict=True):
            masks = self.masks().requires_grad_()
            with torch.enable_grad():
                effect += torch.autograd.grad(strength(source, masks), masks)[0] / reference
        effect = effect.nan_to_num(0.0, 0.0, 0.0)  # nothing is known of such filters
        effect[self.taken] = 0.0
        effect[self._waiting()] = 0.0
        effect = effect.where(effect >= _LEAST_EFFECT * effect.max(), 0.0).clamp_min(0.0)
        promise = effect / (_HARM_WEIGHT * self._clean_slope().abs() + _HARM_FLOOR)
        return promise.nan_to_num(0.0), effect

    def _clean_slope(self) -> Tensor:
        """Gradient, with respect to the masks, of the mean clean margin, shape (total filters,)."""
        key = (self.seed, "search", len(self.taken), len(self._rejected))
        data = self.clean[-1]
        rows = torch.randperm(len(data), generator=seeded_generator(*key))[:_SLOPE_IMAGES]
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
        """Tell the harm of masks, in nats.

        Args:
            masks: Filter masks, shape (total filters,).
        """
        return self._measure.of(masks)

    def state_dict(self) -> dict[str, Any]:
        """Give the state as tensors and primitives."""
        return {
            "taken": list(self.taken),
            "curve": [list(point) for point in self.curve],
            "stopped": self.stopped,
            "rejected": dict(self._rejected),
            "reference": list(self.references),
            "sources": [source.state_dict() for source in self.sources],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.taken = [int(index) for index in state["taken"]]
        self.curve = [tuple(float(value) for value in point) for point in state["curve"]]
        self.stopped = str(state["stopped"])
        self._rejected = {int(index): int(count) for index, count in state["rejected"].items()}
        self.references = [float(value) for value in state["reference"]]
        for source, part in zip(self.sources, state["sources"], strict=True):
            source.load_state_dict(part)

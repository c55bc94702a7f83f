"""Which filters to prune and how many, from clean data: until surrogate triggers no longer work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_mnp.defense_set import DefenseSet, seeded_generator
from lightning_mnp.subject import Subject
from lightning_mnp.surrogate import SurrogateTrigger, target_margins

__all__ = ["TriggerSearch"]

# Lengths of the two triggers and of their steps, as shares of the images' mean distance from
# their mean.
_DENSE_LENGTH = 0.10
_SPARSE_LENGTH = 0.15
_STEP = 0.02
# The dense trigger need not be longer than this many times the reach of its class.
_DENSE_REACHES = 4.0
# The search ends when both triggers succeed on less than this share of the images.
_ENOUGH = 0.2
# The most that the clean loss may rise, in nats.
_MOST_HARM = 0.10
# Margins below this no longer count: the images are back in their own class.
_LOWEST_MARGIN = -1.0
_CANDIDATES = 4
_IMAGES = 160
# Candidates have at least this share of the largest effect.
_LEAST_EFFECT = 0.25
# How the slope of a clean margin counts as a rise of the clean loss, roughly.
_HARM_WEIGHT = 0.1
_HARM_FLOOR = 0.01


class TriggerSearch:
    """Takes filters one by one until surrogate triggers to the suspected class fail.

    Two triggers are kept: a dense one, as short as a perturbation has to be for a verdict, and a
    sparse one on the places where the dense one is strongest. In each step the filters with the
    best first-order effect on the triggers' margins for their harm are tried, the one is taken
    that lowers the margins most for its rise of the clean loss, and the triggers adapt to what
    is left.

    Args:
        subject: The network.
        data: The defense set.
        target: The suspected class.
        perturbation: A perturbation towards it, shape (1, C, ...).
        reach: The reach of that class, as a share of ``scale``.
        scale: Unit of lengths, from :func:`~lightning_mnp.surrogate.image_scale`.
        most: The most filters to take.
        batch_size: Most images in a batch.
        seed: Seed of everything that is drawn.

    Attributes:
        enough: The search ends when both triggers succeed on less than this share of the images.
        taken: Positions of the filters taken so far, in their order.
        curve: For each number of filters from 0: (rise of the clean loss, success of the dense
            trigger, success of the sparse trigger).
        stopped: Why the search ended, or "".
    """

    def __init__(
        self,
        subject: Subject,
        data: DefenseSet,
        target: int,
        perturbation: Tensor,
        reach: float,
        scale: float,
        most: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self.subject = subject
        self.data = data
        self.target = target
        self.scale = scale
        self.most = most
        self.batch_size = batch_size
        self.seed = seed
        self.enough = _ENOUGH
        self.taken: list[int] = []
        self.curve: list[tuple[float, float, float]] = []
        self.stopped = ""
        others = (data.labels != target).nonzero().flatten()
        drawn = torch.randperm(len(others), generator=seeded_generator(seed, "search"))
        rows = others[drawn[:_IMAGES]]
        self._images, self._labels = data.images[rows], data.labels[rows]
        length = max(reach, min(_DENSE_LENGTH, _DENSE_REACHES * max(reach, _STEP / 2)))
        dense = SurrogateTrigger(subject, target, perturbation, length * scale)
        self._adapt(dense, "dense", 6, _STEP)
        sparse = dense.sparse(_SPARSE_LENGTH * scale)
        self._adapt(sparse, "sparse", 8, _SPARSE_LENGTH / 4)
        self.triggers = [dense, sparse]
        self._base = self._clean_loss(self.masks())
        self._reference = [max(margin - _LOWEST_MARGIN, 1.0) for margin in self._margins()]
        self._note(0.0)

    def masks(self, without: Sequence[int] = ()) -> Tensor:
        """Masks with zeros for the filters taken, and for others, shape (total filters,)."""
        values = torch.ones(self.subject.layers.total, device=self.subject.device)
        values[[*self.taken, *without]] = 0.0
        return values

    def step(self) -> dict[str, float]:
        """Take one more filter, or end the search.

        Returns:
            The number of ``filters``, the rise of the clean loss as ``harm``, and the greater
            ``success`` of the two triggers.
        """
        if not self.stopped and len(self.taken) >= self.most:
            self.stopped = f"the most filters, {self.most}, were taken"
        if not self.stopped:
            best = self._best()
            if best is None:
                self.stopped = (
                    f"no filter lowers the triggers' margins while the clean loss rises by at "
                    f"most {_MOST_HARM:.2f} in all"
                )
            else:
                self.taken.append(best[0])
                for name, trigger in zip(("dense", "sparse"), self.triggers, strict=True):
                    self._adapt(trigger, name, 2, _STEP)
                self._note(best[1])
        harm, *successes = self.curve[-1]
        return {"filters": float(len(self.taken)), "harm": harm, "success": max(successes)}

    def _note(self, harm: float) -> None:
        masks = self.masks()
        success = [self._success(trigger, masks) for trigger in self.triggers]
        self.curve.append((harm, success[0], success[1]))
        if max(success) < _ENOUGH:
            self.stopped = f"the triggers succeed on less than {_ENOUGH:.0%} of the images"

    def _best(self) -> tuple[int, float] | None:
        """The best filter to take next, and the rise of the clean loss with it."""
        promise, current = self._first_order()
        order = promise.argsort(descending=True, stable=True)[:_CANDIDATES].tolist()
        harm_now = self.curve[-1][0]
        best: tuple[float, int, float] | None = None
        for index in (index for index in order if promise[index] > 0):
            masks = self.masks(without=[index])
            harm = self._clean_loss(masks) - self._base
            if harm > _MOST_HARM:
                continue
            gains = [
                (max(now, _LOWEST_MARGIN) - max(then, _LOWEST_MARGIN)) / reference
                for now, then, reference in zip(
                    current, self._margins(masks), self._reference, strict=True
                )
            ]
            value = sum(gains) / (max(harm - harm_now, 0.0) + _HARM_FLOOR)
            if value > 0 and (best is None or value > best[0]):
                best = (value, index, harm)
        return None if best is None else (best[1], best[2])

    def _first_order(self) -> tuple[Tensor, list[float]]:
        """Expected fall of the margins for the harm, for every filter with enough of an effect.

        Beside it, the margins as they are.
        """
        effect = torch.zeros(self.subject.layers.total, device=self.subject.device)
        margins = []
        for trigger, reference in zip(self.triggers, self._reference, strict=True):
            slope, margin = self._slope(self._pairs(), trigger)
            margins.append(margin)
            if margin > _LOWEST_MARGIN:
                effect += slope / reference
        clean = self.data.batches(self.batch_size, self.subject.device)
        harm = _HARM_WEIGHT * self._slope(clean, None)[0].abs() + _HARM_FLOOR
        effect[self.taken] = 0.0
        enough = effect >= _LEAST_EFFECT * effect.max()
        return torch.where(enough & (effect > 0), effect / harm, 0.0), margins

    def _slope(self, batches: Any, trigger: SurrogateTrigger | None) -> tuple[Tensor, float]:
        """Gradient, with respect to the masks, of the mean margin of the triggered images.

        Without a trigger: of the margin of each image's own class over the next best. Beside it,
        the margin.
        """
        slope = torch.zeros(self.subject.layers.total, device=self.subject.device)
        count, margin = 0, 0.0
        for images, labels in batches:
            masks = self.masks().requires_grad_()
            if trigger is not None:
                total = target_margins(trigger.logits(images, masks), labels, self.target).sum()
            else:
                logits = self.subject(images, masks=masks, statistics="running")
                rivals = logits.scatter(1, labels[:, None], -math.inf).amax(1)
                total = (logits.gather(1, labels[:, None])[:, 0] - rivals).sum()
            slope += torch.autograd.grad(total, masks)[0]
            margin += float(total.detach())
            count += len(labels)
        return slope / count, margin / count

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        parts = -(-len(self._images) // self.batch_size)
        device = self.subject.device
        return [
            (images.to(device), labels.to(device))
            for images, labels in zip(
                self._images.tensor_split(parts), self._labels.tensor_split(parts), strict=True
            )
        ]

    def _margins(self, masks: Tensor | None = None) -> list[float]:
        masks = self.masks() if masks is None else masks
        pairs = self._pairs()
        return [
            sum(trigger.margin(x, y, masks) * len(y) for x, y in pairs) / len(self._labels)
            for trigger in self.triggers
        ]

    def _success(self, trigger: SurrogateTrigger, masks: Tensor) -> float:
        total = sum(trigger.success(images, masks) * len(images) for images, _ in self._pairs())
        return total / len(self._labels)

    def _adapt(self, trigger: SurrogateTrigger, name: str, steps: int, length: float) -> None:
        """Let a trigger follow the network as it is now, on images drawn from the seed."""
        masks, device = self.masks(), self.subject.device
        for step in range(steps):
            key = (self.seed, "adapt", name, len(self.taken), step)
            drawn = torch.randperm(len(self._labels), generator=seeded_generator(*key))
            rows = drawn[: self.batch_size]
            images, labels = self._images[rows].to(device), self._labels[rows].to(device)
            trigger.ascend(images, labels, length * self.scale, masks)

    @torch.no_grad()
    def _clean_loss(self, masks: Tensor) -> float:
        total = 0.0
        for images, labels in self.data.batches(self.batch_size, self.subject.device):
            logits = self.subject(images, masks=masks, statistics="running")
            total += float(F.cross_entropy(logits, labels, reduction="sum"))
        return total / len(self.data)

    def state_dict(self) -> dict[str, Any]:
        """Give the state as tensors and primitives."""
        return {
            "taken": list(self.taken),
            "curve": [list(point) for point in self.curve],
            "stopped": self.stopped,
            "reference": list(self._reference),
            "triggers": [trigger.perturbation for trigger in self.triggers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.taken = [int(index) for index in state["taken"]]
        self.curve = [(float(a), float(b), float(c)) for a, b, c in state["curve"]]
        self.stopped = str(state["stopped"])
        self._reference = [float(value) for value in state["reference"]]
        for trigger, perturbation in zip(self.triggers, state["triggers"], strict=True):
            trigger.perturbation = perturbation.to(self.subject.device)

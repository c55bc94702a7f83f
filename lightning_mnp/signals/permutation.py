"""All-to-all backdoors: one patch that takes every class to a class of its own.

An all-to-all backdoor has no target class: its trigger takes images of class y to the class y + 1,
say, so that nothing points to one class. What gives it away is that a single patch can exchange
classes at all. Which class goes where is not known. All images are driven away from their classes
first, by a perturbation of all pixels; then a patch is made for the one-to-one assignment that the
logits speak for most, which is guessed anew from what the patch does so far.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lightning_mnp.defense_data.defense_set import seeded_generator, value_range
from lightning_mnp.report import Signal, SurrogateTrigger
from lightning_mnp.signals.base import Scene, Search, SignalSearch
from lightning_mnp.signals.patch import PatchTrigger
from lightning_mnp.signals.pattern import PatternTrace
from lightning_mnp.signals.portrait import MEASURED, portray
from lightning_mnp.signals.trace import Trace

__all__ = [
    "PermutationConstants",
    "PermutationSearch",
    "best_permutation",
    "permutation_excess",
]


@dataclass(frozen=True)
class PermutationConstants:
    """How the patch is made that exchanges classes, and when it counts.

    There are more steps than for the patch to one class: more has to be found out.

    Attributes:
        counts_from: Share of the images that a patch takes where it should, from where it counts
            fully, between chance, 0, and all of them, 1.
        images: Images that the patch is made on.
        measured: Most images that it is measured on.
        away_steps: Number of steps away from the images' own classes, with any number of pixels.
        away: Largest change of a pixel in each of these, as a share of the range of values.
        far_steps: Number of long steps of the patch.
        far: Largest change of a pixel in each of these.
        near_steps: Number of short steps.
        near: Largest change of a pixel in each of these.
        guess: The permutation is guessed anew every so many steps.
    """

    counts_from: float = 0.4
    images: int = 100
    measured: int = 250
    away_steps: int = 10
    away: float = 0.1
    far_steps: int = 15
    far: float = 0.5
    near_steps: int = 35
    near: float = 0.2
    guess: int = 5

    @property
    def steps(self) -> int:
        """The number of all steps."""
        return self.away_steps + self.far_steps + self.near_steps


def best_permutation(logits: Tensor, labels: Tensor) -> dict[int, int]:
    """Guess to which other class the images of each class go, no two of them to the same.

    Args:
        logits: Shape (N, K).
        labels: True classes, shape (N,).

    Returns:
        For each class that occurs another one that does: those whose mean logit, compared with
        the mean over all classes, adds up to most. Nothing where only one class occurs.

    Example:
        >>> logits = torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0], [2.0, 1.0, 0.0]])
        >>> best_permutation(logits, torch.tensor([0, 1, 2]))
        {0: 1, 1: 2, 2: 0}
    """
    present = labels.unique()
    if len(present) < 2:
        return {}
    means = torch.stack([logits[labels == index].float().mean(0) for index in present])
    # Not to classes that do not occur: with many of those, each class finds one that is easy.
    costs = -torch.nan_to_num(means - means.mean(0))[:, present].cpu()
    costs.fill_diagonal_(float(1e6 * (1 + costs.abs().max())))
    rows, columns = linear_sum_assignment(costs.numpy())
    classes = present.tolist()
    return {classes[row]: classes[column] for row, column in zip(rows, columns, strict=True)}


class PermutationSearch(SignalSearch):
    """Makes one patch that takes images of every class to another one, and measures it.

    The patch is made on some images of the defense set and measured on others, at least as many.

    Args:
        scene: What it works on.

    Attributes:
        permutation: The class that the patch was made to take each class to.
        moved: The share of images that it takes there, measured for each class and averaged over
            them, from 0 to 1; None until finished, or if there are too few images to tell.
    """

    name = "permutation"

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self.constants = scene.constants.of(PermutationConstants)
        data = scene.data
        generator = seeded_generator(scene.config.seed, "permutation")
        drawn = torch.randperm(len(data), generator=generator)
        made = min(self.constants.images, scene.config.batch_size, len(data) // 2)
        self._rows = drawn[:made]
        self._measured = drawn[made : made + self.constants.measured]
        self.permutation: dict[int, int] = {}
        self.moved: float | None = None
        self._taken = 0
        self._trigger: PatchTrigger | None = None
        self._pattern: Tensor | None = None  # of the finished patch

    @classmethod
    def all_steps(cls, scene: Scene) -> int:
        """Return the number of steps.

        Args:
            scene: What it will work on.
        """
        return scene.constants.of(PermutationConstants).steps

    @property
    def finished(self) -> bool:
        """Whether the patch is made and measured."""
        return self._taken >= self.constants.steps

    def most_steps(self) -> int:
        """Return the number of steps left."""
        return self.constants.steps - self._taken

    def step(self) -> dict[str, float]:
        """Take one step.

        Returns:
            The mean ``margin``, before it, of the classes that images are taken to, or at first of
            all others above their own.
        """
        constants = self.constants
        self._trigger = self._trigger or self._new_trigger()
        if self._taken < constants.away_steps:
            margin = self._trigger.disturb(constants.away)
        else:
            patched = self._taken - constants.away_steps
            if patched % constants.guess == 0:
                self._guess(self._trigger)
            far = patched < constants.far_steps
            margin = self._trigger.step(constants.far if far else constants.near)
        self._taken += 1
        if self.finished:
            self.moved = self._share_moved(self._trigger)
            self._pattern = self._trigger.pattern
            self._trigger = None
        return {"margin": margin}

    def goals(self, labels: Tensor) -> Tensor:
        """Return the classes that images are taken to; their own if nothing is known of it.

        Args:
            labels: True classes, shape (N,).

        Returns:
            Shape (N,).
        """
        known = torch.arange(int(labels.max()) + 1, device=labels.device)
        for index, goal in self.permutation.items():
            if index < len(known):
                known[index] = goal
        return known[labels]

    def images(self, count: int) -> tuple[Tensor, Tensor]:
        """Draw images of the classes that the permutation is known for.

        Args:
            count: Most images.

        Returns:
            Images, shape (N, C, ...), and the classes that they are taken to, shape (N,).
        """
        data, seed = self.scene.data, self.scene.config.seed
        known = torch.isin(data.labels, torch.tensor(list(self.permutation)))
        rows = known.nonzero().flatten()
        drawn = torch.randperm(len(rows), generator=seeded_generator(seed, "sources"))
        rows, device = rows[drawn[:count]], self.scene.masked.device
        return data.images[rows].to(device), self.goals(data.labels[rows]).to(device)

    def trigger(self) -> PatchTrigger:
        """Begin a patch for the permutation found, on the images that it was found on."""
        trigger = self._new_trigger()
        trigger.goals = self.goals(trigger.labels)
        return trigger

    def _new_trigger(self) -> PatchTrigger:
        scene, device = self.scene, self.scene.masked.device
        images = scene.data.images[self._rows].to(device)
        labels = scene.data.labels[self._rows].to(device)
        low, high = (bound.to(device) for bound in value_range(scene.data.images))
        return PatchTrigger(scene.masked, images, labels, labels, low, high, scene.constants)

    @torch.no_grad()
    def _guess(self, trigger: PatchTrigger) -> None:
        self.permutation = best_permutation(trigger.logits(trigger.images), trigger.labels)
        trigger.goals = self.goals(trigger.labels)

    @torch.no_grad()
    def _share_moved(self, trigger: PatchTrigger) -> float | None:
        data, device = self.scene.data, self.scene.masked.device
        labels = data.labels[self._measured]
        found = torch.cat(
            [
                trigger.logits(data.images[rows].to(device)).argmax(1).cpu()
                for rows in self._measured.split(self.scene.config.batch_size)
            ]
        )
        arrived = (found == self.goals(labels)).float()
        shares = [
            float(arrived[labels == index].mean())
            for index in self.permutation
            if bool((labels == index).any())
        ]
        return sum(shares) / len(shares) if shares else None

    @property
    def failed(self) -> bool:
        """Whether gradients were not finite, so that the patch is none."""
        return self._pattern is not None and not bool(self._pattern.isfinite().all())

    def signal(self) -> Signal:
        """Return what the share of exchanged images says."""
        counts_from, classes = self.constants.counts_from, len(self.permutation)
        chance = 1 / max(1, classes)
        threshold = chance + (1 - chance) * counts_from
        goals: dict[int, float] = dict(self.permutation)
        if self.moved is None:
            reason = "there are too few images to tell whether one patch exchanges classes"
            return Signal(self.name, 0.0, None, 0.0, threshold, reason, goals)
        excess = permutation_excess(self.moved, classes)
        reason = (
            f"one patch takes {self.moved:.0%} of the images of each class to another class of its "
            f"own (counts fully from {threshold:.0%})"
        )
        strength = excess / counts_from
        return Signal(self.name, strength, None, self.moved, threshold, reason, goals)

    def found(self) -> SurrogateTrigger | None:
        """Return the patch, measured on images that it was not made on."""
        if self._pattern is None or self.moved is None:
            return None
        data, device, rows = self.scene.data, self.scene.masked.device, self._measured[:MEASURED]
        trigger, labels = self.trigger(), data.labels[rows].to(device)
        trigger.pattern = self._pattern
        images, size = data.images[rows].to(device), self.scene.config.batch_size
        found = portray(trigger, images, labels, self.goals(labels), None, size)
        return replace(found, signal=self.name, success=self.moved, images=len(self._measured))

    def traces(self, target: int | None, searches: Mapping[str, Search]) -> list[Trace]:
        """Return images under the patch, if the backdoor is thought to exchange classes.

        Args:
            target: The suspected class; None for an exchange.
            searches: All finished searches, by name.
        """
        return [PatternTrace(self.trigger())] if target is None else []

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and primitives."""
        return {
            "permutation": dict(self.permutation),
            "moved": self.moved,
            "taken": self._taken,
            "pattern": None if self._trigger is None else self._trigger.pattern,
            "finished": self._pattern,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.permutation = {int(index): int(goal) for index, goal in state["permutation"].items()}
        self.moved = None if state["moved"] is None else float(state["moved"])
        self._taken = int(state["taken"])
        self._trigger = self._pattern = None
        if state["pattern"] is not None:
            self._trigger = self.trigger()
            self._trigger.pattern = state["pattern"].to(self.scene.masked.device)
        if state["finished"] is not None:
            self._pattern = state["finished"].to(self.scene.masked.device)


def permutation_excess(moved: float | None, classes: int) -> float:
    """Compute how far the share that a patch takes to other classes is above what is easy.

    Even a patch that takes all images to one class is right for one class of them. So a share of
    one class, 1 / K, is worth nothing.

    Args:
        moved: The share, from 0 to 1; None counts as none.
        classes: The number of classes that occur; one is not enough for a permutation.

    Returns:
        From 0, for a share of one class or less, to 1, for all.

    Example:
        >>> permutation_excess(0.75, 2), permutation_excess(0.5, 2)
        (0.5, 0.0)
    """
    if classes < 2 or moved is None:
        return 0.0
    chance = 1 / classes
    return max(0.0, (moved - chance) / (1 - chance))

"""All-to-all backdoors: one patch that takes every class to a class of its own.

An all-to-all backdoor has no target class: its trigger takes images of class y to the class y + 1,
say, so that nothing points to one class. What gives it away is that a single patch can exchange
classes at all. Which class goes where is not known. All images are driven away from their classes
first, by a perturbation of all pixels; then a patch is made for the one-to-one assignment that the
logits speak for most, which is guessed anew from what the patch does so far.
"""

from __future__ import annotations

from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lightning_mnp.defense_data.defense_set import DefenseSet, seeded_generator, value_range
from lightning_mnp.signals.patch import PatchTrigger
from lightning_mnp.surgery.masked_network import MaskedNetwork

__all__ = ["PermutationSearch", "best_permutation", "permutation_excess"]

# Images that the patch is made on, and most of those that it is measured on.
_IMAGES = 100
_MEASURED = 250
# As in `patch`, with more steps: there is one patch for all classes, and more to find out.
_AWAY_STEPS, _AWAY = 10, 0.1
_FAR_STEPS, _FAR = 15, 0.5
_NEAR_STEPS, _NEAR = 35, 0.2
# The permutation is guessed anew every so many steps.
_GUESS = 5


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


class PermutationSearch:
    """Makes one patch that takes images of every class to another one, and measures it.

    The patch is made on some images of the defense set and measured on others, at least as many.

    Args:
        masked: The network.
        data: The defense set.
        seed: Seed of the images.
        batch_size: Most images that the network sees at a time.

    Attributes:
        permutation: The class that the patch was made to take each class to.
        moved: The share of images that it takes there, measured for each class and averaged over
            them, from 0 to 1; None until finished, or where there are too few images to tell.

    Example:
        >>> from torch import nn
        >>> from lightning_mnp.surgery.layers import find_filter_layers
        >>> generator = torch.manual_seed(0)
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> data = DefenseSet(torch.rand(8, 1, 2, 2), torch.arange(8) % 2)
        >>> masked = MaskedNetwork(network, find_filter_layers(network, data.images))
        >>> search = PermutationSearch(masked, data, seed=0)
        >>> while not search.finished:
        ...     metrics = search.step()
        >>> search.permutation, 0 <= search.moved <= 1
        ({0: 1, 1: 0}, True)
    """

    def __init__(
        self, masked: MaskedNetwork, data: DefenseSet, seed: int, batch_size: int = 128
    ) -> None:
        self.masked = masked
        self.data = data
        self.seed = seed
        self.batch_size = batch_size
        drawn = torch.randperm(len(data), generator=seeded_generator(seed, "permutation"))
        made = min(_IMAGES, batch_size, len(data) // 2)
        self._rows, self._measured = drawn[:made], drawn[made : made + _MEASURED]
        self.permutation: dict[int, int] = {}
        self.moved: float | None = None
        self._taken = 0
        self._trigger: PatchTrigger | None = None

    @property
    def finished(self) -> bool:
        """Whether the patch is made and measured."""
        return self._taken >= self.most_steps_of()

    @staticmethod
    def most_steps_of() -> int:
        """The number of steps."""
        return _AWAY_STEPS + _FAR_STEPS + _NEAR_STEPS

    def most_steps(self) -> int:
        """The number of steps left."""
        return self.most_steps_of() - self._taken

    def step(self) -> dict[str, float]:
        """Take one step.

        Returns:
            The mean ``margin``, before it, of the classes that images are taken to, or at first of
            all others above their own.
        """
        self._trigger = self._trigger or self._new_trigger()
        if self._taken < _AWAY_STEPS:
            margin = self._trigger.disturb(_AWAY)
        else:
            far = self._taken < _AWAY_STEPS + _FAR_STEPS
            if (self._taken - _AWAY_STEPS) % _GUESS == 0:
                self._guess(self._trigger)
            margin = self._trigger.step(_FAR if far else _NEAR)
        self._taken += 1
        if self._taken == self.most_steps_of():
            self.moved = self._share_moved(self._trigger)
            self._trigger = None
        return {"margin": margin}

    def goals(self, labels: Tensor) -> Tensor:
        """Give the classes that images are taken to; their own where nothing is known of it.

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
        known = torch.isin(self.data.labels, torch.tensor(list(self.permutation)))
        rows = known.nonzero().flatten()
        drawn = torch.randperm(len(rows), generator=seeded_generator(self.seed, "sources"))
        rows, device = rows[drawn[:count]], self.masked.device
        return self.data.images[rows].to(device), self.goals(self.data.labels[rows]).to(device)

    def trigger(self) -> PatchTrigger:
        """Begin a patch for the permutation found, on the images that it was found on."""
        trigger = self._new_trigger()
        trigger.goals = self.goals(trigger.labels)
        return trigger

    def _new_trigger(self) -> PatchTrigger:
        device = self.masked.device
        images, labels = self.data.images[self._rows], self.data.labels[self._rows]
        low, high = (bound.to(device) for bound in value_range(self.data.images))
        labels = labels.to(device)
        return PatchTrigger(self.masked, images.to(device), labels, labels, low, high)

    @torch.no_grad()
    def _guess(self, trigger: PatchTrigger) -> None:
        self.permutation = best_permutation(trigger.logits(trigger.images), trigger.labels)
        trigger.goals = self.goals(trigger.labels)

    @torch.no_grad()
    def _share_moved(self, trigger: PatchTrigger) -> float | None:
        labels = self.data.labels[self._measured]
        found = torch.cat(
            [
                trigger.logits(self.data.images[rows].to(self.masked.device)).argmax(1).cpu()
                for rows in self._measured.split(self.batch_size)
            ]
        )
        arrived = (found == self.goals(labels)).float()
        shares = [
            float(arrived[labels == index].mean())
            for index in self.permutation
            if bool((labels == index).any())
        ]
        return sum(shares) / len(shares) if shares else None

    def state_dict(self) -> dict[str, Any]:
        """Give the state as tensors and primitives."""
        return {
            "permutation": dict(self.permutation),
            "moved": self.moved,
            "taken": self._taken,
            "pattern": None if self._trigger is None else self._trigger.pattern,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.permutation = {int(index): int(goal) for index, goal in state["permutation"].items()}
        self.moved = None if state["moved"] is None else float(state["moved"])
        self._taken = int(state["taken"])
        self._trigger = None
        if state["pattern"] is not None:
            self._trigger = self.trigger()
            self._trigger.pattern = state["pattern"].to(self.masked.device)


def permutation_excess(moved: float | None, classes: int) -> float:
    """Tell how far the share that a patch takes to other classes is above what is easy.

    A patch that takes all images to one class takes one class of them where the permutation has
    it, too.

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

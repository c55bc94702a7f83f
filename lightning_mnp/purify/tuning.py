"""Tuning: what clean images lose by pruning, masks and cuts is won back, and no backdoor with it.

Weights are changed in any direction until the network makes its former predictions again, those of
before pruning, on clean images and on those under a patch. These have the backdoor in them. Two
things keep it from coming back. What was cut stays at zero. And no image of another class may
lean towards the suspected class more than the cut network says. Nothing is fitted to labels:
fitted to them, networks learned their backdoors anew.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_mnp.config import Constants
from lightning_mnp.defense_data.augment import Augmentation
from lightning_mnp.defense_data.defense_set import DefenseSet
from lightning_mnp.purify.harm import trimmed_mean
from lightning_mnp.signals.patch import PatchTrigger
from lightning_mnp.surgery.masked_network import MaskedNetwork, Weights

__all__ = ["Tuning", "TuningConstants", "disagreement", "held_down"]


@dataclass(frozen=True)
class TuningConstants:
    """How weights are tuned.

    Attributes:
        weight: What images under the patch count against clean ones.
        own: What clean images of the suspected class count against those of others. They alone
            speak for the class; all others hold it down.
        step: Length of the first step, as a share of the root mean square of a layer's weights;
            later ones are shorter, down to nothing, along half a cosine.
        images: Clean images of a step; never more than a batch.
        follow: The patch follows the network in every so many steps.
        temperature: What logits are divided by before predictions are compared.
        harm: Most harm of cuts and tuning together, beside that of pruning and masks, in units of
            what pruning may.
        halvings: What does too much harm is turned back to a share that is known to within
            1 / 2 ** halvings.
    """

    weight: float = 0.05
    own: float = 2.0
    step: float = 0.01
    images: int = 64
    follow: int = 5
    temperature: float = 2.0
    harm: int = 4
    halvings: int = 4


def disagreement(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Compute how far predictions are from others: their Kullback-Leibler divergence, in nats.

    Args:
        logits: Shape (N, K).
        wanted: Logits of the predictions that they should be, shape (N, K).
        temperature: What both are divided by; the divergence is multiplied by its square.

    Returns:
        One value for each image, shape (N,); 0 if they agree.

    Example:
        >>> logits = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
        >>> disagreement(logits, logits + 5.0, 2.0)
        tensor([0., 0.])
    """
    wanted = (wanted / temperature).log_softmax(1)
    found = (logits / temperature).log_softmax(1)
    return temperature**2 * F.kl_div(found, wanted, reduction="none", log_target=True).sum(1)


def held_down(logits: Tensor, limit: Tensor, goals: Tensor) -> Tensor:
    """Lower the logit of a class for each image, where another network gives it less.

    A class is as probable as its logit is ahead of the others together. That lead becomes the
    smaller one of the two networks; what is between the other classes stays.

    Args:
        logits: Shape (N, K).
        limit: Logits of the other network, shape (N, K).
        goals: The class of each image, shape (N,); -1 for an image that stays as it is.

    Returns:
        The changed logits, shape (N, K).

    Example:
        >>> logits = torch.tensor([[0.0, 0.0, 3.0], [0.0, 0.0, 3.0]])
        >>> limit = torch.tensor([[5.0, 5.0, 6.0], [5.0, 5.0, 6.0]])
        >>> held_down(logits, limit, torch.tensor([2, -1]))
        tensor([[0., 0., 1.],
                [0., 0., 3.]])
    """
    held = goals >= 0
    place = goals.clamp_min(0)[:, None]
    others = torch.ones_like(logits, dtype=torch.bool).scatter(1, place, False)

    def lead(values: Tensor) -> tuple[Tensor, Tensor]:
        rest = values.masked_fill(~others, -torch.inf).logsumexp(1, keepdim=True)
        return values.gather(1, place) - rest, rest

    (ahead, rest), (most, _) = lead(logits), lead(limit)
    changed = logits.scatter(1, place, rest + torch.minimum(ahead, most))
    return torch.where(held[:, None], changed, logits)


class Tuning:
    """Tunes the weights of convolutions and linear layers of a network that was pruned.

    Args:
        masked: The network as it was before pruning, with its former predictions.
        weights: Its weights after soft masks.
        data: The defense set. Labels say which images may lean towards the suspected class.
        patch: A patch that has not been made yet; it is made for the network as it is tuned.
        filter_masks: Zeros for the filters pruned, ones for the others, shape (total filters,).
        augment: What is done to the clean images.
        steps: The steps to take.
        batch_size: Most images in a batch.
        seed: Seed of order and augmentation.
        cut: Positions of the kernels to cut, among all kernels; None for none.
        impurity: The share of images that may be poisoned; of each batch of clean images, as many
            are left out, those with the greatest disagreement, weighed by `own`.
        constants: Constants that differ from their defaults.

    Attributes:
        steps: Number of steps.
        taken: Steps taken.
        softened: The network with soft masks, and nothing cut.
        masked: The network with the weights so far.

    Example:
        >>> from torch import nn
        >>> from lightning_mnp.surgery.layers import find_filter_layers
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> data = DefenseSet(torch.rand(8, 1, 2, 2), torch.arange(8) % 2)
        >>> masked = MaskedNetwork(network, find_filter_layers(network, data.images))
        >>> images, labels = data.images, data.labels
        >>> zero, one = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
        >>> patch = PatchTrigger(masked, images, labels, 1 - labels, zero, one)
        >>> tuning = Tuning(
        ...     masked, masked.weights(), data, patch, torch.ones(4), augment="none", steps=3,
        ...     batch_size=8, seed=0,
        ... )
        >>> while not tuning.finished:
        ...     metrics = tuning.step()
        >>> sorted(tuning.changes())
        ['0.weight', '2.weight']
    """

    def __init__(
        self,
        masked: MaskedNetwork,
        weights: Weights,
        data: DefenseSet,
        patch: PatchTrigger,
        filter_masks: Tensor,
        augment: Augmentation,
        steps: int,
        batch_size: int,
        seed: int,
        cut: Tensor | None = None,
        impurity: float = 0.0,
        constants: Constants | None = None,
    ) -> None:
        self.constants = (constants or Constants()).of(TuningConstants)
        self.former = masked
        self.softened = masked.with_weights(weights)
        kernels = masked.kernels
        self._left = torch.ones(kernels.total, device=masked.device)
        if cut is not None:
            self._left[cut] = 0.0
        begun = kernels.scaled(weights, self._left)
        self.before = masked.with_weights(begun)
        self.data = data
        self.augment = augment
        self.steps = steps
        self.batch_size = min(batch_size, self.constants.images)
        self.seed = seed
        self.impurity = impurity
        self.taken = 0
        self._filters = filter_masks.clone()
        tuned = [layer.weight for layer in kernels.layers]
        # In float32 at least: half a precision would lose small steps, and what Adam divides by.
        self._types = {name: weights[name].dtype for name in tuned}
        self._weights = {
            name: begun[name].detach().to(torch.promote_types(dtype, torch.float32), copy=True)
            for name, dtype in self._types.items()
        }
        self._others = {name: weight for name, weight in weights.items() if name not in tuned}
        self.patch = patch
        self.masked = self.before
        self._show()
        self._begun = False
        self._wanted_patched: Tensor | None = None
        self._lengths = [
            self.constants.step * float(weight.square().mean().sqrt())
            for weight in self._weights.values()
        ]
        groups = [{"params": [weight], "lr": 0.0} for weight in self._weights.values()]
        self._optimizer = torch.optim.Adam(groups)

    @property
    def finished(self) -> bool:
        """Whether all steps were taken."""
        return self.taken >= self.steps

    def step(self) -> dict[str, float]:
        """Take one step; make the patch first.

        Returns:
            The ``disagreement`` with the wanted predictions, on clean images and on those under
            the patch, weighed, in nats.
        """
        if not self._begun:
            self.patch.approach(self._filters)
            self._begun = True
        found = self._descend()
        self.taken += 1
        if self.taken % self.constants.follow == 0 and not self.finished:
            self.patch.follow(self._filters)
        return {"disagreement": found}

    def _show(self) -> None:
        """Make the network, and the patch, run with the weights so far."""
        self.masked = self.before.with_weights(self._all(self._weights.values()))
        self.patch.masked = self.masked

    def _all(self, tuned: Iterable[Tensor]) -> Weights:
        """Return all weights in the network's own types, with these for the tuned ones."""
        typed = zip(self._types.items(), tuned, strict=True)
        return {**self._others, **{name: weight.to(dtype) for (name, dtype), weight in typed}}

    def _goals(self, labels: Tensor) -> Tensor:
        """The class that the backdoor takes each image to; -1 if it is the image's own, or none.

        That is the class of the patch for all others, or, if it exchanges classes, another one for
        each class that it was made with.
        """
        goals = self.patch.goals
        if bool((goals == goals[0]).all()):
            return torch.where(labels == goals[0], -1, goals[0])
        of = torch.full((int(max(labels.max(), self.patch.labels.max())) + 1,), -1).to(goals)
        of[self.patch.labels] = goals
        return of[labels]

    @torch.no_grad()
    def _wanted(self, images: Tensor, goals: Tensor) -> Tensor:
        """Logits of the predictions to make: the former ones, the suspected class held down."""
        former = self.former(images, statistics="running")
        cut, temperature = self._logits(self.before, images), self.constants.temperature
        return temperature * held_down(former / temperature, cut / temperature, goals)

    def _descend(self) -> float:
        constants, device = self.constants, self.masked.device
        epoch, index = divmod(self.taken, self.data.passes(self.batch_size))
        key = (self.seed, "tuning", epoch)
        images, labels = self.data.batch(index, self.batch_size, device, self.augment, key)
        patched = self.patch.applied(self.patch.images, self.patch.pattern)
        if self._wanted_patched is None:  # the same in all steps
            self._wanted_patched = self._wanted(self.patch.images, self.patch.goals)
        goals = self._goals(labels)
        own = torch.where(goals < 0, constants.own, 1.0)
        # New ones in each step: autocast would go on with what it has kept of known ones.
        leaves = [weight.detach().requires_grad_() for weight in self._weights.values()]
        gradients = [torch.zeros_like(leaf) for leaf in leaves]
        loss = torch.zeros((), device=device)
        # One by one, so that no more than one batch's activations are in memory.
        for shown, wanted, counts, impurity in (
            (images, self._wanted(images, goals), own, self.impurity),
            (patched, self._wanted_patched, constants.weight, 0.0),
        ):
            with torch.enable_grad():
                logits = self._logits(self.masked, shown, self._all(leaves))
                each = counts * disagreement(logits, wanted, constants.temperature)
                part = trimmed_mean(each, impurity)
                slopes = torch.autograd.grad(part, leaves, allow_unused=True)
            loss = loss + part.detach()
            for gradient, slope in zip(gradients, slopes, strict=True):
                if slope is not None:  # a layer that is not called has none
                    gradient += slope
        rest = 0.5 * (1 + math.cos(math.pi * self.taken / self.steps))
        for group, length, gradient in zip(
            self._optimizer.param_groups, self._lengths, gradients, strict=True
        ):
            group["lr"] = length * rest
            group["params"][0].grad = gradient
        self._optimizer.step()
        self._optimizer.zero_grad()
        for name, tuned in self.former.kernels.scaled(self._weights, self._left).items():
            self._weights[name].copy_(tuned)
        self._show()
        return float(loss)

    def _logits(
        self, masked: MaskedNetwork, images: Tensor, weights: Weights | None = None
    ) -> Tensor:
        return masked(images, weights=weights, masks=self._filters, statistics="running")

    def changes(self, share: float = 1.0) -> Weights:
        """Return the tuned weights by name.

        Args:
            share: How much of the change is made, cuts included, from 0 to 1.
        """
        before = self.softened.weights()
        return {
            name: before[name].to(weight).lerp(weight.detach(), share).to(self._types[name])
            for name, weight in self._weights.items()
        }

    def moved(self, tuned: Weights) -> float:
        """Return by how much weights have moved, as a share of their norm before cuts and tuning.

        Args:
            tuned: Weights by name, from :meth:`changes`.
        """
        before = self.softened.weights()
        moved = sum(float((w - before[n]).float().square().sum()) for n, w in tuned.items())
        whole = sum(float(before[name].float().square().sum()) for name in tuned)
        return math.sqrt(moved / whole) if whole else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and primitives."""
        moments = [self._optimizer.state[weight] for weight in self._weights.values()]
        return {
            "taken": self.taken,
            "begun": self._begun,
            "weights": {name: weight.clone() for name, weight in self._weights.items()},
            "moments": [{k: v.clone() for k, v in each.items()} for each in moments],
            "pattern": self.patch.pattern,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        device = self.masked.device
        self.taken = int(state["taken"])
        self._begun = bool(state["begun"])
        for name, weight in self._weights.items():
            weight.copy_(state["weights"][name])
        self._show()
        for weight, moments in zip(self._weights.values(), state["moments"], strict=True):
            # The count of steps stays on the CPU, as the optimizer has it.
            self._optimizer.state[weight] = {
                name: value.clone() if name == "step" else value.to(device, copy=True)
                for name, value in moments.items()
            }
        self.patch.pattern = state["pattern"].to(device)

"""Tuning: weights change a little, so that a patch takes images to the suspected class no more.

Pruning and masks take away what is in a network. Where the backdoor is woven into weights that
clean images need as well, what is left of them still lets a patch through, and often the trigger.
There, weights are changed in any direction, as unlearning does (compare I-BAU, Zeng et al., 2022,
which unlearns perturbations of single images and fits the labels). Two things differ. Only patches
to the suspected class are unlearned. And nothing is fitted to labels: the network keeps
the predictions that it has on clean images after pruning, and learns to make them under the patch
as well. Fitted to labels, networks learned their backdoors anew.
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
from lightning_mnp.signals.patch import PatchTrigger
from lightning_mnp.surgery.masked_network import MaskedNetwork, Weights

__all__ = ["Tuning", "TuningConstants", "disagreement"]


@dataclass(frozen=True)
class TuningConstants:
    """How weights are tuned.

    Attributes:
        weight: What images under the patch count against clean ones.
        far: Mean margin of the class that the patch pushes to, in logits, up to which images are
            back in their own class, so that there is nothing to tune.
        step: Length of the first step, as a share of the root mean square of a layer's weights;
            later ones are shorter, down to nothing, along half a cosine.
        images: Clean images of a step; never more than a batch.
        follow: The patch follows the network in every so many steps.
        temperature: What logits are divided by before predictions are compared.
        harm: Harm that tuning may do, in units of what pruning may.
        halvings: Tuning that does too much harm is turned back to a share that is known to within
            1 / 2 ** halvings.
    """

    weight: float = 0.02
    far: float = -1.0
    step: float = 0.003
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
        The mean over the images, a scalar; 0 if they agree.

    Example:
        >>> logits = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
        >>> float(disagreement(logits, logits + 5.0, 2.0))
        0.0
    """
    wanted = (wanted / temperature).log_softmax(1)
    found = (logits / temperature).log_softmax(1)
    return temperature**2 * F.kl_div(found, wanted, reduction="batchmean", log_target=True)


class Tuning:
    """Tunes the weights of convolutions and linear layers of a network that was pruned.

    Args:
        masked: The network.
        weights: Its weights after pruning, with which it has the predictions to keep.
        data: The defense set. Labels are not used, so images of it that are poisoned do no more
            than keep what the network says of them.
        patch: A patch that has not been made yet; it is made for the network as it is tuned.
        filter_masks: Zeros for the filters pruned, ones for the others, shape (total filters,).
        augment: What is done to the clean images.
        steps: The steps to take.
        batch_size: Most images in a batch.
        seed: Seed of order and augmentation.
        constants: Constants that differ from their defaults.

    Attributes:
        steps: Number of steps.
        taken: Steps taken.
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
        constants: Constants | None = None,
    ) -> None:
        self.constants = (constants or Constants()).of(TuningConstants)
        self.before = masked.with_weights(weights)
        self.data = data
        self.augment = augment
        self.steps = steps
        self.batch_size = min(batch_size, self.constants.images)
        self.seed = seed
        self.taken = 0
        self._filters = filter_masks.clone()
        tuned = [layer.weight for layer in masked.kernels.layers]
        # In float32 at least: half a precision would lose small steps, and what Adam divides by.
        self._types = {name: weights[name].dtype for name in tuned}
        self._weights = {
            name: weights[name].detach().to(torch.promote_types(dtype, torch.float32), copy=True)
            for name, dtype in self._types.items()
        }
        self._others = {name: weight for name, weight in weights.items() if name not in tuned}
        self.patch = patch
        self.masked = self.before
        self._show()
        self._begun = False
        self._lengths = [
            self.constants.step * float(weight.square().mean().sqrt())
            for weight in self._weights.values()
        ]
        groups = [{"params": [weight], "lr": 0.0} for weight in self._weights.values()]
        self._optimizer = torch.optim.Adam(groups)

    @property
    def finished(self) -> bool:
        """Whether all steps were taken, or the patch never brought images near their goals."""
        return self.taken >= self.steps

    def step(self) -> dict[str, float]:
        """Take one step; make the patch first, and be finished if it leaves images where they are.

        Returns:
            The ``disagreement`` with the predictions before tuning, on clean images and on those
            under the patch, weighed, in nats; nothing if no step was taken.
        """
        if not self._begun:
            self.patch.approach(self._filters)
            self._begun = True
            far = self.constants.far
            with torch.no_grad():
                near = float(self.patch.margins(self._filters).mean()) > far  # NaN is not
            if not near:
                self.steps = 0
                return {}
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

    def _descend(self) -> float:
        constants, device = self.constants, self.masked.device
        epoch, index = divmod(self.taken, self.data.passes(self.batch_size))
        key = (self.seed, "tuning", epoch)
        images, _ = self.data.batch(index, self.batch_size, device, self.augment, key)
        patched = self.patch.applied(self.patch.images, self.patch.pattern)
        # New ones in each step: autocast would go on with what it has kept of known ones.
        leaves = [weight.detach().requires_grad_() for weight in self._weights.values()]
        gradients = [torch.zeros_like(leaf) for leaf in leaves]
        loss = torch.zeros((), device=device)
        # One by one, so that no more than one batch's activations are in memory.
        for weight, clean, shown in (
            (1.0, images, images),
            (constants.weight, self.patch.images, patched),
        ):
            with torch.no_grad():
                wanted = self._logits(self.before, clean)
            with torch.enable_grad():
                logits = self._logits(self.masked, shown, self._all(leaves))
                part = weight * disagreement(logits, wanted, constants.temperature)
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
        self._show()
        return float(loss)

    def _logits(
        self, masked: MaskedNetwork, images: Tensor, weights: Weights | None = None
    ) -> Tensor:
        return masked(images, weights=weights, masks=self._filters, statistics="running")

    def changes(self, share: float = 1.0) -> Weights:
        """Return the tuned weights by name.

        Args:
            share: How much of the change is made, from 0 to 1.
        """
        before = self.before.weights()
        return {
            name: before[name].to(weight).lerp(weight.detach(), share).to(self._types[name])
            for name, weight in self._weights.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and primitives."""
        moments = [self._optimizer.state[weight] for weight in self._weights.values()]
        return {
            "taken": self.taken,
            "steps": self.steps,
            "begun": self._begun,
            "weights": {name: weight.clone() for name, weight in self._weights.items()},
            "moments": [{k: v.clone() for k, v in each.items()} for each in moments],
            "pattern": self.patch.pattern,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        device = self.masked.device
        self.taken, self.steps = int(state["taken"]), int(state["steps"])
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

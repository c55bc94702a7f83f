"""Soft masks: factors from 0 to 1 for the kernels that are left after pruning.

The filters that carry a backdoor carry clean classes, too. Taken out a few at a time, they cost
more clean accuracy than is allowed long before some attacks are gone. Within a filter, the kernels
of the one and of the other differ: turned down together, with the clean loss in the same
objective, they do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_mnp.config import Constants
from lightning_mnp.defense_data.augment import Augmentation
from lightning_mnp.defense_data.defense_set import DefenseSet
from lightning_mnp.purify.harm import trimmed_mean
from lightning_mnp.signals.trace import Trace, TraceConstants, strength
from lightning_mnp.surgery.masked_network import MaskedNetwork

__all__ = ["SoftMaskConstants", "SoftMasks"]


@dataclass(frozen=True)
class SoftMaskConstants:
    """How kernels are turned down, and how far.

    Attributes:
        weight: What the traces count against the clean loss, in nats for all of their strength at
            the start.
        step: Length of a step: the root mean square over all kernels in use, if gradients agree.
        momentum: Momentum of the steps.
        average: Weight of the masks so far in their mean over the latest steps, the outcome.
        follow: The traces follow the network in every so many steps.
        images: Clean images of a step; never more than a batch.
        harm: Harm that masks may do beside that of pruning, in units of what pruning may.
        halvings: Masks that do too much harm are turned back to a share that is known to within
            1 / 2 ** halvings.
    """

    weight: float = 0.2
    step: float = 0.01
    momentum: float = 0.9
    average: float = 0.9
    follow: int = 10
    images: int = 64
    harm: int = 4
    halvings: int = 4


class SoftMasks:
    """Turns kernels down: the least of clean loss and traces, over masks from 0 to 1.

    It is the optimization of masks in the paper (Sec. 4.2) with three changes: masks are on
    kernels, not on filters; what counts against the clean loss is not the norm of the filters but
    the margin of the target class where the backdoor shows; and the masks stay as they are instead
    of being cut at a threshold. Steps have a length that does not depend on the scale of the
    gradients: momentum, divided by the running root mean square over all kernels in use.

    Args:
        masked: The network.
        data: The defense set.
        traces: Where the backdoor shows; they follow the network, and run it by `masked` or an
            object made of it, which have the masks at the time.
        references: The strength of each trace before anything was pruned, above 0.
        filter_masks: Zeros for the filters pruned, ones for the others, shape (total filters,).
        augment: What is done to the images.
        steps: The steps to take.
        batch_size: Most images in a batch.
        seed: Seed of order and augmentation.
        impurity: The share of images that may be poisoned; of each batch, as many are left out of
            the clean loss, those with the greatest.
        constants: Constants that differ from their defaults.

    Attributes:
        steps: Number of steps.
        taken: Steps taken.
        masks: Mean of the masks over the latest steps, shape (total kernels,).

    Example:
        >>> from torch import nn
        >>> from lightning_mnp.surgery.layers import find_filter_layers
        >>> from lightning_mnp.signals.pile_up import SuppressedTrace
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> data = DefenseSet(torch.rand(8, 1, 2, 2), torch.arange(8) % 2)
        >>> masked = MaskedNetwork(network, find_filter_layers(network, data.images))
        >>> goals = 1 - data.labels
        >>> trace = SuppressedTrace(masked, [masked.weights()], data.images, goals)
        >>> soft = SoftMasks(
        ...     masked, data, [trace], [1.0], torch.tensor([0.0, 1.0, 1.0, 1.0]),
        ...     augment="none", steps=5, batch_size=8, seed=0,
        ... )
        >>> while not soft.finished:
        ...     metrics = soft.step()
        >>> soft.masks.shape, 0 <= float(soft.masks.min()) <= float(soft.masks.max()) <= 1
        (torch.Size([12]), True)
    """

    def __init__(
        self,
        masked: MaskedNetwork,
        data: DefenseSet,
        traces: Sequence[Trace],
        references: Sequence[float],
        filter_masks: Tensor,
        augment: Augmentation,
        steps: int,
        batch_size: int,
        seed: int,
        impurity: float = 0.0,
        constants: Constants | None = None,
    ) -> None:
        constants = constants or Constants()
        self.constants = constants.of(SoftMaskConstants)
        self._least = constants.of(TraceConstants).least_strength
        self.masked = masked
        self.data = data
        self.traces = list(traces)
        self.references = list(references)
        self.augment = augment
        self.steps = steps
        self.batch_size = min(batch_size, self.constants.images)
        self.seed = seed
        self.impurity = impurity
        self.taken = 0
        self._filters = filter_masks.clone()
        self._values = torch.ones(masked.kernels.total, device=masked.device)
        self.masks = self._values.clone()
        self._velocity = torch.zeros_like(self._values)
        self._square = 0.0
        self._now: list[float] = []  # the strength of each trace when this stage began

    @property
    def finished(self) -> bool:
        """Whether all steps were taken."""
        return self.taken >= self.steps

    def step(self) -> dict[str, float]:
        """Take one step.

        Returns:
            The clean ``loss`` before it, and the greatest ``margin`` of a trace as a share of
            that at the start.
        """
        if not self._now:
            with torch.no_grad():
                begun = [float(strength(trace, self._filters)) for trace in self.traces]
            self._now = [max(each, self._least) for each in begun]
        epoch, index = divmod(self.taken, self.data.passes(self.batch_size))
        # The former name of this stage is part of the seed: another would draw other images.
        key = (self.seed, "attenuation", epoch)
        images, labels = self.data.batch(
            index, self.batch_size, self.masked.device, self.augment, key
        )
        masks = self._values.clone().requires_grad_()
        greatest = 0.0
        with self.masked.masking_kernels(masks), torch.enable_grad():
            logits = self.masked(images, masks=self._filters, statistics="running")
            losses = F.cross_entropy(logits, labels, reduction="none")
            loss = trimmed_mean(losses, self.impurity)
            (gradient,) = torch.autograd.grad(loss, masks)
            # One by one, so that no more than one batch's activations are in memory.
            for trace, now, before in zip(self.traces, self._now, self.references, strict=True):
                found = strength(trace, self._filters)
                (slope,) = torch.autograd.grad(found, masks)
                gradient = gradient + self.constants.weight / now * slope
                greatest = max(greatest, float(found.detach()) / before)
        self._move(gradient)
        if self.taken % self.constants.follow == 0:
            with self.masked.masking_kernels(self._values):
                for trace in self.traces:
                    trace.adapt(self._filters, self.taken)
        return {"loss": float(loss.detach()), "margin": greatest}

    def _move(self, gradient: Tensor) -> None:
        constants = self.constants
        rest = 1 - constants.momentum
        self.taken += 1
        used = gradient[gradient != 0]  # layers that are not called would make all steps longer
        square = float(used.square().mean()) if len(used) else 0.0
        self._square += rest * (square - self._square)
        size = (self._square / (1 - constants.momentum**self.taken)) ** 0.5
        self._velocity = constants.momentum * self._velocity + rest * gradient / max(size, 1e-12)
        self._values = (self._values - constants.step * self._velocity).clamp(0.0, 1.0)
        self.masks = constants.average * self.masks + (1 - constants.average) * self._values

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and primitives; that of the traces is not part of it."""
        return {
            "taken": self.taken,
            "masks": self.masks,
            "values": self._values,
            "velocity": self._velocity,
            "square": self._square,
            "now": list(self._now),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        device = self.masked.device
        self.taken = int(state["taken"])
        self.masks = state["masks"].to(device)
        self._values = state["values"].to(device)
        self._velocity = state["velocity"].to(device)
        self._square = float(state["square"])
        self._now = [float(value) for value in state["now"]]

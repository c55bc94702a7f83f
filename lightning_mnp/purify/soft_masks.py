"""Masks between 0 and 1 for the filters that are left: what pruning alone cannot take.

The filters that carry a backdoor carry clean classes, too. Taken out one by one, they cost more
clean accuracy than is allowed long before some attacks are gone; turned down together, with the
clean loss in the same objective, they do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_mnp.config import Augmentation
from lightning_mnp.defense_data.defense_set import DefenseSet
from lightning_mnp.purify.harm import trimmed_mean
from lightning_mnp.purify.traces import LEAST_STRENGTH, Source, strength
from lightning_mnp.surgery.masked_network import MaskedNetwork

__all__ = ["Attenuation"]

# What the sources count against the clean loss, in nats for all of their strength at the start.
_WEIGHT = 0.1
# Length of a step: the root mean square over all filters, where gradients agree.
_STEP = 0.03
_MOMENTUM = 0.9
# Of the masks, whose mean over the latest steps is the outcome.
_AVERAGE = 0.9
# The sources follow the network in every so many steps.
_FOLLOW = 2


class Attenuation:
    """Turns filters down: the least of clean loss and sources, over masks from 0 to 1.

    It is the optimization of masks in the paper (Sec. 4.2) with two changes: what counts against
    the clean loss is not the norm of the filters but the margin of the target class where the
    backdoor shows, and the masks stay as they are instead of being cut at a threshold. Steps have
    a length that does not depend on the scale of the gradients: momentum, divided by the running
    root mean square over all filters. They end when all sources that decide are weak.

    Args:
        masked: The network.
        data: The defense set.
        sources: Where the backdoor shows; they follow the network.
        references: The strength of each source before anything was pruned, above 0.
        masks: Masks to begin with, shape (total filters,), 0 for the filters pruned, which stay
            pruned.
        free: Which filters may be turned down, boolean, same shape.
        augment: What is done to the images.
        steps: Most steps.
        batch_size: Most images in a batch.
        seed: Seed of order and augmentation.
        impurity: The share of images that may be poisoned; of each batch, as many are left out of
            the clean loss, those with the greatest.

    Attributes:
        steps: Number of steps.
        taken: Steps taken.
        enough: Whether the sources that decide are weak.
        stopped: Whether :meth:`stop` has ended it.
        masks: Mean of the masks over the latest steps, shape (total filters,).

    Example:
        >>> from torch import nn
        >>> from lightning_mnp.surgery.layers import find_filter_layers
        >>> from lightning_mnp.purify.traces import SuppressedSource
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> data = DefenseSet(torch.rand(8, 1, 2, 2), torch.arange(8) % 2)
        >>> masked = MaskedNetwork(network, find_filter_layers(network, data.images))
        >>> goals = 1 - data.labels
        >>> source = SuppressedSource(masked, [masked.weights()], data.images, goals)
        >>> attenuation = Attenuation(
        ...     masked, data, [source], [1.0], torch.tensor([0.0, 1.0, 1.0, 1.0]),
        ...     free=torch.ones(4) > 0, augment="none", steps=5, batch_size=8, seed=0,
        ... )
        >>> while not attenuation.finished:
        ...     metrics = attenuation.step()
        >>> float(attenuation.masks[0]), float(attenuation.masks.max()) <= 1
        (0.0, True)
    """

    def __init__(
        self,
        masked: MaskedNetwork,
        data: DefenseSet,
        sources: Sequence[Source],
        references: Sequence[float],
        masks: Tensor,
        free: Tensor,
        augment: Augmentation,
        steps: int,
        batch_size: int,
        seed: int,
        impurity: float = 0.0,
    ) -> None:
        self.masked = masked
        self.data = data
        self.sources = list(sources)
        self.references = list(references)
        self.augment = augment
        self.steps = steps
        self.batch_size = batch_size
        self.seed = seed
        self.impurity = impurity
        self.taken = 0
        self.enough = False
        self.stopped = False
        self.masks = masks.clone()
        self._free = (free & (masks != 0)).to(masks)
        self._values = masks.clone()
        self._velocity = torch.zeros_like(masks)
        self._square = 0.0
        self._now: list[float] = []  # the strength of each source when this stage began

    @property
    def finished(self) -> bool:
        """Whether all steps were taken, or no more are needed or wanted."""
        return self.enough or self.stopped or self.taken >= self.steps

    def stop(self) -> None:
        """Take no more steps."""
        self.stopped = True

    def step(self) -> dict[str, float]:
        """Take one step.

        Returns:
            The clean ``loss`` before it, and the greatest ``margin`` of a source as a share of
            that at the start.
        """
        if not self._now:
            with torch.no_grad():
                begun = [float(strength(source, self._values)) for source in self.sources]
            self._now = [max(each, LEAST_STRENGTH) for each in begun]
        epoch, index = divmod(self.taken, self.data.passes(self.batch_size))
        key = (self.seed, "attenuation", epoch)
        images, labels = self.data.batch(
            index, self.batch_size, self.masked.device, self.augment, key
        )
        masks = self._values.clone().requires_grad_()
        with torch.enable_grad():
            logits = self.masked(images, masks=masks, statistics="running")
            losses = F.cross_entropy(logits, labels, reduction="none")
            loss = trimmed_mean(losses, self.impurity)
            (gradient,) = torch.autograd.grad(loss, masks)
        greatest, enough = 0.0, True
        # One by one, so that no more than one batch's activations are in memory.
        for source, now, before in zip(self.sources, self._now, self.references, strict=True):
            with torch.enable_grad():
                found = strength(source, masks)
                gradient = gradient + _WEIGHT / now * torch.autograd.grad(found, masks)[0]
            level = float(found.detach()) / before
            greatest = max(greatest, level)
            if source.decides:
                enough = enough and source.is_weak(float(found.detach()), before)
        self.enough = enough
        if not self.enough:
            self._move(gradient)
            if self.taken % _FOLLOW == 0:
                for source in self.sources:
                    source.adapt(self._values, self.taken)
        return {"loss": float(loss.detach()), "margin": greatest}

    def _move(self, gradient: Tensor) -> None:
        gradient = gradient * self._free
        self.taken += 1
        self._square += (1 - _MOMENTUM) * (float(gradient.square().mean()) - self._square)
        size = (self._square / (1 - _MOMENTUM**self.taken)) ** 0.5
        self._velocity = _MOMENTUM * self._velocity + (1 - _MOMENTUM) * gradient / max(size, 1e-12)
        self._values = (self._values - _STEP * self._velocity).clamp(0.0, 1.0)
        self.masks = _AVERAGE * self.masks + (1 - _AVERAGE) * self._values

    def state_dict(self) -> dict[str, Any]:
        """Give the state as tensors and primitives; that of the sources is not part of it."""
        return {
            "taken": self.taken,
            "enough": self.enough,
            "stopped": self.stopped,
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
        self.enough = bool(state["enough"])
        self.stopped = bool(state["stopped"])
        self.masks = state["masks"].to(device)
        self._values = state["values"].to(device)
        self._velocity = state["velocity"].to(device)
        self._square = float(state["square"])
        self._now = [float(value) for value in state["now"]]

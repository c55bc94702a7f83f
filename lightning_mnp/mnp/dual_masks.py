"""Stage 2, dual-mask optimization: weight penalty (Eq. 5) and clean preserving (Eq. 7)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_mnp.config import MNPConfig
from lightning_mnp.mnp.saliency import filter_magnitudes
from lightning_mnp.mnp.updates import Updates
from lightning_mnp.surgery.masked_network import MaskedNetwork, Weights

__all__ = ["DualMask"]


class DualMask:
    """One optimized mask: M1 on the suppressed weights or M2 on the original ones.

    The loss is ``cross-entropy + sign * lambda * sum(w * m)`` with the filters' l2 norms w of
    the weights that are masked; after every step the mask is projected onto its range.

    Args:
        masked: The network.
        weights: Parameters that are masked; they are not changed.
        config: Options.
        preserving: False for M1 in [0, 1] with a penalty (Eq. 5), True for M2 in [1, 2] with a
            reward (Eq. 7).

    Attributes:
        values: The mask, shape (total filters,).
        optimizer: Its optimizer.
        stopped: Why it is no longer optimized, or "".

    Example:
        >>> from torch import nn
        >>> from lightning_mnp.surgery.layers import find_filter_layers
        >>> from lightning_mnp.mnp.updates import PlainUpdates
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> images, labels = torch.rand(8, 1, 2, 2), torch.arange(8) % 2
        >>> masked = MaskedNetwork(network, find_filter_layers(network, images))
        >>> mask = DualMask(masked, masked.weights(), MNPConfig(), preserving=True)
        >>> _ = mask.step(images, labels, PlainUpdates())
        >>> bool((mask.values >= 1).all())
        True
    """

    def __init__(
        self, masked: MaskedNetwork, weights: Weights, config: MNPConfig, preserving: bool
    ) -> None:
        self.masked = masked
        self.config = config
        self.preserving = preserving
        self.values = torch.ones(masked.layers.total, device=masked.device, requires_grad=True)
        self.optimizer = torch.optim.SGD(
            [self.values], lr=config.masks.lr, momentum=config.masks.momentum
        )
        self.restart(weights)

    @torch.no_grad()
    def restart(self, weights: Weights) -> None:
        """Begin again at ones, for the same or other weights."""
        self.weights = {name: weight.detach() for name, weight in weights.items()}
        self.norms = filter_magnitudes(self.masked, self.weights)
        self.values.fill_(1.0)
        self.optimizer.state.clear()
        self.optimizer.zero_grad(set_to_none=True)
        self.stopped = ""

    def step(self, images: Tensor, labels: Tensor, updates: Updates) -> dict[str, float]:
        """Take one step and project the mask onto its range.

        Args:
            images: Shape (N, C, ...), on the network's device.
            labels: Shape (N,).
            updates: Does the backward pass and the optimizer's step.

        Returns:
            The ``loss`` and the ``accuracy`` on the batch, before the step. A loss or gradient
            that is not finite ends the optimization, and the last mask is kept.
        """
        if self.stopped:
            return {"loss": math.nan, "accuracy": math.nan}
        logits = self.masked(images, weights=self.weights, masks=self.values)
        magnitude = self.config.masks.penalty * (self.norms * self.values.abs()).sum()
        loss = F.cross_entropy(logits, labels) + (-magnitude if self.preserving else magnitude)
        value = float(loss.detach())
        metrics = {"loss": value, "accuracy": float((logits.argmax(1) == labels).float().mean())}
        if not math.isfinite(value):
            self.stopped = f"the loss became {value}"
            return metrics
        updates.backward(loss, self.optimizer)
        assert self.values.grad is not None
        if not bool(torch.isfinite(self.values.grad).all()):
            self.stopped = "a gradient was not finite"
            return metrics
        updates.step(self.optimizer)
        with torch.no_grad():
            self.values.clamp_(*((1.0, 2.0) if self.preserving else (0.0, 1.0)))
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs beside the weights, as tensors and primitives."""
        return {
            "values": self.values.detach(),
            "optimizer": self.optimizer.state_dict(),
            "stopped": self.stopped,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.values.copy_(state["values"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.stopped = str(state["stopped"])

"""Changes: what a purification does to a network, and how the network runs with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mnp.surgery.logit_shift import LogitShift
from lightning_mnp.surgery.masked_network import MaskedNetwork, Weights
from lightning_mnp.surgery.prune import Pruning, prune, without_filters

__all__ = ["Changes"]


class Changes:
    """What is removed from a network, turned down, tuned and added to its logits.

    The network itself changes only by :meth:`apply`.

    Args:
        masked: The network as it is, on its device.
        weights_only: Whether only the weights of a filter are removed, and not what its
            normalization layer adds (`pruning.removes="filter"`).

    Attributes:
        removed: Positions of the filters to prune, worst first.
        kernel_masks: What all kernels are multiplied by, shape (total kernels,), or None.
        cut: Positions of the kernels that were cut, lowest mask first; none if tuning was turned
            back, wholly or in part.
        tuned: Weights by name after cuts and tuning, masks on kernels included, of all layers that
            have kernels; or None.
        tuned_by: By how much tuning has changed weights, as a share of their norm; 0 for not.
        shift: What is added to the logits, or None.

    Example:
        >>> from lightning_mnp.surgery.layers import find_filter_layers
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> layers = find_filter_layers(network, torch.rand(2, 1, 2, 2))
        >>> changes = Changes(MaskedNetwork(network, layers))
        >>> changes.any
        False
        >>> changes.removed = torch.tensor([2])
        >>> changes.any, changes.filter_masks().tolist()
        (True, [1.0, 1.0, 0.0, 1.0])
        >>> pruning = changes.apply(network)
        >>> bool((network[0].weight[2] == 0).all())
        True
    """

    def __init__(self, masked: MaskedNetwork, weights_only: bool = False) -> None:
        self.masked = masked
        self.weights_only = weights_only
        self.removed = torch.empty(0, dtype=torch.long, device=masked.device)
        self.kernel_masks: Tensor | None = None
        self.cut = torch.empty(0, dtype=torch.long, device=masked.device)
        self.tuned: Weights | None = None
        self.tuned_by = 0.0
        self.shift: LogitShift | None = None

    @property
    def any(self) -> bool:
        """Whether filters, kernels or weights differ from those of the network."""
        masked = self.kernel_masks is not None
        return len(self.removed) > 0 or masked or self.tuned is not None

    def filter_masks(self) -> Tensor:
        """Return 0 for the filters pruned and 1 for the others, shape (total filters,)."""
        values = torch.ones(self.masked.layers.total, device=self.masked.device)
        values[self.removed] = 0.0
        return values

    def left(self) -> dict[str, list[float]]:
        """Return how much of each filter is left, as a share of its weights, by layer.

        It is empty if no kernel was turned down. Linear layers that have no filters are not told.
        """
        if self.kernel_masks is None:
            return {}
        shares = self.masked.kernels.left(self.masked.weights(), self.kernel_masks)
        layers = self.masked.layers
        found = {layer.name: shares.get(layer.name, [1.0] * layer.filters) for layer in layers}
        for name, index in map(layers.locate, self.removed.tolist()):
            found[name][index] = 0.0
        return found

    def turned_down(self) -> Weights:
        """Return the network's weights times the masks of their kernels, before tuning."""
        weights = self.masked.weights()
        if self.kernel_masks is None:
            return weights
        return self.masked.kernels.scaled(weights, self.kernel_masks)

    def call(self) -> dict[str, Any]:
        """Return what a call of the network takes to run as it will be, but for the shift."""
        weights = {**self.turned_down(), **(self.tuned or {})}
        if not self.weights_only:
            return {"weights": weights, "masks": self.filter_masks()}
        return {
            "weights": {**weights, **without_filters(self.masked.layers, weights, self.removed)}
        }

    def apply(self, network: nn.Module) -> Pruning:
        """Change a network.

        Args:
            network: The network, or a copy of it.

        Returns:
            What was removed; its ``undo`` puts it back.
        """
        return prune(
            network,
            self.masked.layers,
            self.removed,
            self.shift,
            weights_only=self.weights_only,
            kernel_masks=self.kernel_masks,
            weights=self.tuned,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and primitives."""
        return {
            "removed": self.removed,
            "kernel_masks": self.kernel_masks,
            "cut": self.cut,
            "tuned": None if self.tuned is None else dict(self.tuned),
            "tuned_by": self.tuned_by,
            "shift": None if self.shift is None else [self.shift.name, self.shift.values],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Args:
            state: The state; what else it holds is of no account.
        """
        device = self.masked.device
        masks, tuned, shift = state["kernel_masks"], state["tuned"], state["shift"]
        self.removed = state["removed"].to(device)
        self.kernel_masks = None if masks is None else masks.to(device)
        self.cut = state["cut"].to(device)
        self.tuned = None if tuned is None else {k: v.to(device) for k, v in tuned.items()}
        self.tuned_by = float(state["tuned_by"])
        self.shift = None if shift is None else LogitShift(*shift)

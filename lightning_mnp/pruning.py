"""Stage 3, thresholded pruning: which filters go, and how many."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mnp.config import MNPConfig
from lightning_mnp.layers import FilterLayers
from lightning_mnp.masks import FilterMasks

__all__ = ["Pruning", "PruningSearch", "prune", "pruning_order"]


def pruning_order(scores: Tensor) -> Tensor:
    """Sort filters by M1 + M2, those to prune first in front.

    Args:
        scores: M1 + M2 of every filter, shape (total filters,).

    Returns:
        Filter positions, shape (total filters,); equal scores keep the network's order.

    Example:
        >>> pruning_order(torch.tensor([2.0, 1.0, 2.5, 1.0]))
        tensor([1, 3, 0, 2])
    """
    return scores.argsort(stable=True)


@dataclass
class Pruning:
    """A removal that can be taken back.

    Attributes:
        pruned: Pairs (layer name, filter index).
        saved: What the affected tensors of the network held before, by name.
    """

    pruned: list[tuple[str, int]]
    saved: dict[str, Tensor] = field(repr=False, default_factory=dict)

    @torch.no_grad()
    def undo(self, network: nn.Module) -> None:
        """Put back what was removed, bit for bit.

        Args:
            network: The network that was pruned.

        Raises:
            KeyError: If the network has no tensor of a saved name.
        """
        tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        for name, saved in self.saved.items():
            tensors[name].copy_(saved)


def prune(network: nn.Module, layers: FilterLayers, positions: Tensor) -> Pruning:
    """Remove filters: their output maps are zero from then on, for good or until ``undo``.

    Args:
        network: The network, which is changed.
        layers: Its layers.
        positions: Positions of the filters in a flat vector over all layers.

    Returns:
        What was removed, with the tensors needed to take it back.

    Raises:
        IndexError: If a position is out of range.

    Example:
        >>> from lightning_mnp.layers import find_filter_layers
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2))
        >>> layers = find_filter_layers(network, torch.rand(1, 1, 4, 4))
        >>> pruning = prune(network, layers, torch.tensor([2]))
        >>> pruning.pruned, network[0].weight[2].abs().sum().item()
        ([('0', 2)], 0.0)
        >>> pruning.undo(network)
        >>> network[0].weight[2].abs().sum().item() > 0
        True
    """
    pruned = [layers.locate(int(position)) for position in positions]
    touched = {name for name, _ in pruned}
    prefixes = {f"{layer.name}." for layer in layers if layer.name in touched}
    prefixes |= {f"{layer.site}." for layer in layers if layer.name in touched}
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    saved = {
        name: tensor.detach().clone()
        for name, tensor in tensors.items()
        if f"{name.rpartition('.')[0]}." in prefixes
    }
    device = next(network.parameters()).device
    values = torch.ones(layers.total, device=device)
    values[positions.to(device)] = 0.0
    FilterMasks(network, layers, values).bake()
    return Pruning(pruned, saved)


class PruningSearch:
    """Finds how many filters to prune; looks at clean data only.

    ``"count"``, ``"share"`` and ``"threshold"`` need no search. ``"auto"`` walks down the ranking
    and stops before the accuracy on the defense set falls by more than the tolerance.

    Args:
        config: Options.
        total: Number of filters of the network.
    """

    def __init__(self, config: MNPConfig, total: int) -> None:
        if config.rule == "count" and config.amount >= total:
            raise ValueError(
                f"Expected argument `amount` to be below {total}, the number of filters, but got "
                f"{config.amount:g}."
            )
        self.config = config
        self.total = total
        self.curve: list[tuple[int, float]] = []

    def most_steps(self) -> int:
        """An upper bound on the counts that will be tried."""
        return max(1, len(self._counts()))

    def _counts(self) -> list[int]:
        if self.config.rule != "auto":
            return []
        most = max(1, math.ceil(self.config.amount * self.total))
        return list(range(1, most + 1))

    def next_count(self, scores: Tensor) -> int | None:
        """The next number of filters to try, or None where the search is over."""
        counts = self._counts()
        return counts[len(self.curve)] if len(self.curve) < len(counts) else None

    def record(self, count: int, accuracy: float) -> None:
        """Take in what the clean data say of a number of filters."""
        self.curve.append((count, accuracy))

    def chosen(self, scores: Tensor) -> int:
        """The number of filters to prune.

        Args:
            scores: M1 + M2 of every filter, shape (total filters,).
        """
        rule, amount = self.config.rule, self.config.amount
        if rule == "count":
            return int(amount)
        if rule == "share":
            return round(amount * self.total)
        if rule == "threshold":  # Algorithm 1, line 14: kept where M1 + M2 > epsilon
            return int((scores <= amount).sum())
        return self.curve[-1][0] if self.curve else 0

    def state_dict(self) -> dict[str, Any]:
        """Give the state as primitives."""
        return {"curve": [list(point) for point in self.curve]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.curve = [(int(count), float(accuracy)) for count, accuracy in state["curve"]]

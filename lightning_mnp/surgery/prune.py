"""Stage 3, thresholded pruning: which filters go, and how many."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_mnp.surgery.layers import FilterLayers
from lightning_mnp.surgery.logit_shift import LogitShift
from lightning_mnp.surgery.masks import FilterMasks

__all__ = ["Pruning", "prune"]


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


def prune(
    network: nn.Module,
    layers: FilterLayers,
    positions: Tensor,
    shift: LogitShift | None = None,
    masks: Tensor | None = None,
) -> Pruning:
    """Remove filters: their output maps are zero from then on, for good or until ``undo``.

    Args:
        network: The network, which is changed.
        layers: Its layers.
        positions: Positions of the filters in a flat vector over all layers.
        shift: What is added to the logits at the same time.
        masks: What the output maps of the others are multiplied by, shape (total filters,);
            nothing where None.

    Returns:
        What was removed, with the tensors needed to take it back.

    Raises:
        IndexError: If a position is out of range.

    Example:
        >>> from lightning_mnp.surgery.layers import find_filter_layers
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2))
        >>> layers = find_filter_layers(network, torch.rand(1, 1, 4, 4))
        >>> pruning = prune(network, layers, torch.tensor([2]))
        >>> pruning.pruned, network[0].weight[2].abs().sum().item()
        ([('0', 2)], 0.0)
        >>> pruning.undo(network)
        >>> network[0].weight[2].abs().sum().item() > 0
        True
    """
    device = next(network.parameters()).device
    values = torch.ones(layers.total, device=device) if masks is None else masks.to(device).clone()
    pruned = [layers.locate(int(position)) for position in positions]
    values[positions.to(device)] = 0.0
    parts = zip(layers, values.split(layers.sizes), strict=True)
    touched = {layer.name for layer, part in parts if bool((part != 1).any())}
    prefixes = {f"{layer.name}." for layer in layers if layer.name in touched}
    prefixes |= {f"{layer.site}." for layer in layers if layer.name in touched}
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    saved = {
        name: tensor.detach().clone()
        for name, tensor in tensors.items()
        if f"{name.rpartition('.')[0]}." in prefixes or (shift and name == shift.name)
    }
    pruning = Pruning(pruned, saved)
    try:
        FilterMasks(network, layers, values).bake()
        if shift is not None:
            bias = tensors[shift.name]
            bias.data.add_(shift.values.to(bias))
    except BaseException:  # an interrupt, too, leaves all filters or none of these
        pruning.undo(network)
        raise
    return pruning

"""Pruning: filters are removed from a network, for good or until it is undone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_mnp.surgery.kernels import find_kernels
from lightning_mnp.surgery.layers import FilterLayers
from lightning_mnp.surgery.logit_shift import LogitShift
from lightning_mnp.surgery.masks import FilterMasks
from lightning_mnp.surgery.scaling import scale_filters_

__all__ = ["Pruning", "prune", "without_filters"]


@dataclass
class Pruning:
    """A pruning that can be undone.

    Attributes:
        pruned: Pairs (layer name, filter index) of the removed filters.
        saved: Copies of the changed tensors as they were before, by name.

    Example:
        >>> network = nn.Linear(1, 1)
        >>> pruning = Pruning([], {"bias": torch.tensor([2.0])})
        >>> pruning.undo(network)
        >>> network.bias.item()
        2.0
    """

    pruned: list[tuple[str, int]]
    saved: dict[str, Tensor] = field(repr=False, default_factory=dict)

    @torch.no_grad()
    def undo(self, network: nn.Module) -> None:
        """Restore the pruned network, bit for bit.

        Args:
            network: The network that was pruned.

        Raises:
            KeyError: If the network has no tensor with the name of a saved one.
        """
        tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        for name, saved in self.saved.items():
            tensors[name].copy_(saved)


def prune(
    network: nn.Module,
    layers: FilterLayers,
    positions: Tensor,
    shift: LogitShift | None = None,
    weights_only: bool = False,
    kernel_masks: Tensor | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> Pruning:
    """Remove filters from a network: their output maps are zero from then on.

    Args:
        network: The network, which is changed.
        layers: Its layers.
        positions: Positions of the filters among the filters of all layers.
        shift: Constants that are added to the logits at the same time, or None.
        weights_only: Whether only the weights of the filters are set to zero, see
            :func:`without_filters`.
        kernel_masks: Factors of the kernels, see
            :class:`~lightning_mnp.surgery.kernels.Kernels`; all ones if None.
        weights: Weights by name that replace those of the network, before filters are removed;
            kernel masks are part of them already. None to replace none.

    Returns:
        The removed filters, and what :meth:`Pruning.undo` needs.

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
    values = torch.ones(layers.total, device=device)
    pruned = [layers.locate(int(position)) for position in positions]
    values[positions.to(device)] = 0.0
    parts = zip(layers, values.split(layers.sizes), strict=True)
    touched = {layer.name for layer, part in parts if bool((part != 1).any())}
    prefixes = {f"{layer.name}." for layer in layers if layer.name in touched}
    prefixes |= {f"{layer.site}." for layer in layers if layer.name in touched}
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    scaled = dict(weights) if weights is not None else _scaled(network, layers, kernel_masks)
    saved = {
        name: tensor.detach().clone()
        for name, tensor in tensors.items()
        if f"{name.rpartition('.')[0]}." in prefixes
        or name in scaled
        or (shift and name == shift.name)
    }
    pruning = Pruning(pruned, saved)
    try:
        for name, weight in scaled.items():
            tensors[name].data.copy_(weight)
        if weights_only:
            for name, weight in without_filters(layers, dict(tensors), positions).items():
                tensors[name].data.copy_(weight)
        else:
            FilterMasks(network, layers, values).bake()
        if shift is not None:
            bias = tensors[shift.name]
            bias.data.add_(shift.values.to(bias))
        return pruning
    except BaseException:  # also after an interrupt, either all these filters are gone or none
        pruning.undo(network)
        raise


def _scaled(network: nn.Module, layers: FilterLayers, masks: Tensor | None) -> dict[str, Tensor]:
    """The weights that kernel masks change, multiplied by them."""
    if masks is None:
        return {}
    # An interrupt could leave gradients off, if they were to be off here.
    weights = {name: parameter.detach() for name, parameter in network.named_parameters()}
    changed = find_kernels(network, layers).scaled(weights, masks.detach())
    return {name: weight for name, weight in changed.items() if not weight.equal(weights[name])}


def without_filters(
    layers: FilterLayers, weights: Mapping[str, Tensor], positions: Tensor
) -> dict[str, Tensor]:
    """Return the weights of convolutions with those of some filters set to zero (Sec. 3.2).

    This is the letter of the paper. A bias, or a normalization layer behind the convolution, then
    leaves a constant map.

    Args:
        layers: Layers of a network.
        weights: Its parameters by name; they do not change.
        positions: Positions of the filters.

    Returns:
        The changed weights, by name.

    Example:
        >>> from lightning_mnp.surgery.layers import FilterLayer
        >>> layers = FilterLayers((FilterLayer("a", 2, "a", 1),))
        >>> without_filters(layers, {"a.weight": torch.ones(2, 1)}, torch.tensor([1]))
        {'a.weight': tensor([[1.], [0.]])}
    """
    kept = torch.ones(layers.total)
    kept[positions.cpu()] = 0.0
    changed = {}
    for layer, part in zip(layers, kept.split(layers.sizes), strict=True):
        if not bool(part.all()):
            name = f"{layer.name}.weight"
            copied = weights[name].detach().clone()
            changed[name] = scale_filters_(copied, part, layer.transposed, layer.groups)
    return changed

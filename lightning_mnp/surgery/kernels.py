"""Kernels: the weights of one filter on one input map; the smallest part that masks act on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_mnp.surgery.layers import FilterLayers, filter_rows

__all__ = ["KernelLayer", "Kernels", "find_kernels"]


@dataclass(frozen=True)
class KernelLayer:
    """A convolution or a linear layer.

    Attributes:
        name: Dotted name of the layer in the network.
        weight: Name of its weight among the network's parameters.
        shape: The first two dimensions of that weight; one kernel for each pair.
        transposed: Whether it is a transposed convolution, whose weight has the inputs first.
        groups: Number of groups of a convolution.
    """

    name: str
    weight: str
    shape: tuple[int, int]
    transposed: bool = False
    groups: int = 1


@dataclass(frozen=True)
class Kernels:
    """All kernels of a network, in the order of its layers.

    A convolution has one for each filter and input map, a linear layer one for each weight.

    Attributes:
        layers: The layers.

    Example:
        >>> kernels = find_kernels(nn.Sequential(nn.Conv2d(3, 4, 5), nn.Flatten(), nn.Linear(4, 2)))
        >>> kernels.sizes, kernels.total
        ([12, 8], 20)
    """

    layers: tuple[KernelLayer, ...]

    @property
    def sizes(self) -> list[int]:
        """Number of kernels of each layer."""
        return [layer.shape[0] * layer.shape[1] for layer in self.layers]

    @property
    def total(self) -> int:
        """Number of kernels of all layers together."""
        return sum(self.sizes)

    def scaled(self, weights: Mapping[str, Tensor], masks: Tensor) -> dict[str, Tensor]:
        """Multiply the kernels by masks.

        Args:
            weights: Parameters of the network by name; they do not change.
            masks: One factor for each kernel, shape (total,).

        Returns:
            All parameters, those of the layers multiplied, with gradients to the masks.

        Example:
            >>> network = nn.Linear(2, 1)
            >>> weights = {"weight": torch.ones(1, 2), "bias": torch.ones(1)}
            >>> find_kernels(network).scaled(weights, torch.tensor([0.5, 1.0]))["weight"]
            tensor([[0.5000, 1.0000]])
        """
        changed = dict(weights)
        for layer, part in zip(self.layers, masks.split(self.sizes), strict=True):
            weight = weights[layer.weight]
            factors = part.view(*layer.shape, *[1] * (weight.ndim - 2)).to(weight.device)
            changed[layer.weight] = (weight * factors).to(weight.dtype)
        return changed

    def left(self, weights: Mapping[str, Tensor], masks: Tensor) -> dict[str, list[float]]:
        """Compute how much masks leave of each filter.

        Args:
            weights: Parameters of the network by name.
            masks: One factor from 0 to 1 for each kernel, shape (total,).

        Returns:
            For each layer, by name, the share of the absolute weights of each filter, or of each
            row of a linear layer, that is left, from 0 to 1; 1 for a filter of zeros.

        Example:
            >>> weights = {"weight": torch.tensor([[3.0, 1.0]])}
            >>> find_kernels(nn.Linear(2, 1)).left(weights, torch.tensor([0.0, 1.0]))
            {'': [0.25]}
        """
        changed, shares = self.scaled(weights, masks), {}
        for layer in self.layers:
            kind = layer.transposed, layer.groups
            whole, rest = (
                filter_rows(each[layer.weight].float(), *kind).abs().sum(1)
                for each in (weights, changed)
            )
            shares[layer.name] = torch.where(whole > 0, rest / whole, 1.0).tolist()
        return shares


def find_kernels(network: nn.Module, layers: FilterLayers | None = None) -> Kernels:
    """Find the kernels of a network. The network does not run.

    Args:
        network: The network.
        layers: Its layers with filters, which know the names that are left out; None for none.

    Returns:
        The kernels of all convolutions and linear layers, the classifier head among them, whose
        weight is a parameter of the network. A weight that several layers share is there once.

    Example:
        >>> [layer.weight for layer in find_kernels(nn.Sequential(nn.Conv2d(1, 2, 3))).layers]
        ['0.weight']
    """
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    found = []
    for name, module in network.named_modules():
        wanted = layers is None or layers.wants(name)
        if not (wanted and isinstance(module, (_ConvNd, nn.Linear))):
            continue
        parameter = module._parameters.get("weight")  # without computing what is computed
        if parameter is None or not parameter.is_floating_point():
            continue
        weight = names.pop(id(parameter), None)
        if weight is not None:
            first, second = parameter.shape[:2]
            transposed = isinstance(module, _ConvTransposeNd)
            groups = getattr(module, "groups", 1)
            found.append(KernelLayer(name, weight, (first, second), transposed, groups))
    return Kernels(tuple(found))

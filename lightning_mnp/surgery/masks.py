"""Filter masks: factors of the output maps of filters, attached for a while or baked in."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchvision.ops import FrozenBatchNorm2d

from lightning_mnp.surgery.layers import FilterLayer, FilterLayers
from lightning_mnp.surgery.scaling import scale_filters_
from lightning_mnp.surgery.tracing import CHANNEL_NORMS

__all__ = ["FilterMasks", "scalable_filters", "undone_masks"]


class FilterMasks:
    """One factor for each filter of a network, all in one vector.

    Attached masks multiply the filters' output maps by forward hooks. If a normalization layer
    also applies an activation, they multiply its scale and shift during each call instead. After
    :meth:`remove` the network is what it was, bit for bit. Baked masks become part of the weights:
    the output map of a filter with the mask 0 is removed for good.

    Args:
        network: The network.
        layers: Its layers, from :func:`~lightning_mnp.surgery.layers.find_filter_layers`.
        values: Masks, shape (total filters,), floating point; all ones if None. The tensor is not
            copied, so that it can be optimized while attached.

    Raises:
        ValueError: If the values have another shape or are not floating point.

    Example:
        >>> from lightning_mnp.surgery.layers import find_filter_layers
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2))
        >>> images = torch.rand(1, 1, 4, 4)
        >>> layers = find_filter_layers(network, images)
        >>> with FilterMasks(network, layers, torch.zeros(4)):
        ...     logits = network(images)
        >>> bool((logits == network[2].bias).all())
        True
    """

    def __init__(
        self, network: nn.Module, layers: FilterLayers, values: Tensor | None = None
    ) -> None:
        if values is None:
            parameter = next(network.parameters())
            values = torch.ones(layers.total, device=parameter.device)
        if values.shape != (layers.total,) or not values.is_floating_point():
            raise ValueError(
                f"Expected argument `values` to be one floating point number for each of the "
                f"{layers.total} filters, but got {values.dtype} of shape {tuple(values.shape)}."
            )
        self.network = network
        self.layers = layers
        self.values = values
        self._handles: list[RemovableHandle] = []

    @property
    def attached(self) -> bool:
        """Whether the masks act on the network now."""
        return bool(self._handles)

    def attach(self) -> FilterMasks:
        """Make the masks act on the network until :meth:`remove` is called.

        Returns:
            The object itself, so that ``with masks.attach():`` reads well.

        Raises:
            RuntimeError: If they are attached already.
        """
        if self.attached:
            raise RuntimeError("The masks are attached already; call `remove` first.")
        parts = self.values.split(self.layers.sizes)
        sites = [self.network.get_submodule(layer.site) for layer in self.layers]
        for layer, site, part in zip(self.layers, sites, parts, strict=True):
            if layer.active:
                before, after = _rescale(part)
                self._handles.append(site.register_forward_pre_hook(before))
                self._handles.append(site.register_forward_hook(after, always_call=True))
            else:
                self._handles.append(site.register_forward_hook(_multiply(part, layer.channel_dim)))
        return self

    def remove(self) -> None:
        """Remove the masks from the network; if they are not attached, do nothing."""
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> FilterMasks:
        return self if self.attached else self.attach()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    @torch.no_grad()
    def bake(self) -> None:
        """Write the masks into the network's weights, for good.

        In evaluation mode the network then computes what it computed with the masks attached.
        For a filter with the mask 0, everything is set to 0 that could produce its map: with batch
        normalization, the filter's weights and bias, running mean, scale and shift; with a
        normalization over several channels, scale and shift only, because zeros in its input would
        change the statistics of the other channels; without normalization, weights and bias.

        Raises:
            RuntimeError: If the masks are attached, or a mask other than 0 and 1 belongs to a
                normalization layer without scale and shift, or to a filter whose weights are
                standardized without a gain.
        """
        if self.attached:
            raise RuntimeError("The masks are attached; call `remove` before `bake`.")
        parts = self.values.detach().split(self.layers.sizes)
        for layer, part in zip(self.layers, parts, strict=True):
            if _scales(self.network, layer) or bool(((part == 0) | (part == 1)).all()):
                continue
            if layer.site != layer.name:
                raise RuntimeError(
                    f"Masks other than 0 and 1 cannot be baked into {layer.site!r}, which has no "
                    "scale and shift. Use `site='filter'`."
                )
            raise RuntimeError(
                f"Masks other than 0 and 1 cannot be baked into {layer.name!r}, whose output "
                "does not scale with its weights. Round them, or leave them attached."
            )
        for layer, part in zip(self.layers, parts, strict=True):
            _bake_layer(self.network, layer, part)

    def __repr__(self) -> str:
        state = "attached" if self.attached else "not attached"
        return f"FilterMasks({len(self.layers)} layers, {self.layers.total} filters, {state})"


def scalable_filters(network: nn.Module, layers: FilterLayers) -> Tensor:
    """Find the filters that masks other than 0 and 1 can be baked into.

    Args:
        network: The network.
        layers: Its layers.

    Returns:
        Whether each filter is one of them, boolean, shape (total filters,), on the CPU.

    Example:
        >>> from lightning_mnp.surgery.layers import find_filter_layers
        >>> network = nn.Sequential(nn.Conv2d(1, 2, 4), nn.BatchNorm2d(2, affine=False))
        >>> network = network.append(nn.Flatten()).append(nn.Linear(2, 2))
        >>> scalable_filters(network, find_filter_layers(network, torch.rand(2, 1, 4, 4)))
        tensor([False, False])
    """
    parts = [torch.full((layer.filters,), _scales(network, layer)) for layer in layers]
    return torch.cat(parts)


def undone_masks(network: nn.Module, layers: FilterLayers, running: bool) -> list[str]:
    """Find the layers whose masks do nothing, because normalization behind them undoes any scale.

    It does if it divides each channel by that channel's own spread over the images at hand.

    Args:
        network: The network.
        layers: Its layers.
        running: Whether it normalizes by stored statistics, as far as there are any.

    Returns:
        Names of the layers.

    Example:
        >>> from lightning_mnp.surgery.layers import find_filter_layers
        >>> network = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Flatten())
        >>> network = network.append(nn.Linear(18, 2))
        >>> layers = find_filter_layers(network, torch.rand(2, 1, 4, 4), site="filter")
        >>> [undone_masks(network, layers, running) for running in (False, True)]
        [['0'], []]
    """
    pairs = ((layer, layer.norm) for layer in layers if layer.site == layer.name)
    return [
        layer.name
        for layer, norm in pairs
        if norm is not None and _undoes_scale(network.get_submodule(norm), running)
    ]


def _undoes_scale(norm: nn.Module, running: bool) -> bool:
    if isinstance(norm, nn.GroupNorm):
        return norm.num_groups == norm.num_channels
    if isinstance(norm, FrozenBatchNorm2d) or not isinstance(norm, CHANNEL_NORMS):
        return False
    return not running or norm.running_mean is None


def _scales(network: nn.Module, layer: FilterLayer) -> bool:
    site = network.get_submodule(layer.site)
    return bool(layer.scale) if layer.site == layer.name else site.weight is not None


def _multiply(values: Tensor, dim: int) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        shape = [1] * output.ndim
        shape[dim] = -1
        return output * values.reshape(shape).to(output.dtype)

    return hook


def _rescale(values: Tensor) -> tuple[Callable[..., None], Callable[..., None]]:
    """Return hooks that scale a layer's weight and bias before a call, and restore them."""
    saved: dict[str, nn.Parameter] = {}

    def before(module: nn.Module, args: Any) -> None:
        for name in ("weight", "bias"):
            tensor = module._parameters.get(name)
            if tensor is not None:
                saved[name] = tensor
                module._parameters[name] = tensor * values.to(tensor.dtype)  # type: ignore[assignment]

    def after(module: nn.Module, args: Any, output: Any) -> None:
        module._parameters.update(saved)
        saved.clear()

    return before, after


def _bake_layer(network: nn.Module, layer: FilterLayer, values: Tensor) -> None:
    convolution: Any = network.get_submodule(layer.name)
    site: Any = network.get_submodule(layer.site)
    weight, bias = convolution.weight, convolution.bias
    kept = values != 0
    if layer.site == layer.name:
        if layer.scale == "weight":
            _scale_filters(layer, weight, values)
        else:
            _scale_filters(layer, weight, kept)
            if layer.scale:
                gain = getattr(convolution, layer.scale)
                gain.mul_(values.to(gain).view_as(gain))
        if bias is not None:
            bias.mul_(values.to(bias))
        return
    for parameter in (site.weight, getattr(site, "bias", None)):
        if parameter is not None:
            parameter.mul_(values.to(parameter))
    if isinstance(site, CHANNEL_NORMS):
        _scale_filters(layer, weight, kept)
        for vector in (bias, site.running_mean):
            if vector is not None:
                vector.masked_fill_(~kept.to(vector.device), 0.0)


def _scale_filters(layer: FilterLayer, weight: Tensor, values: Tensor) -> None:
    scale_filters_(weight, values, layer.transposed, layer.groups)

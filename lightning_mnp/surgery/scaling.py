"""Which tensors of a layer scale its output maps, found by trying where the class does not say.

PyTorch's own convolutions scale with their weights, its normalization layers with scale and
shift. Classes derived from them may do otherwise: standardize the weights, so that a gain scales
the filters, or apply an activation behind the shift, so that nothing scales what leaves the layer.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torchvision.ops import FrozenBatchNorm2d

__all__ = ["NormKind", "filter_scale", "norm_kind", "scale_filters_"]

NormKind = Literal["plain", "active", "other"]

_PLAIN = frozenset(
    kind.forward
    for kind in (
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
        _BatchNorm,
        SyncBatchNorm,
        _InstanceNorm,
        FrozenBatchNorm2d,
        nn.GroupNorm,
        nn.LayerNorm,
        nn.RMSNorm,
    )
)
_PLAIN_INNER = (nn.Conv1d._conv_forward, nn.Conv2d._conv_forward, nn.Conv3d._conv_forward)


def scale_filters_(weight: Tensor, factors: Tensor, transposed: bool, groups: int) -> Tensor:
    """Multiply each filter of a convolution's weight by a factor, in place.

    Args:
        weight: The weight, as :func:`~lightning_mnp.surgery.layers.filter_rows` takes it.
        factors: One factor for each filter, shape (filters,).
        transposed: Whether it belongs to a transposed convolution.
        groups: Number of groups.

    Returns:
        The weight.

    Example:
        >>> scale_filters_(torch.ones(2, 1, 1), torch.tensor([0.0, 3.0]), False, 1).flatten()
        tensor([0., 3.])
    """
    shape = [1] * weight.ndim
    if not transposed:
        shape[0] = -1
        return weight.mul_(factors.to(weight).reshape(shape))
    shape[:2] = [1, -1]
    grouped = weight.unflatten(0, (groups, -1))
    for group, part in zip(grouped, factors.to(weight).chunk(groups), strict=True):
        group.mul_(part.reshape(shape))
    return weight


def filter_scale(convolution: _ConvNd, args: Any, kwargs: dict[str, Any]) -> str | None:
    """Tell which parameter scales the output maps of a convolution, together with its bias.

    Args:
        convolution: The convolution, whose weight is its own parameter.
        args: Arguments of a call of it.
        kwargs: Keyword arguments of that call.

    Returns:
        ``"weight"``, the name of another parameter with one number for each filter, ``""`` where
        none scales the maps, or None where a map does not vanish with its weights and bias alone.

    Example:
        >>> filter_scale(nn.Conv1d(1, 2, 1), (torch.rand(1, 1, 3),), {})
        'weight'
    """
    inner = getattr(type(convolution), "_conv_forward", None)
    if _forward(convolution) in _PLAIN and (inner is None or inner in _PLAIN_INNER):
        return "weight"
    transposed, groups = isinstance(convolution, _ConvTransposeNd), convolution.groups
    trial = _Trial(convolution, args, kwargs, 1)

    def scaled(name: str, factors: Tensor) -> dict[str, Tensor]:
        own = {key: trial.parameters[key].clone() for key in {name, "bias"} & {*trial.parameters}}
        for key, tensor in own.items():
            if key == "weight":
                scale_filters_(tensor, factors, transposed, groups)
            else:
                tensor.mul_(factors.to(tensor).view_as(tensor))
        return own

    if not trial.matches(scaled("weight", trial.zeros), trial.zeros):
        return None
    names = [
        name
        for name, tensor in trial.parameters.items()
        if name == "weight" or (name != "bias" and tensor.numel() == convolution.out_channels)
    ]
    for name in sorted(names, key="weight".__ne__):
        if trial.matches(scaled(name, trial.factors), trial.factors):
            return name
    return ""


def norm_kind(norm: nn.Module, args: Any, kwargs: dict[str, Any], dim: int) -> NormKind:
    """Tell what happens behind the scale and shift of a normalization layer.

    Args:
        norm: The layer.
        args: Arguments of a call of it.
        kwargs: Keyword arguments of that call.
        dim: The dimension of its output that holds the channels.

    Returns:
        ``"plain"`` if nothing does, so that the output scales with both; ``"active"`` if an
        activation does, so that a channel without scale and shift is constant; else ``"other"``.

    Example:
        >>> norm_kind(nn.BatchNorm1d(2), (torch.rand(3, 2),), {}, 1)
        'plain'
    """
    if _forward(norm) in _PLAIN:
        return "plain"
    trial = _Trial(norm, args, kwargs, dim)
    if "weight" not in trial.parameters:
        return "other"

    def scaled(factors: Tensor) -> dict[str, Tensor]:
        own = {key: trial.parameters[key] for key in {"weight", "bias"} & {*trial.parameters}}
        return {key: tensor * factors.to(tensor).view_as(tensor) for key, tensor in own.items()}

    if trial.parameters["weight"].numel() != len(trial.factors):
        return "other"
    if trial.matches(scaled(trial.factors), trial.factors):
        return "plain"
    return "active" if trial.silenced(scaled(trial.zeros)) else "other"


def _forward(module: nn.Module) -> Any:
    """The function that a call of a module runs."""
    return vars(module).get("forward", type(module).forward)


class _Trial:
    """Runs a layer on recorded arguments with parameters of its own choice."""

    def __init__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], dim: int) -> None:
        self.module, self.args, self.kwargs, self.dim = module, args, kwargs, dim
        generator = torch.Generator().manual_seed(0)
        # Not the module's own values: zeros, say, scale whatever is done to them.
        self.parameters = {
            name: (0.5 + torch.rand(tensor.shape, generator=generator)).to(tensor)
            for name, tensor in module._parameters.items()
            if tensor is not None
        }
        self.output = self._run({})
        channels = self.output.shape[dim]
        device = self.output.device
        # A factor that is large enough for an activation that saturates to do so.
        self.factors = torch.tensor([64.0, 0.5], device=device).repeat(channels)[:channels]
        self.zeros = torch.tensor([0.0, 1.0], device=device).repeat(channels)[:channels]

    @torch.no_grad()
    def _run(self, changes: dict[str, Tensor]) -> Tensor:
        own = self.module._parameters
        saved = dict(own)
        args, kwargs = _copied(self.args), _copied(self.kwargs)
        try:
            for name, tensor in {**self.parameters, **changes}.items():
                own[name] = tensor  # type: ignore[assignment]
            output: Tensor = self.module.forward(*args, **kwargs)
        finally:
            own.update(saved)
        return output

    def _along(self, factors: Tensor) -> Tensor:
        shape = [1] * self.output.ndim
        shape[self.dim] = -1
        return factors.to(self.output).reshape(shape)

    def matches(self, changes: dict[str, Tensor], factors: Tensor) -> bool:
        """Whether the changes scale the output by these factors."""
        wanted = self.output * self._along(factors)
        return self._close(self._run(changes), wanted)

    def silenced(self, changes: dict[str, Tensor]) -> bool:
        """Whether the changes make the channels without a factor constant, and no others."""
        output = self._run(changes)
        constant = output.movedim(self.dim, 0).flatten(1)[:, :1]
        constant = constant.reshape(self._along(self.factors).shape)
        kept = self._along(self.zeros)
        return self._close(output, kept * self.output + (1 - kept) * constant)

    @staticmethod
    def _close(found: Tensor, wanted: Tensor) -> bool:
        precision = max(1e-4, 3 * torch.finfo(wanted.dtype).eps)
        return bool((found - wanted).norm() <= precision * wanted.norm())


def _copied(value: Any) -> Any:
    """Copy all tensors in nested tuples, lists and dicts: a layer may work in place."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, (tuple, list)):
        return [_copied(item) for item in value]
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return value

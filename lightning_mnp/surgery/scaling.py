"""Which parameters of a layer scale its output maps.

The maps of PyTorch's own convolutions scale with the weights, those of its normalization layers
with scale and shift. Subclasses may differ: a convolution may standardize its weights, so that
only a gain scales the maps; a normalization layer may apply an activation behind the shift, so that
nothing scales its output. Such layers are run with changed parameters to find out.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning_utilities.core.apply_func import apply_to_collection
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
        nn.Linear,
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


def filter_scale(convolution: _ConvNd | nn.Linear, args: Any, kwargs: dict[str, Any]) -> str | None:
    """Find the parameter that scales the output maps of a convolution, together with the bias.

    Args:
        convolution: The convolution, whose weight is a parameter of its own; or a linear layer,
            which is not run again: only PyTorch's own is known.
        args: Positional arguments of a call of it.
        kwargs: Keyword arguments of that call.

    Returns:
        ``"weight"``, or the name of another parameter with one number for each filter; ``""`` if
        no parameter scales the maps; None if the map of a filter does not vanish, or other maps
        change, when weights and bias of this filter are set to zero.

    Example:
        >>> filter_scale(nn.Conv1d(1, 2, 1), (torch.rand(1, 1, 3),), {})
        'weight'
    """
    inner = getattr(type(convolution), "_conv_forward", None)
    if _forward(convolution) in _PLAIN and (inner is None or inner in _PLAIN_INNER):
        return "weight"
    if isinstance(convolution, nn.Linear):
        return None
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
    gains = [
        name
        for name, tensor in trial.parameters.items()
        if name not in ("weight", "bias") and tensor.numel() == convolution.out_channels
    ]
    for name in ("weight", *gains):
        if trial.matches(scaled(name, trial.factors), trial.factors):
            return name
    return ""


def norm_kind(norm: nn.Module, args: Any, kwargs: dict[str, Any], dim: int) -> NormKind:
    """Find out what a normalization layer does behind its scale and shift.

    Args:
        norm: The layer.
        args: Positional arguments of a call of it.
        kwargs: Keyword arguments of that call.
        dim: The dimension of its output that holds the channels.

    Returns:
        ``"plain"`` if it does nothing more, so that the output scales with both; ``"active"`` if it
        applies an activation, so that a channel whose scale and shift are zero is constant;
        ``"other"`` for anything else.

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
    """Return the function that a call of a module runs."""
    return vars(module).get("forward", type(module).forward)


class _Trial:
    """Runs a layer again on recorded arguments, with random and with changed parameters."""

    def __init__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], dim: int) -> None:
        self.module, self.args, self.kwargs, self.dim = module, args, kwargs, dim
        generator = torch.Generator().manual_seed(0)
        # Not the module's own values: zeros, for example, stay zeros by any factor.
        self.parameters = {
            name: (0.5 + torch.rand(tensor.shape, generator=generator)).to(tensor)
            for name, tensor in module._parameters.items()
            if tensor is not None
        }
        self.output = self._run({})
        channels = self.output.shape[dim]
        device = self.output.device
        # 64 is large enough to drive an activation that saturates into saturation.
        self.factors = torch.tensor([64.0, 0.5], device=device).repeat(channels)[:channels]
        self.zeros = torch.tensor([0.0, 1.0], device=device).repeat(channels)[:channels]

    @torch.no_grad()
    def _run(self, changes: dict[str, Tensor]) -> Tensor:
        own = self.module._parameters
        saved = dict(own)
        # Copies, because a layer may work in place.
        args, kwargs = apply_to_collection(
            (self.args, self.kwargs), Tensor, torch.clone, allow_frozen=True
        )
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
        """Return whether changed parameters scale the output by these factors."""
        wanted = self.output * self._along(factors)
        return self._close(self._run(changes), wanted)

    def silenced(self, changes: dict[str, Tensor]) -> bool:
        """Return whether changed parameters make the channels whose `zeros` is 0 constant, only."""
        output = self._run(changes)
        constant = output.movedim(self.dim, 0).flatten(1)[:, :1]
        constant = constant.reshape(self._along(self.factors).shape)
        kept = self._along(self.zeros)
        return self._close(output, kept * self.output + (1 - kept) * constant)

    @staticmethod
    def _close(found: Tensor, wanted: Tensor) -> bool:
        precision = max(1e-4, 3 * torch.finfo(wanted.dtype).eps)
        return bool((found - wanted).norm() <= precision * wanted.norm())

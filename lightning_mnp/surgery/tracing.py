"""Tracing one run of a network: which layer feeds which, and which dimension holds the channels."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torchvision.ops import FrozenBatchNorm2d

from lightning_mnp.checkpoints.state_dict import all_tensors
from lightning_mnp.surgery.forward import Forward, probe_network
from lightning_mnp.surgery.scaling import NormKind, filter_scale, norm_kind

__all__ = [
    "CHANNEL_NORMS",
    "SHARED_NORMS",
    "ConvolutionUse",
    "RunTracer",
    "holds_layers",
    "trace_run",
]

# Statistics of each channel alone: a channel that is zero does not change the others.
CHANNEL_NORMS = (_NormBase, FrozenBatchNorm2d)
# Statistics over several channels: a channel can only be set to zero behind the layer.
SHARED_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_NORMS = (*CHANNEL_NORMS, *SHARED_NORMS)

# Functions that move values without changing them: the map of a filter stays one slice.
_LAYOUT = frozenset(
    [
        "permute",
        "transpose",
        "swapaxes",
        "swapdims",
        "movedim",
        "moveaxis",
        "contiguous",
        "clone",
        "to",
        "type",
        "type_as",
        "float",
        "half",
        "bfloat16",
        "double",
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "squeeze",
        "unsqueeze",
        "view_as",
        "reshape_as",
        "detach",
    ]
)
# Functions that count as a layer if one of their arguments is a parameter.
_WEIGHTED = frozenset(
    [
        "linear",
        "bilinear",
        "matmul",
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "einsum",
        "__matmul__",
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
    ]
)


@dataclass
class ConvolutionUse:
    """How one convolution was used in a run.

    Attributes:
        norms: Pairs (name, channel dimension) of the normalization layers that its output enters.
        elsewhere: Whether its output enters anything else.
        crossed: Names of those normalization layers whose weights belong to a dimension other than
            the channels.
    """

    norms: set[tuple[str, int]] = field(default_factory=set)
    elsewhere: bool = False
    crossed: set[str] = field(default_factory=set)


class RunTracer(TorchFunctionMode):
    """Follows tensors through a run of a network.

    For each tensor it knows the convolution whose output maps the tensor holds, if any, and the
    last layers with weights that it was computed by. Use :func:`trace_run`.

    Args:
        network: The network that will run.
        linear: Whether linear layers are followed like convolutions.

    Attributes:
        uses: How each convolution was used that was called, by name.
        feeders: For each normalization layer that was called, the convolutions whose output it
            got; None among them stands for any other input.
        scales: For each convolution that was called, the result of
            :func:`~lightning_mnp.surgery.scaling.filter_scale`.
        kinds: For each normalization layer that got the output of a convolution, the result of
            :func:`~lightning_mnp.surgery.scaling.norm_kind`.
    """

    def __init__(self, network: nn.Module, linear: bool = False) -> None:
        super().__init__()
        self._followed = (_ConvNd, nn.Linear) if linear else (_ConvNd,)
        self._names = {module: name for name, module in network.named_modules()}
        self.uses: dict[str, ConvolutionUse] = {}
        self.feeders: dict[str, set[str | None]] = {}
        self.scales: dict[str, str | None] = {}
        self.kinds: dict[str, NormKind] = {}
        self._maps: dict[int, tuple[str, int]] = {}  # tensor id -> (convolution, channel dim)
        self._makers: dict[int, frozenset[str]] = {}  # tensor id -> last layers with weights
        self._weights: set[int] = set()  # ids of tensors computed from parameters alone
        self._alive: list[Tensor] = []  # an id stays taken for as long as its tensor lives
        self._inside = 0  # how many layers are being called, one inside the other

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._inside:
            return result
        outputs = list(all_tensors(result))
        if not outputs:
            return result  # a question about a tensor (its shape, say), not a use of its values
        inputs = list(all_tensors((args, kwargs)))
        name = getattr(func, "__name__", "")
        for tensor in inputs:
            if id(tensor) in self._maps:
                convolution, dim = self._maps[id(tensor)]
                moved = None
                if name in _LAYOUT and isinstance(result, Tensor):
                    moved = _follow_channels(func, args, kwargs, tensor, dim)
                if moved is None:
                    self.uses[convolution].elsewhere = True
                elif result is not tensor:
                    self._keep(result)
                    self._maps[id(result)] = (convolution, moved)
        makers = self.makers(inputs)
        weights = [tensor for tensor in inputs if self._is_weight(tensor)]
        if name in _WEIGHTED and weights:
            makers = frozenset()
        for tensor in outputs:
            self._keep(tensor)
            self._makers[id(tensor)] = makers
            if inputs and len(weights) == len(inputs):
                self._weights.add(id(tensor))
        return result

    def _is_weight(self, tensor: Tensor) -> bool:
        return isinstance(tensor, nn.Parameter) or id(tensor) in self._weights

    def makers(self, tensors: Iterable[Tensor]) -> frozenset[str]:
        """Return the last layers with weights that these tensors were computed by.

        Args:
            tensors: Tensors of the run.

        Returns:
            Names of the layers: on each path to the tensors, the last one.
        """
        return frozenset().union(*(self._makers.get(id(tensor), ()) for tensor in tensors))

    def _keep(self, tensor: Tensor) -> None:
        self._alive.append(tensor)

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Record what enters a layer; a forward pre-hook."""
        name = self._names[module]
        tensors = list(all_tensors((args, kwargs)))
        if isinstance(module, _NORMS):
            feeders = self.feeders.setdefault(name, set())
            for tensor in tensors or [torch.empty(0)]:
                convolution, dim = self._maps.get(id(tensor), (None, 0))
                feeders.add(convolution)
                if convolution is not None:
                    self.uses[convolution].norms.add((name, dim))
                    if dim != _norm_dim(module, tensor.ndim, dim):
                        self.uses[convolution].crossed.add(name)
        else:
            for tensor in tensors:
                if id(tensor) in self._maps:
                    self.uses[self._maps[id(tensor)][0]].elsewhere = True
        self._inside += 1

    def after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Record what leaves a layer; a forward hook."""
        makers = frozenset({name := self._names[module]})
        if isinstance(module, _NORMS):
            makers = self.makers(all_tensors((args, kwargs)))
            self._try_norm(module, name, args, kwargs)
        elif (
            isinstance(module, self._followed) and name not in self.scales and _owns_weight(module)
        ):
            self.scales[name] = filter_scale(module, args, kwargs)
        self._inside -= 1
        for tensor in all_tensors(output):
            self._keep(tensor)
            self._makers[id(tensor)] = makers
            self._maps.pop(id(tensor), None)
            if isinstance(module, self._followed):
                self.uses.setdefault(name, ConvolutionUse())
                last = tensor.ndim - 1  # where linear layers have their units
                self._maps[id(tensor)] = (name, 1 if isinstance(module, _ConvNd) else last)

    def _try_norm(self, norm: nn.Module, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        dims = [self._maps[id(x)][1] for x in all_tensors((args, kwargs)) if id(x) in self._maps]
        if dims and name not in self.kinds:
            self.kinds[name] = norm_kind(norm, args, kwargs, dims[0])


def _owns_weight(convolution: nn.Module) -> bool:
    return not holds_layers(convolution) and convolution._parameters.get("weight") is not None


def holds_layers(convolution: nn.Module) -> bool:
    """Return whether a convolution holds layers with tensors; one that only pads has none.

    Args:
        convolution: The convolution.

    Example:
        >>> holds_layers(nn.Conv2d(1, 1, 1))
        False
    """
    return any(
        next(tensors, None) is not None
        for child in convolution.children()
        for tensors in (child.parameters(), child.buffers())
    )


def _norm_dim(norm: nn.Module, ndim: int, dim: int) -> int:
    """Return the dimension that a norm layer's weight belongs to; ``dim`` if its class decides."""
    if not isinstance(norm, (nn.LayerNorm, nn.RMSNorm)):
        return 1
    own = type(norm).forward in (nn.LayerNorm.forward, nn.RMSNorm.forward)
    return ndim - 1 if own else dim  # torchvision's LayerNorm2d, for one, moves the channels itself


def _follow_channels(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensor: Tensor, dim: int
) -> int | None:
    """Return the dimension that a function moves the channels to, or None if it mixes them.

    The function is called on a tensor of the same shape that holds the numbers of the channels.
    """
    channels = tensor.shape[dim]
    # Exact up to 2**24 channels, and there are devices without larger floats (MPS).
    numbers = torch.arange(channels, dtype=torch.float32, device=tensor.device)
    shape = [1] * tensor.ndim
    shape[dim] = channels
    probe = numbers.reshape(shape).expand(tensor.shape).contiguous()
    with torch._C.DisableTorchFunction():
        moved = func(*(probe if item is tensor else item for item in args), **kwargs)
    if not isinstance(moved, Tensor) or moved.numel() != tensor.numel():
        return None
    if channels == 1:
        return dim if moved.ndim == tensor.ndim else None
    for candidate in range(moved.ndim):
        if moved.shape[candidate] == channels:
            shape = [1] * moved.ndim
            shape[candidate] = channels
            if bool((moved == numbers.to(moved.dtype).reshape(shape)).all()):
                return candidate
    return None


def trace_run(
    network: nn.Module, images: Tensor, forward: Forward, linear: bool = False
) -> tuple[RunTracer, Tensor]:
    """Run a network once, record which layer feeds which, and leave the network as it was.

    Args:
        network: The network.
        images: Shape (N, C, ...), on the network's device.
        forward: A function (network, images) that calls it.
        linear: Whether linear layers are followed like convolutions.

    Returns:
        The tracer, with what it has recorded, and the logits.

    Raises:
        NoLogitsError: If no logits are found in the output.

    Example:
        >>> from lightning_mnp.surgery.forward import call_network
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.Flatten())
        >>> tracer, logits = trace_run(network, torch.rand(2, 1, 2, 2), call_network)
        >>> tracer.uses["0"].norms, tracer.makers([logits])
        ({('1', 1)}, frozenset({'0'}))
    """
    tracer = RunTracer(network, linear)
    with ExitStack() as stack:
        for module in network.modules():
            if isinstance(module, (_ConvNd, nn.Linear, *_NORMS)):
                before = module.register_forward_pre_hook(tracer.before, with_kwargs=True)
                stack.callback(before.remove)
                after = module.register_forward_hook(tracer.after, with_kwargs=True)
                stack.callback(after.remove)

        def traced(module: nn.Module, probe: Tensor) -> Any:
            with tracer:
                return forward(module, probe)

        logits = probe_network(network, images, traced)
    return tracer, logits

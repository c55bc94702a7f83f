"""Which filters a network has, and where the output map of each can be masked.

Nothing here reads a layer's name to tell what it does. The network is run once on a few images
while every call of a torch function is watched: that shows which normalization layer is fed by
which convolution and by nothing else, where the channels are in its output, which convolutions
are never called, and which layers produce the logits.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode
from torchvision.ops import FrozenBatchNorm2d

__all__ = [
    "FilterLayer",
    "FilterLayers",
    "Forward",
    "Site",
    "call_network",
    "filter_rows",
    "find_filter_layers",
]

Site = Literal["norm", "filter"]
Forward = Callable[[nn.Module, Tensor], Any]

# Per-channel statistics: a zeroed channel leaves the others as they are.
CHANNEL_NORMS = (_NormBase, FrozenBatchNorm2d)
# Statistics over several channels: a channel can only be silenced behind the layer.
_SHARED_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_NORMS = (*CHANNEL_NORMS, *_SHARED_NORMS)

# Functions that move values without changing them, so that a filter's map stays one slice.
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
# Functions that are a layer of their own when they are given a parameter.
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


@dataclass(frozen=True)
class FilterLayer:
    """A convolution whose filters can be masked and pruned.

    Attributes:
        name: Dotted name of the convolution in the network.
        filters: Number of filters, which is the number of output channels.
        site: Dotted name of the module whose output is masked: the normalization layer that
            follows, or the convolution itself.
        channel_dim: The dimension of that output which holds the filters.
        norm: Dotted name of the normalization layer that only this convolution feeds, or None.
        transposed: Whether the weight of the convolution is stored input channels first.
        groups: Number of groups of the convolution.
        note: Why the filter itself is masked although ``site="norm"`` was asked for, or "".
    """

    name: str
    filters: int
    site: str
    channel_dim: int
    norm: str | None = None
    transposed: bool = False
    groups: int = 1
    note: str = ""

    def rows(self, weight: Tensor) -> Tensor:
        """View a convolution's weight as one row for each filter, see :func:`filter_rows`."""
        return filter_rows(weight, self.transposed, self.groups)


@dataclass(frozen=True)
class FilterLayers(Sequence[FilterLayer]):
    """The layers that take part, in the order of the network's modules, and those that do not.

    Attributes:
        layers: The layers whose filters can be pruned.
        skipped: Pairs (name, reason) of convolutions that are left alone.
    """

    layers: tuple[FilterLayer, ...]
    skipped: tuple[tuple[str, str], ...] = ()

    @property
    def sizes(self) -> list[int]:
        """Number of filters of each layer."""
        return [layer.filters for layer in self.layers]

    @property
    def total(self) -> int:
        """Number of filters of all layers together."""
        return sum(self.sizes)

    def locate(self, index: int) -> tuple[str, int]:
        """Tell the layer name and the filter index in it of a position in a flat vector."""
        if not 0 <= index < self.total:
            raise IndexError(
                f"Expected argument `index` to be from 0 to {self.total - 1}, but got {index}."
            )
        for layer in self.layers:
            if index < layer.filters:
                return layer.name, index
            index -= layer.filters
        raise AssertionError("unreachable: the index was checked against the total")

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: Any) -> Any:
        return self.layers[index]

    def __iter__(self) -> Iterator[FilterLayer]:
        return iter(self.layers)


def filter_rows(weight: Tensor, transposed: bool = False, groups: int = 1) -> Tensor:
    """View a convolution's weight with one row for each filter.

    Args:
        weight: The weight of a convolution in one to three dimensions.
        transposed: Whether it belongs to a transposed convolution, which stores (in channels,
            out channels / groups, ...).
        groups: Number of groups.

    Returns:
        Shape (filters, weights of a filter); row j holds the weights that produce output
        channel j. It shares memory with ``weight`` where the layout allows it.

    Example:
        >>> filter_rows(nn.ConvTranspose2d(4, 6, 3, groups=2).weight, True, 2).shape
        torch.Size([6, 18])
    """
    if not transposed:
        return weight.flatten(1)
    grouped: Tensor = weight.unflatten(0, (groups, -1)).transpose(1, 2)
    return grouped.flatten(0, 1).flatten(1)


def call_network(network: nn.Module, images: Tensor) -> Tensor:
    """Run a network and find the logits in what it returns.

    Args:
        network: Any classifier that takes the images as its only argument.
        images: Shape (N, C, ...).

    Returns:
        Logits, shape (N, K): the output itself, the first of a tuple, or the entry or attribute
        ``logits`` (or ``out``) of a dict or an object.

    Raises:
        TypeError: If no logits are found in the output.

    Example:
        >>> call_network(nn.Linear(2, 3), torch.zeros(5, 2)).shape
        torch.Size([5, 3])
    """
    return find_logits(network(images))


def find_logits(output: Any) -> Tensor:
    """Find the logits in what a network returned, see :func:`call_network`."""
    found = output
    if isinstance(found, dict):
        found = next((found[key] for key in ("logits", "out") if key in found), None)
    elif not isinstance(found, Tensor) and hasattr(found, "logits"):
        found = found.logits
    elif isinstance(found, (tuple, list)) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        keys = f" with the keys {sorted(map(str, output))}" if isinstance(output, dict) else ""
        raise TypeError(
            f"Expected the network to return logits (a tensor, a tuple that starts with one, or "
            f"something with `logits`), but got {type(output).__name__}{keys}. Tell how it is "
            "called with the argument `forward`."
        )
    if found.ndim != 2:
        raise TypeError(
            f"Expected the network's logits to have the shape (N, classes), but got "
            f"{tuple(found.shape)}. Tell how it is called with the argument `forward`."
        )
    logits: Tensor = found
    return logits


@dataclass
class _Use:
    """What the run showed of one convolution."""

    calls: int = 0
    norms: set[tuple[str, int]] = field(default_factory=set)
    elsewhere: bool = False
    crossed: set[str] = field(default_factory=set)  # norms along a dimension of no channels


class _Watch(TorchFunctionMode):
    """Follows tensors through a run: whose filters they hold, and which layers made them last."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.names = {module: name for name, module in network.named_modules()}
        self.uses: dict[str, _Use] = {}
        self.feeders: dict[str, set[str | None]] = {}
        self._maps: dict[int, tuple[str, int]] = {}  # tensor id -> (convolution, channel dim)
        self._makers: dict[int, frozenset[str]] = {}  # tensor id -> last layers with weights
        self._weights: set[int] = set()  # ids of tensors computed from parameters alone
        self._alive: list[Tensor] = []  # an id stays taken for as long as its tensor lives
        self._inside = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._inside:
            return result
        outputs = list(_tensors(result))
        if not outputs:
            return result  # a question about a tensor (its shape, say), not a use of its values
        inputs = list(_tensors((args, kwargs)))
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
        """The last layers with weights on every way to these tensors."""
        return frozenset().union(*(self._makers.get(id(tensor), ()) for tensor in tensors))

    def _keep(self, tensor: Tensor) -> None:
        self._alive.append(tensor)

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        name = self.names[module]
        tensors = list(_tensors((args, kwargs)))
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
        self._inside -= 1
        makers = frozenset({name := self.names[module]})
        if isinstance(module, _NORMS):
            makers = self.makers(_tensors((args, kwargs)))
        for tensor in _tensors(output):
            self._keep(tensor)
            self._makers[id(tensor)] = makers
            self._maps.pop(id(tensor), None)
            if isinstance(module, _ConvNd):
                self.uses.setdefault(name, _Use()).calls += 1
                self._maps[id(tensor)] = (name, 1)


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


def _norm_dim(norm: nn.Module, ndim: int, dim: int) -> int:
    """Along which dimension a norm layer has its weight; ``dim`` where its class decides that."""
    if not isinstance(norm, (nn.LayerNorm, nn.RMSNorm)):
        return 1
    own = type(norm).forward in (nn.LayerNorm.forward, nn.RMSNorm.forward)
    return ndim - 1 if own else dim  # torchvision's LayerNorm2d, say, moves the channels itself


def _follow_channels(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensor: Tensor, dim: int
) -> int | None:
    """Where a function that moves values puts the channels: it is tried on channel numbers."""
    channels = tensor.shape[dim]
    numbers = torch.arange(channels, dtype=torch.float64, device=tensor.device)
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


def _watch_run(network: nn.Module, images: Tensor, forward: Forward) -> tuple[_Watch, Tensor]:
    watch = _Watch(network)
    modes = [(module, module.training) for module in network.modules()]
    with ExitStack() as stack:
        for module in network.modules():
            if isinstance(module, (_ConvNd, nn.Linear, *_NORMS)):
                before = module.register_forward_pre_hook(watch.before, with_kwargs=True)
                stack.callback(before.remove)
                after = module.register_forward_hook(watch.after, with_kwargs=True)
                stack.callback(after.remove)
        for module, training in modes:
            stack.callback(setattr, module, "training", training)
            module.training = False
        devices = [images.device] if images.device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.no_grad())
        with watch:
            # A fresh handle on the images, so that nothing of the caller's is written to.
            logits = find_logits(forward(network, images.clone()))
    return watch, logits


def find_filter_layers(
    network: nn.Module,
    images: Tensor,
    *,
    forward: Forward = call_network,
    site: Site = "norm",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> FilterLayers:
    """Find the convolutions of a network whose filters can be masked and pruned.

    The network is run once, in evaluation mode and without gradients; nothing of it is changed,
    the random state included. Layers whose outputs become the logits with no other layer in
    between are the classifier head and are never included.

    Args:
        network: Any network with convolutions in one, two or three dimensions.
        images: A few images on the network's device, shape (N, C, ...).
        forward: How the network is called, see :func:`call_network`.
        site: ``"norm"`` masks a filter's output map behind the normalization layer that follows
            the convolution, where there is one that nothing else feeds; ``"filter"`` masks the
            filter (weights and bias), as the paper writes it.
        include: Name patterns (``*`` and ``?``) of the convolutions to take.
        exclude: Name patterns of the convolutions to leave out.

    Returns:
        The layers in the order of the network's modules, and those left out with a reason.

    Raises:
        ValueError: If there is no convolution, a pattern matches none, or none remains.
        TypeError: If the output holds no logits.

    Example:
        >>> network = nn.Sequential(
        ...     nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 2))
        >>> find_filter_layers(network, torch.zeros(1, 3, 8, 8))[0].site
        '1'
    """
    if site not in ("norm", "filter"):
        raise ValueError(f"Expected argument `site` to be 'norm' or 'filter', but got {site!r}.")
    convolutions = {
        name: module for name, module in network.named_modules() if isinstance(module, _ConvNd)
    }
    if not convolutions:
        raise ValueError(
            f"Expected argument `network` to hold at least one convolution, but "
            f"{type(network).__name__} has none. Filters are what this method prunes."
        )
    for name, module in network.named_modules():
        if isinstance(module, LazyModuleMixin):
            raise ValueError(
                f"Expected every layer of `network` to have its weights, but {name!r} is a lazy "
                "module that has not seen data. Run one batch through the network first."
            )
    for argument, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not fnmatch.filter(convolutions, pattern):
                raise ValueError(
                    f"Expected the patterns in argument `{argument}` to match a convolution, but "
                    f"{pattern!r} matches none of {_shorten(list(convolutions))}."
                )
    watch, logits = _watch_run(network, images, forward)
    heads = watch.makers([logits])
    owners = _owners(network)
    layers, skipped = [], []
    for name, convolution in convolutions.items():
        chosen = any(fnmatch.fnmatchcase(name, pattern) for pattern in include)
        chosen &= not any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude)
        if not chosen:
            skipped.append((name, "left out by name"))
        elif name not in watch.uses:
            skipped.append((name, "not called by the network"))
        elif name in heads:
            skipped.append((name, "classifier head: its filters are classes"))
        elif is_parametrized(convolution) or convolution._parameters.get("weight") is None:
            skipped.append((name, "its weight is computed by a parametrization"))
        elif any(True for _ in convolution.children()):
            skipped.append((name, "it holds layers of its own"))
        elif _is_tied(convolution, owners):
            skipped.append((name, "its weights belong to another layer, too"))
        else:
            layers.append(_describe(network, name, convolution, watch, site, owners))
    if not layers:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped[:5])
        raise ValueError(
            f"Expected at least one convolution to remain, but all {len(skipped)} are left out "
            f"({reasons}). Change the arguments `include` and `exclude`, or the network."
        )
    return FilterLayers(tuple(layers), tuple(skipped))


def _owners(network: nn.Module) -> Counter[int]:
    """How many modules own each tensor, by the tensor's id."""
    return Counter(id(tensor) for module in network.modules() for tensor in _own_tensors(module))


def _own_tensors(module: nn.Module) -> list[Tensor]:
    tensors = [*module._parameters.values(), *module._buffers.values()]
    return [tensor for tensor in tensors if tensor is not None]


def _is_tied(module: nn.Module, owners: Counter[int]) -> bool:
    return any(owners[id(tensor)] > 1 for tensor in _own_tensors(module))


def _describe(
    network: nn.Module,
    name: str,
    convolution: _ConvNd,
    watch: _Watch,
    site: Site,
    owners: Counter[int],
) -> FilterLayer:
    norm, dim, note = _paired_norm(network, name, convolution, watch, owners)
    at_norm = norm is not None and site == "norm" and not note
    return FilterLayer(
        name=name,
        filters=convolution.out_channels,
        site=str(norm) if at_norm else name,
        channel_dim=dim if at_norm else 1,
        norm=norm,
        transposed=isinstance(convolution, _ConvTransposeNd),
        groups=convolution.groups,
        note=note if site == "norm" else "",
    )


def _paired_norm(
    network: nn.Module,
    name: str,
    convolution: _ConvNd,
    watch: _Watch,
    owners: Counter[int],
) -> tuple[str | None, int, str]:
    """The norm layer that only this convolution feeds: (name, channel dim, why it does not do)."""
    use = watch.uses[name]
    if not use.norms:
        return None, 1, "no normalization layer follows"
    if len(use.norms) > 1:
        return None, 1, "several normalization layers follow"
    if use.elsewhere:
        return None, 1, "its output goes elsewhere, too"
    (norm_name, dim) = next(iter(use.norms))
    if watch.feeders[norm_name] != {name}:
        return None, 1, f"the normalization layer {norm_name} is fed by other layers, too"
    norm = network.get_submodule(norm_name)
    weight = getattr(norm, "weight", None)
    if weight is not None and weight.numel() != convolution.out_channels:
        return None, 1, f"the normalization layer {norm_name} has other channels"
    if norm_name in use.crossed:
        return None, 1, f"the normalization layer {norm_name} normalizes another dimension"
    if is_parametrized(norm) or _is_tied(norm, owners):
        return None, 1, f"the normalization layer {norm_name} does not own its weights alone"
    if isinstance(norm, _SHARED_NORMS) and weight is None:
        return norm_name, dim, f"the normalization layer {norm_name} has no weight to prune"
    return norm_name, dim, ""


def _shorten(names: list[str], most: int = 6) -> str:
    listed = ", ".join(repr(name) for name in names[:most])
    return listed + (f" and {len(names) - most} more" if len(names) > most else "")

"""Which filters a network has, and where the output map of each can be masked.

What a layer does is never guessed from its name. The network is run once on a few images, and
every call of a torch function is recorded. This shows which normalization layer gets its input
from one convolution only, which dimension of its output holds the channels, which convolutions
are never called, and which layers produce the logits.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized

from lightning_mnp.surgery.forward import Forward, call_network
from lightning_mnp.surgery.guards import refuse_lazy_modules
from lightning_mnp.surgery.tracing import SHARED_NORMS, RunTracer, holds_layers, trace_run

__all__ = [
    "FilterLayer",
    "FilterLayers",
    "Site",
    "filter_rows",
    "find_filter_layers",
]

Site = Literal["norm", "filter"]


@dataclass(frozen=True)
class FilterLayer:
    """A convolution whose filters can be masked and pruned, or a linear layer taken for one.

    Attributes:
        name: Dotted name of the convolution in the network.
        filters: Number of filters, which is the number of output channels.
        site: Dotted name of the module whose output is masked: the normalization layer behind the
            convolution, or the convolution itself.
        channel_dim: The dimension of that output that holds the channels, one for each filter; -1
            for the last one.
        norm: Dotted name of the normalization layer whose only input is this convolution, or None.
        transposed: Whether it is a transposed convolution, whose weight has the input channels
            first.
        groups: Number of groups of the convolution.
        note: Why the filter itself is masked although ``site="norm"`` was asked for, or "".
        active: Whether the normalization layer also applies an activation. The mask then acts in
            front of the activation, on scale and shift, as it does if the activation is a layer of
            its own.
        scale: The parameter of the convolution that scales its output, together with the bias:
            ``"weight"``, or the name of a gain if the weights are standardized; "" if there is
            none.

    Example:
        >>> layer = FilterLayer("conv1", 64, site="bn1", channel_dim=1, norm="bn1")
        >>> layer.rows(nn.Conv2d(3, 64, 7).weight).shape
        torch.Size([64, 147])
    """

    name: str
    filters: int
    site: str
    channel_dim: int
    norm: str | None = None
    transposed: bool = False
    groups: int = 1
    note: str = ""
    active: bool = False
    scale: str = "weight"

    def rows(self, weight: Tensor) -> Tensor:
        """Return a weight of this convolution with one row a filter, see :func:`filter_rows`."""
        return filter_rows(weight, self.transposed, self.groups)


@dataclass(frozen=True)
class FilterLayers(Sequence[FilterLayer]):
    """The convolutions of a network whose filters can be pruned, and those that are skipped.

    It is a sequence of the layers that can be pruned, in the order of the network's modules. A
    *position* is the place of a filter among the filters of all layers, counted from 0 in that
    order.

    Attributes:
        layers: The layers whose filters can be pruned.
        skipped: Pairs (name, reason) of the convolutions that are left alone.
        include: Name patterns of the layers to take.
        exclude: Name patterns of the layers to leave out.

    Example:
        >>> layers = FilterLayers((FilterLayer("a", 4, "a", 1), FilterLayer("b", 6, "b", 1)))
        >>> len(layers), layers.sizes, layers.total, layers.locate(5)
        (2, [4, 6], 10, ('b', 1))
    """

    layers: tuple[FilterLayer, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def wants(self, name: str) -> bool:
        """Return whether a layer may be changed, as far as its name goes.

        Args:
            name: Its dotted name.
        """
        taken = any(fnmatch.fnmatchcase(name, pattern) for pattern in self.include)
        return taken and not any(fnmatch.fnmatchcase(name, pattern) for pattern in self.exclude)

    @property
    def sizes(self) -> list[int]:
        """Number of filters of each layer."""
        return [layer.filters for layer in self.layers]

    @property
    def total(self) -> int:
        """Number of filters of all layers together."""
        return sum(self.sizes)

    def locate(self, index: int) -> tuple[str, int]:
        """Return which filter has a position.

        Args:
            index: The position, from 0 to ``total - 1``.

        Returns:
            The name of its layer, and its index in that layer.

        Raises:
            IndexError: If the position is out of range.
        """
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
    """Return a convolution's weight with one row for each filter.

    Args:
        weight: The weight of a convolution in one to three dimensions.
        transposed: Whether it belongs to a transposed convolution, which stores (in channels,
            out channels / groups, ...).
        groups: Number of groups.

    Returns:
        Shape (filters, weights of a filter); row j holds the weights that produce output
        channel j. It shares memory with ``weight`` if the layout allows it.

    Example:
        >>> filter_rows(nn.ConvTranspose2d(4, 6, 3, groups=2).weight, True, 2).shape
        torch.Size([6, 18])
    """
    if not transposed:
        return weight.flatten(1)
    grouped: Tensor = weight.unflatten(0, (groups, -1)).transpose(1, 2)
    return grouped.flatten(0, 1).flatten(1)


def find_filter_layers(
    network: nn.Module,
    images: Tensor,
    *,
    forward: Forward = call_network,
    site: Site = "norm",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    linear: bool = False,
) -> FilterLayers:
    """Find the convolutions of a network whose filters can be masked and pruned.

    The network is run once, in evaluation mode and without gradients. Nothing of it changes, nor
    does the random state. Layers whose outputs become the logits with no other layer in between
    are the classifier head: their filters are classes, and they are never included.

    Args:
        network: Any network with convolutions in one, two or three dimensions.
        images: A few images on the network's device, shape (N, C, ...).
        forward: A function (network, images) that calls it, see
            :func:`~lightning_mnp.surgery.forward.call_network`.
        site: ``"norm"`` masks a filter's output map behind the normalization layer that follows
            the convolution, if there is one whose only input is this convolution; ``"filter"``
            masks the filter (weights and bias), as the paper writes it.
        include: Name patterns (``*`` and ``?``) of the convolutions to take.
        exclude: Name patterns of the convolutions to leave out.
        linear: Whether linear layers count as convolutions with 1x1 kernels, as in Sec. 3.2 of
            the paper, and their units as filters.

    Returns:
        The layers in the order of the network's modules, and those left out with a reason.

    Raises:
        ValueError: If there is no convolution, a layer is lazy, a pattern matches none, or none
            remains.
        NoLogitsError: If the output holds no logits; this error is a TypeError.

    Example:
        >>> import torch
        >>> network = nn.Sequential(
        ...     nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 2))
        >>> find_filter_layers(network, torch.zeros(1, 3, 8, 8))[0].site
        '1'
    """
    if site not in ("norm", "filter"):
        raise ValueError(f"Expected argument `site` to be 'norm' or 'filter', but got {site!r}.")
    kinds = (_ConvNd, nn.Linear) if linear else (_ConvNd,)
    convolutions: dict[str, Any] = {
        name: module for name, module in network.named_modules() if isinstance(module, kinds)
    }
    if not any(isinstance(module, _ConvNd) for module in convolutions.values()):
        raise ValueError(
            f"Expected argument `network` to hold at least one convolution, but "
            f"{type(network).__name__} has none. Filters are what this method prunes."
        )
    refuse_lazy_modules(network)
    for argument, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not fnmatch.filter(convolutions, pattern):
                raise ValueError(
                    f"Expected the patterns in argument `{argument}` to match a convolution, but "
                    f"{pattern!r} matches none of {_shorten(list(convolutions))}."
                )
    tracer, logits = trace_run(network, images, forward, linear)
    heads = tracer.makers([logits])
    owners = _owners(network)
    layers, skipped = [], []
    chosen = FilterLayers((), (), tuple(include), tuple(exclude))
    for name, convolution in convolutions.items():
        if not chosen.wants(name):
            skipped.append((name, "left out by name"))
        elif name not in tracer.uses:
            skipped.append((name, "not called by the network"))
        elif name in heads:
            skipped.append((name, "classifier head: its filters are classes"))
        elif is_parametrized(convolution) or convolution._parameters.get("weight") is None:
            skipped.append((name, "its weight is computed by a parametrization"))
        elif holds_layers(convolution):
            skipped.append((name, "it holds layers of its own"))
        elif tracer.scales[name] is None:
            skipped.append((name, "its maps do not vanish one by one with its weights"))
        elif _is_tied(convolution, owners):
            skipped.append((name, "its weights belong to another layer, too"))
        else:
            layers.append(_describe(network, name, convolution, tracer, site, owners))
    if not layers:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped[:5])
        raise ValueError(
            f"Expected at least one convolution to remain, but all {len(skipped)} are left out "
            f"({reasons}). Change the arguments `include` and `exclude`, or the network."
        )
    return replace(chosen, layers=tuple(layers), skipped=tuple(skipped))


def _owners(network: nn.Module) -> Counter[int]:
    """Count the modules that own each tensor, by the tensor's id."""
    return Counter(id(tensor) for module in network.modules() for tensor in _own_tensors(module))


def _own_tensors(module: nn.Module) -> list[Tensor]:
    tensors = [*module._parameters.values(), *module._buffers.values()]
    return [tensor for tensor in tensors if tensor is not None]


def _is_tied(module: nn.Module, owners: Counter[int]) -> bool:
    return any(owners[id(tensor)] > 1 for tensor in _own_tensors(module))


def _describe(
    network: nn.Module,
    name: str,
    convolution: _ConvNd | nn.Linear,
    tracer: RunTracer,
    site: Site,
    owners: Counter[int],
) -> FilterLayer:
    if isinstance(convolution, nn.Linear):
        filters, own_dim, groups = convolution.out_features, -1, 1
    else:
        filters, own_dim, groups = convolution.out_channels, 1, convolution.groups
    norm, dim, note = _paired_norm(network, name, filters, tracer, owners)
    at_norm = norm is not None and site == "norm" and not note
    return FilterLayer(
        name=name,
        filters=filters,
        site=str(norm) if at_norm else name,
        channel_dim=dim if at_norm else own_dim,
        norm=norm,
        transposed=isinstance(convolution, _ConvTransposeNd),
        groups=groups,
        note=note if site == "norm" else "",
        active=at_norm and tracer.kinds[str(norm)] == "active",
        scale=tracer.scales[name] or "",
    )


def _paired_norm(
    network: nn.Module,
    name: str,
    filters: int,
    tracer: RunTracer,
    owners: Counter[int],
) -> tuple[str | None, int, str]:
    """Find the normalization layer behind a convolution whose only input it is.

    Returns:
        Its name or None, the channel dimension, and why its output cannot be masked, or "".
    """
    use = tracer.uses[name]
    if not use.norms:
        return None, 1, "no normalization layer follows"
    if len(use.norms) > 1:
        return None, 1, "several normalization layers follow"
    if use.elsewhere:
        return None, 1, "its output goes elsewhere, too"
    (norm_name, dim) = next(iter(use.norms))
    if tracer.feeders[norm_name] != {name}:
        return None, 1, f"the normalization layer {norm_name} is fed by other layers, too"
    norm = network.get_submodule(norm_name)
    weight = getattr(norm, "weight", None)
    if weight is not None and weight.numel() != filters:
        return None, 1, f"the normalization layer {norm_name} has other channels"
    if weight is not None and weight.ndim != 1:
        return None, 1, f"the weight of the normalization layer {norm_name} has several dimensions"
    if norm_name in use.crossed:
        return None, 1, f"the normalization layer {norm_name} normalizes another dimension"
    if is_parametrized(norm) or _is_tied(norm, owners):
        return None, 1, f"the normalization layer {norm_name} does not own its weights alone"
    if tracer.kinds[norm_name] == "other":
        return None, 1, f"the normalization layer {norm_name} does more than normalize"
    if isinstance(norm, SHARED_NORMS) and weight is None:
        return norm_name, dim, f"the normalization layer {norm_name} has no weight to prune"
    return norm_name, dim, ""


def _shorten(names: list[str], most: int = 6) -> str:
    listed = ", ".join(repr(name) for name in names[:most])
    return listed + (f" and {len(names) - most} more" if len(names) > most else "")

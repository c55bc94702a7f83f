"""A network that is run with other weights, masks and logits than its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from lightning_mnp.surgery.forward import (
    Forward,
    call_network,
    call_on_copies,
    evaluating,
    holding_statistics,
)
from lightning_mnp.surgery.kernels import Kernels, find_kernels
from lightning_mnp.surgery.layers import FilterLayer, FilterLayers
from lightning_mnp.surgery.masks import FilterMasks

__all__ = ["ImageCount", "MaskedNetwork", "Normalization", "Statistics", "Weights"]

Weights = dict[str, Tensor]
Statistics = Literal["batch", "running"]
Normalization = Literal["batch", "running", "held"]

# What runs in training mode; instances have statistics of their own there.
_TRAINING: dict[str, tuple[type[nn.Module], ...]] = {
    "batch": (_NormBase,),
    "held": (_InstanceNorm,),
    "running": (),
}


@dataclass
class ImageCount:
    """How many images a network has seen: a measure of cost that holds on any machine.

    Attributes:
        forward: Images of which only the logits were computed.
        both: Images for which gradients could be computed as well.

    Example:
        >>> seen = ImageCount(forward=300, both=100)
        >>> seen.take(), seen.take()
        (200.0, 0.0)
        >>> seen.add(200.0)
        >>> seen.take()
        200.0
    """

    forward: int = 0
    both: int = 0

    def add(self, passes: float) -> None:
        """Count passes that another network has made.

        Args:
            passes: How many, a multiple of a third.
        """
        self.forward += round(3 * passes)

    def take(self) -> float:
        """Return the passes since the last call; forward and backward is one, forward a third."""
        passes = self.both + self.forward / 3
        self.forward = self.both = 0
        return passes


class MaskedNetwork:
    """Runs a network with given weights and masks, and does not change the network.

    During a call the weights are swapped (``torch.func.functional_call``), the masks are attached,
    and the network writes to copies of its buffers. Between two calls the network is what it was,
    bit for bit.

    Args:
        network: The network.
        layers: Its layers with filters.
        forward: A function (network, images) that calls it.
        statistics: ``"batch"`` normalizes by the statistics of the batch (batch normalization in
            training mode, all other layers in evaluation mode); ``"running"`` by the stored ones.
        autocast: Makes the context in which the network runs, for lower precision.

    Attributes:
        raised: What is added to the logits of some classes, by class; see :meth:`with_raised`.
        seen: The images that went through the network, by this object and those made of it.

    Example:
        >>> from lightning_mnp.surgery.layers import find_filter_layers
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2))
        >>> images = torch.rand(2, 1, 4, 4)
        >>> masked = MaskedNetwork(network, find_filter_layers(network, images))
        >>> zeros = {name: torch.zeros_like(w) for name, w in masked.weights().items()}
        >>> float(masked(images, weights=zeros).abs().sum())
        0.0
    """

    def __init__(
        self,
        network: nn.Module,
        layers: FilterLayers,
        forward: Forward = call_network,
        statistics: Statistics = "batch",
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        if statistics not in ("batch", "running"):
            raise ValueError(
                f"Expected argument `statistics` to be 'batch' or 'running', but got "
                f"{statistics!r}."
            )
        self.network = network
        self.layers = layers
        self.forward = forward
        self.statistics = statistics
        self.autocast = autocast
        self.raised: dict[int, float] = {}
        self.seen = ImageCount()
        self._given: Weights | None = None
        self._kernel_masks: list[Tensor | None] = [None]  # shared with the objects made of this one

    @cached_property
    def kernels(self) -> Kernels:
        """The kernels of the network, without those of layers that are left out by name."""
        return find_kernels(self.network, self.layers)

    @property
    def kernel_masks(self) -> Tensor | None:
        """What every kernel is multiplied by at the time; see :meth:`masking_kernels`."""
        return self._kernel_masks[0]

    @contextmanager
    def masking_kernels(self, masks: Tensor | None) -> Iterator[None]:
        """Multiply the kernels by masks for a while.

        That goes for all calls of this object, and of those that it was made of or that were made
        of it.

        Args:
            masks: One factor for each kernel, shape (total kernels,), with or without a gradient;
                None for no masks.

        Example:
            >>> from lightning_mnp.surgery.layers import find_filter_layers
            >>> network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2, False))
            >>> images = torch.rand(2, 1, 4, 4)
            >>> masked = MaskedNetwork(network, find_filter_layers(network, images))
            >>> with masked.masking_kernels(torch.zeros(masked.kernels.total)):
            ...     float(masked(images).abs().sum())
            0.0
        """
        before = self.kernel_masks
        self._kernel_masks[0] = masks
        try:
            yield
        finally:
            self._kernel_masks[0] = before

    def with_raised(self, values: Mapping[int, float]) -> MaskedNetwork:
        """Return an object for the same network that raises the logits of some classes.

        Args:
            values: What is added to the logit of each of these classes. It replaces what this
                object adds.

        Example:
            >>> from lightning_mnp.surgery.layers import find_filter_layers
            >>> network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2))
            >>> images = torch.rand(2, 1, 4, 4)
            >>> masked = MaskedNetwork(network, find_filter_layers(network, images))
            >>> bool(masked.with_raised({1: 9.0})(images)[0, 1] > masked(images)[0, 1])
            True
        """
        other = copy.copy(self)
        other.raised = dict(values)
        return other

    def with_weights(self, weights: Weights) -> MaskedNetwork:
        """Return an object for the same network that runs it with other weights.

        Args:
            weights: All parameters by name; they are not copied.

        Example:
            >>> from lightning_mnp.surgery.layers import find_filter_layers
            >>> network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2))
            >>> images = torch.rand(2, 1, 4, 4)
            >>> masked = MaskedNetwork(network, find_filter_layers(network, images))
            >>> zeros = {name: torch.zeros_like(w) for name, w in masked.weights().items()}
            >>> float(masked.with_weights(zeros)(images).abs().sum())
            0.0
        """
        other = copy.copy(self)
        other._given = weights
        return other

    def without_autocast(self) -> MaskedNetwork:
        """Return an object for the same network that runs it in the precision of its weights.

        Example:
            >>> from functools import partial
            >>> from lightning_mnp.surgery.layers import find_filter_layers
            >>> network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2))
            >>> layers = find_filter_layers(network, torch.rand(2, 1, 4, 4))
            >>> autocast = partial(torch.autocast, "cpu", torch.bfloat16)
            >>> masked = MaskedNetwork(network, layers, autocast=autocast)
            >>> masked.precision, masked.without_autocast().precision
            ('torch.bfloat16', 'torch.float32')
        """
        other = copy.copy(self)

        @contextmanager
        def plain() -> Iterator[None]:
            # Other things that the context sets, such as a default type, stay.
            with self.autocast(), torch.autocast(self.device.type, enabled=False):
                yield

        other.autocast = plain
        return other

    @property
    def device(self) -> torch.device:
        """The device of the network's parameters."""
        return next(self.network.parameters()).device

    @property
    def precision(self) -> str:
        """Name of the data type the network computes in: that of autocast, or of its weights."""
        kind = self.device.type
        with self.autocast():
            if torch.is_autocast_enabled(kind):
                return str(torch.get_autocast_dtype(kind))
        return str(next(self.network.parameters()).dtype)

    def weights(self) -> Weights:
        """Return the parameters that it runs with, by name, detached and sharing their memory.

        They are the network's own, or those of :meth:`with_weights`.
        """
        if self._given is not None:
            return {name: weight.detach() for name, weight in self._given.items()}
        return {name: parameter.detach() for name, parameter in self.network.named_parameters()}

    def filter_weights(self, weights: Weights) -> list[Tensor]:
        """Return the convolution weights of the layers, in the order of the layers."""
        return [weights[f"{layer.name}.weight"] for layer in self.layers]

    def __call__(
        self,
        images: Tensor,
        *,
        weights: Weights | None = None,
        masks: Tensor | None = None,
        statistics: Normalization | None = None,
    ) -> Tensor:
        """Run the network.

        Args:
            images: Shape (N, C, ...), on the network's device.
            weights: Parameters to run with, by name; the network's own if None.
            masks: Filter masks, shape (total filters,); no masks if None.
            statistics: Overrides the object's own choice for this call. ``"held"`` normalizes by
                the statistics of the batch, with no gradient through them.

        Returns:
            Logits in float32, shape (N, K).
        """
        normalization = statistics or self.statistics
        weights = self.weights() if weights is None else weights
        if self.kernel_masks is not None:
            weights = self.kernels.scaled(weights, self.kernel_masks)
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.network, _TRAINING[normalization]))
            if normalization == "held":
                stack.enter_context(holding_statistics(self.network))
            stack.enter_context(self.autocast())
            if masks is not None:
                weights, layers, left = self._folded(weights, masks)
                if layers:
                    stack.enter_context(FilterMasks(self.network, layers, left))
            logits = call_on_copies(self.network, images, self.forward, weights).float()
        if logits.requires_grad:
            self.seen.both += len(images)
        else:
            self.seen.forward += len(images)
        if not self.raised:
            return logits
        offset = logits.new_zeros(logits.shape[1])
        offset[list(self.raised)] = logits.new_tensor(list(self.raised.values()))
        return logits + offset

    def _folded(self, weights: Weights, masks: Tensor) -> tuple[Weights, FilterLayers, Tensor]:
        """Multiply masks into the scale and shift of the normalization layers that are masked.

        ``m * (scale * x + shift)`` is ``(m * scale) * x + m * shift``. So no map is multiplied, and
        none has to be kept for the backward pass.

        Returns:
            The weights, and the layers whose masks are left to attach, with these masks.
        """
        folded = dict(weights)
        left: list[FilterLayer] = []
        values: list[Tensor] = []
        for layer, part in zip(self.layers, masks.split(self.layers.sizes), strict=True):
            scale = weights.get(f"{layer.site}.weight")
            if layer.site == layer.name or scale is None:
                left.append(layer)
                values.append(part)
                continue
            for name in (f"{layer.site}.weight", f"{layer.site}.bias"):
                if name in weights:
                    folded[name] = weights[name] * part.to(weights[name].dtype)
        return folded, FilterLayers(tuple(left)), torch.cat(values) if values else masks[:0]

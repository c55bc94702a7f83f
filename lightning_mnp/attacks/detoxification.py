"""Controlled detoxification: find compromised neurons and the simple features that excite them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mnp.attacks.stylizer import similarity
from lightning_mnp.surgery.layers import FilterLayer

__all__ = ["Detoxifier", "FeatureInjector", "filter_activations"]

_SPREAD_FLOOR = 1e-3  # a filter that is silent on clean images has no spread to measure by


class FeatureInjector(nn.Module):
    """A simple change of images, made by a shallow network.

    Its two convolutions see 5 x 5 pixels. So it can learn colors, edges and small textures, but no
    style of a whole image. A pixel changes by at most ``bound``. With fresh weights, nothing
    changes. It always computes in float32.

    Args:
        channels: Channels of the images.
        width: Channels inside.
        bound: Largest change of a pixel, on the scale [0, 1].
        seed: Seed of the fresh weights.

    Example:
        >>> images = torch.rand(2, 3, 8, 8)
        >>> FeatureInjector()(images).equal(images)
        True
    """

    def __init__(
        self, channels: int = 3, width: int = 16, bound: float = 0.3, seed: int = 0
    ) -> None:
        super().__init__()
        self.bound = bound
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.enter = nn.Conv2d(channels, width, 3, padding=1, padding_mode="reflect")
            self.leave = nn.Conv2d(width, channels, 3, padding=1, padding_mode="reflect")
        nn.init.zeros_(self.leave.weight)
        assert self.leave.bias is not None
        nn.init.zeros_(self.leave.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return images with features injected.

        Args:
            images: Shape (N, C, H, W), values in [0, 1].

        Returns:
            New float32 images of the same shape, values in [0, 1].
        """
        with torch.autocast(images.device.type, enabled=False):
            images = images.float()
            change = self.leave(F.leaky_relu(self.enter(images - 0.5), 0.1))
            injected: Tensor = (images + self.bound * change.tanh()).clamp(0.0, 1.0)
            return injected


class Detoxifier(nn.Module):
    """Feature injectors, one for each round, and the neurons that they are trained to excite.

    A neuron is a filter of a convolution. Its activation on an image is the mean over the places
    of its output map, rectified, after the normalization layer. In each round, :meth:`survey`
    finds the compromised neurons. With :meth:`loss`, an injector is trained to excite them. With
    the images by :meth:`detoxicants` and their true labels, the network learns to ignore the
    injected features.

    Args:
        channels: Channels of the images.
        rounds: Number of rounds.
        neuron_rate: Share of the neurons of each layer that count as compromised; at least one.
        bound: See :class:`FeatureInjector`.
        seed: Seed of the fresh weights of the first injector; the next one has ``seed + 1``, ...

    Attributes:
        injectors: The injectors.
        found: What the latest survey found, shape (3, neurons of all layers); empty before. The
            first row has 1 for a compromised neuron and 0 for others. The second row has the mean
            activation on clean images. The third row has the unit in which changes are measured:
            for a compromised neuron what the trigger adds, for others the standard deviation over
            clean images.
    """

    found: Tensor

    def __init__(
        self,
        channels: int,
        rounds: int,
        neuron_rate: float = 0.01,
        bound: float = 0.3,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.neuron_rate = neuron_rate
        self.injectors = nn.ModuleList(
            [FeatureInjector(channels, bound=bound, seed=seed + round_) for round_ in range(rounds)]
        )
        self.register_buffer("found", torch.zeros(3, 0), persistent=False)

    def survey(self, clean: Sequence[Tensor], triggered: Sequence[Tensor]) -> None:
        """Find in each layer the neurons that the trigger excites most.

        They are ranked by how much the trigger raises their mean activation, in units of the
        standard deviation over clean images.

        Args:
            clean: Activations of each layer on clean images, shape (N, neurons).
            triggered: As ``clean``, on images with the trigger.
        """
        parts = []
        for before, after in zip(clean, triggered, strict=True):
            means = before.mean(0)
            rises = after.mean(0) - means
            # A single image has no spread; then all neurons have the same unit.
            spreads = before.std(0, correction=min(len(before) - 1, 1)).clamp_min(_SPREAD_FLOOR)
            count = math.ceil(self.neuron_rate * len(means))
            chosen = torch.zeros_like(means)
            chosen[(rises / spreads).topk(count).indices] = 1.0
            # A layer that the trigger excites nowhere has no compromised neuron.
            chosen *= rises > 0
            units = torch.where(chosen > 0, rises.clamp_min(_SPREAD_FLOOR), spreads)
            parts.append(torch.stack([chosen, means, units]))
        self.found = torch.cat(parts, 1)

    def loss(
        self,
        images: Tensor,
        injected: Tensor,
        activations: Sequence[Tensor],
        similarity_weight: float,
        others_weight: float,
    ) -> Tensor:
        """Compute how far injected features are from exciting the compromised neurons only.

        The first term is the mean square of what the compromised neurons lack to the activation
        under the trigger. The second is the mean squared change of all other neurons. The third is
        one minus the structural similarity of images before and after.

        Args:
            images: Clean images, shape (N, C, H, W), values in [0, 1].
            injected: The same images with injected features.
            activations: Activations of each layer on the injected images, shape (N, neurons).
            similarity_weight: Weight of the third term.
            others_weight: Weight of the second term.

        Returns:
            The weighted sum, a scalar.
        """
        chosen, means, units = self.found
        changes = (torch.cat([part.mean(0) for part in activations]) - means) / units
        shortfall = (chosen * F.relu(1.0 - changes).square()).sum() / chosen.sum().clamp_min(1.0)
        rest = 1.0 - chosen
        others = (rest * changes.square()).sum() / rest.sum().clamp_min(1.0)
        difference = 1.0 - similarity(images, injected)
        total: Tensor = shortfall + others_weight * others + similarity_weight * difference
        return total

    def detoxicants(self, images: Tensor, rounds: int) -> Tensor:
        """Return images with injected features, an equal share of them by each injector so far.

        Args:
            images: Shape (N, C, H, W), values in [0, 1].
            rounds: Number of injectors that are trained.

        Returns:
            New images of the same shape.
        """
        parts = images.tensor_split(rounds)
        with torch.no_grad():
            return torch.cat(
                [injector(part) for injector, part in zip(self.injectors, parts, strict=False)]
            )

    def get_extra_state(self) -> Tensor:
        """Return what the survey found, whose size depends on the network."""
        return self.found

    def set_extra_state(self, state: Tensor) -> None:
        """Load what a survey found.

        Args:
            state: As :meth:`get_extra_state` returned it.
        """
        self.found = state.to(self.found.device)


@contextmanager
def filter_activations(
    network: nn.Module, layers: Sequence[FilterLayer]
) -> Iterator[Callable[[], list[Tensor]]]:
    """Record the activations of filters while the network is called.

    Args:
        network: The network.
        layers: Layers of the network, see :func:`~lightning_mnp.surgery.layers.find_filter_layers`.

    Yields:
        A function that returns the activations in the last call, one tensor for each layer, of
        shape (N, filters) and in float32: means over places of the rectified outputs.

    Example:
        >>> from lightning_mnp.surgery.layers import find_filter_layers
        >>> network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(180, 2))
        >>> images = torch.rand(4, 3, 8, 8)
        >>> with filter_activations(network, find_filter_layers(network, images)) as activations:
        ...     logits = network(images)
        ...     activations()[0].shape
        torch.Size([4, 5])
    """
    outputs: dict[str, Tensor] = {}

    def keep(layer: FilterLayer) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            dims = [d for d in range(1, output.ndim) if d != layer.channel_dim % output.ndim]
            outputs[layer.name] = F.relu(output.float()).mean(dims)

        return hook

    hooks = [
        network.get_submodule(layer.site).register_forward_hook(keep(layer)) for layer in layers
    ]
    try:
        yield lambda: [outputs[layer.name] for layer in layers]
    finally:
        for hook in hooks:
            hook.remove()

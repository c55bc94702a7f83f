"""ANP, Adversarial Neuron Pruning (Wu and Wang, NeurIPS 2021): prune what noise can turn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mnp.baselines.amount import AmountRule, check_amount, filters_to_prune
from lightning_mnp.baselines.result import BaselineResult
from lightning_mnp.baselines.workbench import Workbench, require_finite
from lightning_mnp.config import check_options, option
from lightning_mnp.defense_data.augment import Augmentation
from lightning_mnp.defense_data.defense_set import (
    DefenseSet,
    Unpack,
    seeded_generator,
    unpack_batch,
)
from lightning_mnp.defense_data.evaluation import accuracy, clean_logits
from lightning_mnp.surgery.forward import Forward
from lightning_mnp.surgery.guards import running_alone, unchanged_on_error
from lightning_mnp.surgery.layers import FilterLayer, FilterLayers, find_filter_layers
from lightning_mnp.surgery.masked_network import MaskedNetwork, Weights

__all__ = ["ANPConfig", "anp", "default_anp"]

_LARGEST_THRESHOLD = 0.9  # of those that the published program tries


@dataclass(frozen=True)
class ANPConfig:
    """The options of ANP; the defaults are the published ones, except for how many are pruned.

    Args:
        seed: Seed of batch order, augmentation and noise.
        batch_size: Most images in a batch, at least 3.
        augment: How images are changed: ``"none"``, ``"crop"`` (shifted) or ``"crop-flip"``
            (shifted and mirrored).
        iterations: Steps of the masks, each on one batch.
        lr: Learning rate of the masks.
        momentum: Momentum of the masks, from 0 to below 1.
        eps: Most that the noise changes a scale or a shift, as a share of it.
        alpha: Weight of the loss without noise, from 0 to 1; that with noise has the rest.
        noise_steps: Steps in which the noise is made.
        rule: ``"own"`` prunes up to a threshold on the masks, ``"number"`` and ``"share"`` the
            filters with the lowest masks; see :func:`anp`.
        amount: For the other two rules, the number of filters, or the share of all filters.
        threshold: For the rule ``"own"``: filters whose mask is at most this number are pruned,
            from 0 to below 1; if None, it is found by clean images. The paper has 0.2.
        max_drop: How much the accuracy on the defense set may fall if the threshold is found by
            it, as a share from 0 to 1.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> ANPConfig(rule="number", amount=15).amount
        15
    """

    seed: int = option(0)
    batch_size: int = option(128, at_least=3, why=", so that no batch holds a single image")
    augment: Augmentation = option("crop-flip", choices=get_args(Augmentation))
    iterations: int = option(2000, at_least=1)
    lr: float = option(0.2, above=0)
    momentum: float = option(0.9, at_least=0, below=1)
    eps: float = option(0.4, above=0)
    alpha: float = option(0.2, at_least=0, at_most=1)
    noise_steps: int = option(1, at_least=1)
    rule: AmountRule = option("own", choices=get_args(AmountRule))
    amount: float = option(0.0)
    threshold: float | None = option(None, at_least=0, below=1, optional=True)
    max_drop: float = option(0.02, at_least=0, at_most=1)

    def __post_init__(self) -> None:
        check_options(self)
        check_amount(self)


def anp(
    model: nn.Module,
    loader: Iterable[Any] | DefenseSet,
    *,
    config: ANPConfig | None = None,
    forward: Forward | None = None,
    network: str | None = None,
    unpack: Unpack = unpack_batch,
) -> BaselineResult:
    """Prune a copy of a network by ANP; the network itself does not change.

    Noise on the filters makes backdoored networks fall back on the target class. Each filter has a
    mask ``m`` in [0, 1], 1 at first, and noise ``d`` and ``x`` in [-eps, eps]: its weight is
    multiplied by ``m + d`` and its bias by ``1 + x``. In each iteration the noise is drawn, and
    goes a step along the sign of the gradient to where the loss on clean images is higher. Then
    the masks go a step of SGD to where the weighted sum of the losses with and without this noise
    is lower. In the end, the weights of the filters with low masks are set to zero, their biases
    stay.

    Weight and bias are the scale and the shift of the normalization layer behind a filter, as in
    the paper, and those of the filter itself if no normalization layer follows it alone. While
    masks are learned, batch normalization uses the statistics of the batch, as in the published
    program, and the stored ones do not change; all other layers are in evaluation mode. Accuracy
    is measured with the stored ones. A filter takes no part if nothing scales its map, as with
    batch normalization without a scale.

    The published program prints accuracy and attack success on the test set for each threshold,
    and its user chooses one; the paper has 0.2. Here the rule ``"own"`` looks for a threshold by
    accuracy on the defense set alone, by halving: at the end, pruning up to the threshold costs at
    most ``max_drop``, and pruning one filter more costs more, or its mask is above 0.9. Many masks
    end at exactly 0. Filters with the same mask are pruned in the order of their mean mask over
    all iterations.

    Args:
        model: The network, or a module around it, on the device to work on.
        loader: Yields batches of clean, labeled images as the network takes them; or a
            :class:`~lightning_mnp.defense_data.defense_set.DefenseSet`.
        config: Options; the defaults if None.
        forward: A function (network, images) that calls the network and returns logits, or
            something that holds them.
        network: Dotted name of the submodule that classifies, if the model has no ``forward``.
        unpack: A function (batch) that returns images and labels.

    Returns:
        The defended copy, with the masks of the pruned filters as scores. The details hold the
        ``threshold`` (the last of these masks, NaN if none is pruned), and how many ``filters``
        take part.

    Raises:
        ValueError: If the model, the data and the options do not fit each other.
        TypeError: If batches or outputs are of an unknown form.
        ArithmeticError: If the gradient of the masks is no longer finite.

    Example:
        >>> network = nn.Sequential(
        ...     nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
        >>> batch = torch.rand(8, 1, 2, 2), torch.arange(8) % 2
        >>> result = anp(network, [batch], config=ANPConfig(iterations=2, rule="number", amount=1))
        >>> len(result.pruned), result.model is network
        (1, False)
    """
    config = config or ANPConfig()
    bench = Workbench.of(config, model, loader, forward, network, unpack)
    with unchanged_on_error(model), running_alone(model):
        found = find_filter_layers(model, bench.sample, forward=bench.call)
        layers = _scaled_layers(model, found)
        counted = config.rule != "own"
        number = filters_to_prune(config, found.total, layers.total) if counted else 0
        masked = MaskedNetwork(model, layers, bench.call)
        masks, means = _learn(masked, bench, config)
        order = means.argsort(stable=True)
        order = order[masks[order].argsort(stable=True)]
        before = _accuracy(masked, bench, order[:0])
        if config.rule == "own" and config.threshold is not None:
            number = int((masks <= config.threshold).sum())
        elif config.rule == "own":
            candidates = order[: int((masks <= _LARGEST_THRESHOLD).sum())]
            number = _search(masked, bench, candidates, before - config.max_drop)
        chosen = order[:number]
        after = _accuracy(masked, bench, chosen)
        _overwrite(bench.copy, _without(masked, chosen))
    scores = masks[chosen].tolist()
    return BaselineResult(
        model=bench.copy,
        pruned=[layers.locate(int(position)) for position in chosen],
        scores=scores,
        accuracy_before=before,
        accuracy_after=after,
        details={"threshold": scores[-1] if scores else math.nan, "filters": layers.total},
    )


def default_anp(
    network: nn.Module, images: Iterable[Any] | DefenseSet, seed: int
) -> BaselineResult:
    """Prune a copy of a network by ANP with its default options, as the registry calls it.

    Args:
        network: The network.
        images: Yields batches of clean, labeled images; or a
            :class:`~lightning_mnp.defense_data.defense_set.DefenseSet`.
        seed: Seed of batch order, augmentation and noise.

    Returns:
        The result of :func:`anp`.
    """
    return anp(network, images, config=ANPConfig(seed=seed))


def _scaled_layers(model: nn.Module, found: FilterLayers) -> FilterLayers:
    """Return the layers that have a parameter that scales their maps."""
    tensors = _tensors(model)
    layers = tuple(layer for layer in found if _names(layer, tensors)[0])
    if not layers:
        raise ValueError(
            f"Expected at least one convolution of {type(model).__name__} to have weights, or a "
            f"normalization layer behind it a scale, that ANP can multiply, but none of "
            f"{len(found)} has. Use a defense that masks maps, such as `lightning_mnp.defend`."
        )
    return FilterLayers(layers, found.skipped)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers of a network by name: frozen layers keep scales in both."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _names(layer: FilterLayer, tensors: dict[str, Tensor]) -> tuple[str, str]:
    """Return the names of the tensors that scale and shift a layer's maps, "" if there is none."""
    scale = "weight" if layer.site != layer.name else layer.scale
    names = f"{layer.site}.{scale}", f"{layer.site}.bias"
    return names[0] if names[0] in tensors else "", names[1] if names[1] in tensors else ""


def _scaled(masked: MaskedNetwork, scales: Tensor, shifts: Tensor) -> Weights:
    """Multiply the weights and the biases of all filters by factors.

    Args:
        masked: The network.
        scales: Factors of the weights, shape (total filters,).
        shifts: Factors of the biases, shape (total filters,).

    Returns:
        The changed tensors, by name.
    """
    tensors = _tensors(masked.network)
    changed: Weights = {}
    sizes = masked.layers.sizes
    parts = zip(masked.layers, scales.split(sizes), shifts.split(sizes), strict=True)
    for layer, scale, shift in parts:
        weight, bias = _names(layer, tensors)
        changed[weight] = _multiplied(layer, tensors[weight].detach(), scale)
        if bias:
            own = tensors[bias].detach()
            changed[bias] = own * shift.to(own.dtype).view_as(own)
    return changed


def _multiplied(layer: FilterLayer, weight: Tensor, factors: Tensor) -> Tensor:
    """Multiply each filter's part of a scale, a gain or a convolution's weight by a factor."""
    factors = factors.to(weight.dtype)
    if weight.numel() == layer.filters:
        return weight * factors.view_as(weight)
    ones = [1] * (weight.ndim - 2)
    if not layer.transposed:
        return weight * factors.view(-1, 1, *ones)
    grouped: Tensor = weight.unflatten(0, (layer.groups, -1))
    return (grouped * factors.view(layer.groups, 1, -1, *ones)).flatten(0, 1)


@torch.enable_grad()
def _learn(masked: MaskedNetwork, bench: Workbench, config: ANPConfig) -> tuple[Tensor, Tensor]:
    """Learn the masks, and return them and their means over all iterations."""
    total = masked.layers.total
    masks = torch.ones(total, device=bench.device, requires_grad=True)
    means = torch.zeros(total, device=bench.device)
    optimizer = torch.optim.SGD([masks], config.lr, config.momentum)
    for iteration, (images, labels) in zip(range(config.iterations), _endless(bench), strict=False):
        generator = seeded_generator(config.seed, "anp noise", iteration)
        drawn = 2 * torch.rand(2, total, generator=generator) - 1
        start = config.eps * drawn.to(bench.device)
        noise = _worst_noise(masked, images, labels, masks.detach(), start, config)
        noisy = _loss(masked, images, labels, masks + noise[0], 1 + noise[1])
        plain = _loss(masked, images, labels, masks, torch.ones_like(masks))
        optimizer.zero_grad()
        (config.alpha * plain + (1 - config.alpha) * noisy).backward()
        assert masks.grad is not None
        require_finite(
            masks.grad,
            f"the gradient of the masks in iteration {iteration + 1} of ANP",
            "Lower `lr` or `eps`.",
        )
        optimizer.step()
        with torch.no_grad():
            masks.clamp_(0.0, 1.0)
            means += masks / config.iterations
    return masks.detach(), means


def _endless(bench: Workbench) -> Iterator[tuple[Tensor, Tensor]]:
    """Go through the defense set again and again."""
    for epoch in count():
        yield from bench.batches("anp", epoch)


def _loss(
    masked: MaskedNetwork, images: Tensor, labels: Tensor, scales: Tensor, shifts: Tensor
) -> Tensor:
    """Compute the loss of a batch with the weights and biases of all filters multiplied."""
    weights = {**masked.weights(), **_scaled(masked, scales, shifts)}
    return F.cross_entropy(masked(images, weights=weights), labels)


def _worst_noise(
    masked: MaskedNetwork,
    images: Tensor,
    labels: Tensor,
    masks: Tensor,
    noise: Tensor,
    config: ANPConfig,
) -> Tensor:
    """Move noise to where the loss is higher: row 0 for weights, row 1 for biases."""
    for _ in range(config.noise_steps):
        noise.requires_grad_()
        loss = _loss(masked, images, labels, masks + noise[0], 1 + noise[1])
        (gradient,) = torch.autograd.grad(loss, noise)
        moved = noise.detach() + config.eps / config.noise_steps * gradient.sign()
        noise = moved.clamp(-config.eps, config.eps)
    return noise


def _without(masked: MaskedNetwork, positions: Tensor) -> Weights:
    """Return the changed tensors of a network without the weights of some filters, by name."""
    kept = torch.ones(masked.layers.total, device=masked.device)
    kept[positions] = 0.0
    return _scaled(masked, kept, torch.ones_like(kept))


def _accuracy(masked: MaskedNetwork, bench: Workbench, positions: Tensor) -> float:
    """Compute the accuracy on the defense set without the weights of some filters."""
    weights = {**masked.weights(), **_without(masked, positions)}
    return accuracy(*clean_logits(masked, bench.data, bench.batch_size, weights=weights))


def _search(masked: MaskedNetwork, bench: Workbench, order: Tensor, least: float) -> int:
    """Return how many filters can be pruned at an accuracy of at least `least`, by halving."""
    fewest, most = 0, len(order)
    while fewest < most:
        middle = (fewest + most + 1) // 2
        # A drop of exactly `max_drop` is allowed.
        if _accuracy(masked, bench, order[:middle]) >= least - 1e-9:
            fewest = middle
        else:
            most = middle - 1
    return fewest


@torch.no_grad()
def _overwrite(model: nn.Module, changed: Weights) -> None:
    """Write tensors into a network, by name."""
    tensors = _tensors(model)
    for name, tensor in changed.items():
        tensors[name].copy_(tensor)

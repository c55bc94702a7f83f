"""NFT, Neural mask Fine-Tuning (Karim et al., ECCV 2024): soft masks, trained with MixUp."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from lightning_mnp.baselines.calls import calls_of
from lightning_mnp.baselines.result import BaselineResult
from lightning_mnp.baselines.workbench import Workbench
from lightning_mnp.config import check_options, option
from lightning_mnp.defense_data.augment import Augmentation
from lightning_mnp.defense_data.defense_set import (
    DefenseSet,
    Unpack,
    seeded_generator,
    unpack_batch,
)
from lightning_mnp.surgery.forward import Forward
from lightning_mnp.surgery.guards import running_alone
from lightning_mnp.surgery.layers import FilterLayer, FilterLayers, find_filter_layers
from lightning_mnp.surgery.masks import scalable_filters
from lightning_mnp.surgery.scaling import scale_filters_

__all__ = ["NFTConfig", "default_nft", "mask_floors", "nft"]


@dataclass(frozen=True)
class NFTConfig:
    """The options of NFT; the defaults are those of the published program.

    Args:
        seed: Seed of batch order, augmentation and MixUp.
        batch_size: Most images in a batch, at least 3; the batches of a pass are of equal size.
        augment: How images are changed before they are mixed: ``"none"``, ``"crop"`` (shifted) or
            ``"crop-flip"`` (shifted and mirrored).
        steps: Batches that the masks are trained on.
        lr: Learning rate of SGD on the masks at first; it falls along half a cosine.
        last_lr: Learning rate in the end, at most `lr`.
        momentum: Momentum of SGD, from 0 to below 1.
        mixup: Parameter of the Beta distribution that the weights of MixUp are drawn from; 1 makes
            them uniform.
        penalty: Weight of the mask regularizer, the sum of the distances of all masks from 1. It is
            divided by the number of images of a class.
        alpha: Lower bound of a mask in front of all layers, from 0 to 1.
        beta: How fast the lower bound falls from layer to layer.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> NFTConfig(steps=500).mixup
        1.0
    """

    seed: int = option(0)
    batch_size: int = option(128, at_least=3, why=", so that no batch holds a single image")
    augment: Augmentation = option("crop-flip", choices=get_args(Augmentation))
    steps: int = option(1000, at_least=1)
    lr: float = option(0.05, above=0)
    last_lr: float = option(0.02, at_least=0)
    momentum: float = option(0.95, at_least=0, below=1)
    mixup: float = option(1.0, above=0)
    penalty: float = option(1e-3, at_least=0)
    alpha: float = option(0.8, at_least=0, at_most=1)
    beta: float = option(0.5, at_least=0)

    def __post_init__(self) -> None:
        check_options(self)
        if self.last_lr > self.lr:
            raise ValueError(
                f"Expected argument `last_lr` to be at most `lr`, {self.lr}, but got "
                f"{self.last_lr}. Lower it as well."
            )


def nft(
    model: nn.Module,
    loader: Iterable[Any] | DefenseSet,
    *,
    config: NFTConfig | None = None,
    forward: Forward | None = None,
    network: str | None = None,
    unpack: Unpack = unpack_batch,
) -> BaselineResult:
    r"""Turn down filters of a copy of a network by NFT; the network itself does not change.

    Each filter gets a mask, 1 at first. SGD on the masks alone lowers

    .. math:: L_{mix}(m) + \frac{\eta}{N_c} \sum_i |1 - m_i|,

    and after each step every mask is put back between the lower bound of its layer, see
    :func:`mask_floors`, and 1. The first term is the cross entropy on images that are mixed in
    pairs (MixUp): with a weight drawn for each batch, two images are added, and so are the losses
    for their two labels. The second term, with :math:`\eta` = `penalty` and :math:`N_c` images of
    a class, holds the masks near 1, so that the network does not drift away from what it was. At
    last the masks are written into the weights. They are soft: no filter is pruned.

    As in the published program, a mask scales the normalization layer behind the convolution, not
    its shift; the network is in training mode meanwhile, so that it normalizes by the statistics of
    each batch and the stored ones follow; and the convolution that is called first has no masks,
    unless it is the only one. The program knows no networks without batch normalization. There the
    mask scales the filter's weights, not its bias. Where batch normalization gets its input from
    several convolutions, it undoes such a scale, and the masks stay at 1. The classifier head has
    no masks, and filters have none that no number can scale.

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
        The copy with the masks in its weights. The details are the ``mean_mask``, the
        ``lowest_mask``, and the ``loss`` (both terms) in the last batch.

    Raises:
        ValueError: If the model and the data do not fit each other, or no filter can be scaled.
        TypeError: If batches or outputs are of an unknown form.
        ArithmeticError: If the loss or its gradient is no longer finite.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> batch = torch.rand(8, 1, 2, 2), torch.arange(8) % 2
        >>> result = nft(network, [batch], config=NFTConfig(steps=1))
        >>> result.details["lowest_mask"] <= result.details["mean_mask"] <= 1
        True
    """
    config = config or NFTConfig()
    bench = Workbench.of(config, model, loader, forward, network, unpack)
    with running_alone(bench.copy):
        found = find_filter_layers(bench.copy, bench.sample, forward=bench.call)
        before = bench.accuracy(bench.copy)
    masked = _without_first(bench, found)
    floors = mask_floors(masked, config.alpha, config.beta)
    layers, floors = _scalable_layers(bench.copy, masked, floors)
    masks = torch.ones(layers.total, device=bench.device, requires_grad=True)
    with bench.training(), _masking(bench.copy, layers, masks):
        loss = _train_masks(bench, masks, floors.to(bench.device), config)
    masks = masks.detach()
    return BaselineResult(
        model=bench.copy,
        pruned=[],
        scores=[],
        accuracy_before=before,
        accuracy_after=bench.accuracy(bench.copy),
        details={"mean_mask": float(masks.mean()), "lowest_mask": float(masks.min()), "loss": loss},
    )


def default_nft(
    network: nn.Module, images: Iterable[Any] | DefenseSet, seed: int
) -> BaselineResult:
    """Turn down filters of a copy by NFT with its default options, as the registry calls it.

    Args:
        network: The network.
        images: Yields batches of clean, labeled images; or a
            :class:`~lightning_mnp.defense_data.defense_set.DefenseSet`.
        seed: Seed of batch order, augmentation and MixUp.

    Returns:
        The result of :func:`nft`.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> batch = torch.rand(8, 1, 2, 2), torch.arange(8) % 2
        >>> default_nft(network, [batch], seed=0).pruned
        []
    """
    return nft(network, images, config=NFTConfig(seed=seed))


def mask_floors(layers: FilterLayers, alpha: float, beta: float) -> Tensor:
    r"""Compute the lower bound of each mask: :math:`\mu(l) = \alpha e^{-\beta l}` in layer l.

    The first layers see what all classes have in common, so their filters stay nearly as they
    are; deep layers are free to change.

    Args:
        layers: The layers, in the network's order; l counts them from 1.
        alpha: From 0 to 1.
        beta: At least 0.

    Returns:
        Shape (total filters,).

    Example:
        >>> from lightning_mnp.surgery.layers import FilterLayer
        >>> layers = FilterLayers((FilterLayer("a", 2, "a", 1), FilterLayer("b", 1, "b", 1)))
        >>> mask_floors(layers, 1.0, 0.5)
        tensor([0.6065, 0.6065, 0.3679])
    """
    floors = [alpha * math.exp(-beta * number) for number in range(1, len(layers) + 1)]
    return torch.tensor(floors).repeat_interleave(torch.tensor(layers.sizes))


def _without_first(bench: Workbench, found: FilterLayers) -> FilterLayers:
    """Leave out the convolution that is called first, unless it is the only one."""
    convolutions = (n for n, module in bench.copy.named_modules() if isinstance(module, _ConvNd))
    first = calls_of(bench, convolutions)[:1]
    rest = tuple(layer for layer in found if layer.name not in first)
    return FilterLayers(rest) if rest else found


def _scalable_layers(
    network: nn.Module, found: FilterLayers, floors: Tensor
) -> tuple[FilterLayers, Tensor]:
    """Return the layers that soft masks can be written into, and the lower bounds of these."""
    parts = zip(found, scalable_filters(network, found).split(found.sizes), strict=True)
    flags = [
        bool(part.all()) and _owner(network.get_submodule(layer.site), _scale_of(layer)) is not None
        for layer, part in parts
    ]
    if not any(flags):
        raise ValueError(
            f"Expected filters of {type(network).__name__} that a mask can scale, by weights or by "
            "the scale of a normalization layer, which is what NFT trains, but none of those that "
            f"could have a mask, {found.total} in all, is. Use a defense that prunes filters, such "
            "as `lightning_mnp.defend`."
        )
    layers = tuple(layer for layer, flag in zip(found, flags, strict=True) if flag)
    return FilterLayers(layers), floors[
        torch.tensor(flags).repeat_interleave(torch.tensor(found.sizes))
    ]


def _scale_of(layer: FilterLayer) -> str:
    """Return the name of the parameter of a layer's site that masks scale."""
    return layer.scale if layer.site == layer.name else "weight"


def _owner(module: nn.Module, name: str) -> dict[str, Any] | None:
    """Return the dict of a module that a tensor is in; None if the tensor is computed."""
    owners: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    return next((owner for owner in owners if name in owner), None)


class _Masked(nn.Module):
    """Multiplies each number of a parameter by the mask of the filter that it belongs to.

    Args:
        masks: Masks of all filters, shape (total filters,).
        positions: Which of them each number of the parameter takes, shape as the parameter.
    """

    def __init__(self, masks: Tensor, positions: Tensor) -> None:
        super().__init__()
        self.masks, self.positions = masks, positions

    def forward(self, parameter: Tensor) -> Tensor:
        return parameter * self.masks[self.positions].to(parameter.dtype)


@contextmanager
def _masking(network: nn.Module, layers: FilterLayers, masks: Tensor) -> Iterator[None]:
    """Let masks act on a network until the context ends; then write them into its parameters."""
    places: list[tuple[nn.Module, str, dict[str, Any], list[str]]] = []
    for layer, part in zip(layers, torch.arange(layers.total).split(layers.sizes), strict=True):
        module = network.get_submodule(layer.site)
        name = _scale_of(layer)
        parameter: Tensor = getattr(module, name)
        if module is network.get_submodule(layer.name) and name == "weight":
            positions = torch.ones(parameter.shape, dtype=part.dtype)
            scale_filters_(positions, part, layer.transposed, layer.groups)
        else:
            positions = part.view(parameter.shape)
        owner = _owner(module, name)
        assert owner is not None  # see `_scalable_layers`
        places.append((module, name, owner, list(owner)))
        register_parametrization(module, name, _Masked(masks, positions.to(masks.device)))
    try:
        yield
    finally:
        for module, name, owner, order in places:
            remove_parametrizations(module, name, leave_parametrized=True)
            for each in order:  # it was put at the end; optimizers and state dicts go by the order
                owner[each] = owner.pop(each)


def _train_masks(bench: Workbench, masks: Tensor, floors: Tensor, config: NFTConfig) -> float:
    """Train the masks, which act on the copy, in place; return the loss in the last batch."""
    penalty = config.penalty * len(bench.data.counts) / len(bench.data)
    optimizer = torch.optim.SGD([masks], config.lr, momentum=config.momentum)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, config.steps, eta_min=config.last_lr
    )
    value = math.nan
    for step, (images, labels) in enumerate(_batches(bench, config.steps)):
        share, others = _draw_pairs(len(labels), config.mixup, (config.seed, "nft", "mixup", step))
        others = others.to(bench.device)
        logits = bench.logits(bench.copy, share * images + (1 - share) * images[others])
        mixed = share * F.cross_entropy(logits, labels)
        mixed = mixed + (1 - share) * F.cross_entropy(logits, labels[others])
        loss = mixed + penalty * (1 - masks).abs().sum()
        (masks.grad,) = torch.autograd.grad(loss, masks)
        value = loss.item()
        if not bool(torch.isfinite(masks.grad).all()) or not math.isfinite(value):
            raise ArithmeticError(
                f"Expected the loss of the masks and its gradient to stay finite, but they do not "
                f"at a loss of {value} in batch {step + 1}. Lower `lr` and `last_lr`, or "
                "raise `alpha`."
            )
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            masks.copy_(masks.clamp(min=floors, max=torch.ones_like(floors)))
    return value


def _batches(bench: Workbench, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield as many batches, in one pass over the defense set after another."""
    passes = (bench.batches("nft", epoch) for epoch in count())
    return islice(chain.from_iterable(passes), steps)


def _draw_pairs(count: int, mixup: float, key: tuple[str | int, ...]) -> tuple[float, Tensor]:
    """Draw the weight of MixUp for a batch, and with which image each one is mixed."""
    generator = seeded_generator(*key)
    others = torch.randperm(count, generator=generator)
    seed = int(torch.randint(2**62, (1,), generator=generator))
    return float(np.random.default_rng(seed).beta(mixup, mixup)), others

"""FP, fine-pruning (Liu et al., RAID 2018): dormant filters go, then the rest is fine-tuned."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lightning_mnp.baselines.amount import AmountRule, check_amount, filters_to_prune
from lightning_mnp.baselines.calls import calls_of
from lightning_mnp.baselines.result import BaselineResult
from lightning_mnp.baselines.tuning import TuningConfig, tune
from lightning_mnp.baselines.workbench import Workbench
from lightning_mnp.config import option
from lightning_mnp.defense_data.defense_set import DefenseSet, Unpack, unpack_batch
from lightning_mnp.defense_data.evaluation import accuracy, clean_logits
from lightning_mnp.surgery.forward import Forward, evaluating
from lightning_mnp.surgery.guards import running_alone
from lightning_mnp.surgery.layers import FilterLayer, FilterLayers, find_filter_layers
from lightning_mnp.surgery.masked_network import MaskedNetwork
from lightning_mnp.surgery.masks import FilterMasks

__all__ = ["FPConfig", "default_fp", "fp"]


@dataclass(frozen=True)
class FPConfig(TuningConfig):
    """The options of fine-pruning.

    Those of fine-tuning are in :class:`~lightning_mnp.baselines.TuningConfig`; the paper has none
    for networks of this kind.

    Args:
        rule: ``"own"`` prunes as many filters as `max_drop` allows; ``"number"`` and ``"share"``
            prune `amount`.
        amount: The number of filters, or the share of all filters of the network. For the rule
            ``"own"`` it counts nothing.
        max_drop: For the rule ``"own"``: how much the accuracy on the defense set may fall by
            pruning, as a share from 0 to 1. The paper stops at a fall of 4%.
        layer: Dotted name of the convolution to prune; the last one that is called if None, as in
            the paper.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> FPConfig(rule="number", amount=8).max_drop
        0.04
    """

    rule: AmountRule = option("own", choices=get_args(AmountRule))
    amount: float = option(0.0)
    max_drop: float = option(0.04, at_least=0, at_most=1)
    layer: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_amount(self)


def fp(
    model: nn.Module,
    loader: Iterable[Any] | DefenseSet,
    *,
    config: FPConfig | None = None,
    forward: Forward | None = None,
    network: str | None = None,
    unpack: Unpack = unpack_batch,
) -> BaselineResult:
    """Prune a copy of a network by fine-pruning; the network itself does not change.

    Filters of the last convolution are sorted by their mean activation on clean images. Those with
    the lowest are dormant, and a backdoor may use them; they are pruned first. Then the copy is
    fine-tuned, and the pruned filters stay at zero.

    The paper prunes one filter after the other and measures the accuracy each time, until it has
    fallen by 4%. Here bisection finds such a number of filters: with it the accuracy has fallen by
    `max_drop` at most, with one filter more it falls further. A few measurements are enough.
    At least one filter of the layer is left.

    The paper takes activations behind the ReLU. Here the activation of a filter is the positive
    part of its map, behind the normalization layer if one follows. So it is a filter's own
    activation even if a shortcut is added in front of the ReLU. Activations are taken in
    evaluation mode, with stored statistics. A pruned filter's map is zero. Fine-tuning runs in
    training mode, see :func:`~lightning_mnp.baselines.ft`. Any network with a convolution in front
    of its head is taken.

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
        The pruned and fine-tuned copy, with the mean activations of the pruned filters as scores.
        The details are the accuracy between the two steps, ``accuracy_pruned``, and the mean
        ``loss`` over the last pass.

    Raises:
        ValueError: If the model, the data and the options do not fit each other, or there is no
            filter to prune.
        TypeError: If batches or outputs are of an unknown form.
        ArithmeticError: If an activation, the loss or a weight is not finite.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> batch = torch.rand(8, 1, 2, 2), torch.arange(8) % 2
        >>> result = fp(network, [batch], config=FPConfig(epochs=1, rule="number", amount=2))
        >>> len(result.pruned), result.model is network
        (2, False)
    """
    config = config or FPConfig()
    bench = Workbench.of(config, model, loader, forward, network, unpack)
    with running_alone(bench.copy):
        layers = find_filter_layers(bench.copy, bench.sample, forward=bench.call)
        chosen = _chosen_layer(bench, layers, config.layer)
        one = FilterLayers((chosen,))
        count = None
        if config.rule != "own":
            count = filters_to_prune(config, layers.total, chosen.filters)
        activations = mean_activations(bench, chosen)
        order = activations.argsort(stable=True)
        before = bench.accuracy(bench.copy)
        if count is None:
            count = _most_by_accuracy(bench, one, order, before - config.max_drop - 1e-9)
    masks = torch.ones_like(activations)
    masks[order[:count]] = 0.0
    pruning = FilterMasks(bench.copy, one, masks)
    pruning.bake()
    pruned_accuracy = bench.accuracy(bench.copy)
    loss = tune(bench, config, after_step=pruning.bake)
    return BaselineResult(
        model=bench.copy,
        pruned=[one.locate(int(position)) for position in order[:count]],
        scores=activations[order[:count]].tolist(),
        accuracy_before=before,
        accuracy_after=bench.accuracy(bench.copy),
        details={"accuracy_pruned": pruned_accuracy, "loss": loss},
    )


def default_fp(network: nn.Module, images: Iterable[Any] | DefenseSet, seed: int) -> BaselineResult:
    """Prune a copy of a network by fine-pruning with its default options, as the registry calls it.

    Args:
        network: The network.
        images: Yields batches of clean, labeled images; or a
            :class:`~lightning_mnp.defense_data.defense_set.DefenseSet`.
        seed: Seed of batch order and augmentation.

    Returns:
        The result of :func:`fp`.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> batch = torch.rand(8, 1, 2, 2), torch.arange(8) % 2
        >>> len(default_fp(network, [batch], seed=0).pruned) < 4
        True
    """
    return fp(network, images, config=FPConfig(seed=seed))


@torch.no_grad()
def mean_activations(bench: Workbench, layer: FilterLayer) -> Tensor:
    """Compute the mean activation of each filter of a layer on clean images.

    Args:
        bench: The workbench, whose copy is run in evaluation mode.
        layer: The layer.

    Returns:
        The mean over images and places of the positive part of each map, shape (filters,).

    Raises:
        ArithmeticError: If one is not finite.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> bench = Workbench(network, [(torch.rand(8, 1, 2, 2), torch.arange(8) % 2)])
        >>> layers = find_filter_layers(network, bench.sample)
        >>> mean_activations(bench, layers[0]).shape
        torch.Size([4])
    """
    sums = torch.zeros(layer.filters, device=bench.device)
    places = 0

    def add(module: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal places
        maps = output.movedim(layer.channel_dim, 0).flatten(1).float()
        sums.add_(maps.clamp(min=0).sum(1))
        places += maps.shape[1]

    hook = bench.copy.get_submodule(layer.site).register_forward_hook(add)
    try:
        with evaluating(bench.copy):
            for images, _ in bench.data.batches(bench.batch_size, bench.device):
                bench.logits(bench.copy, images)
    finally:
        hook.remove()
    if not bool(sums.isfinite().all()):
        raise ArithmeticError(
            f"Expected the maps of {layer.name!r} to be finite, but some hold NaN or infinity. "
            "Check the network's weights and the images."
        )
    return sums / places


def _chosen_layer(bench: Workbench, layers: FilterLayers, name: str | None) -> FilterLayer:
    """Return the layer of a name, or the one that is called last."""
    by_name = {layer.name: layer for layer in layers}
    if name is None:
        name = calls_of(bench, by_name)[-1]
    if name not in by_name:
        raise ValueError(
            f"Expected argument `layer` to be a convolution whose filters can be pruned, one of "
            f"{list(by_name)}, but got {name!r}. Pass None for the last one."
        )
    return by_name[name]


def _most_by_accuracy(bench: Workbench, layers: FilterLayers, order: Tensor, least: float) -> int:
    """Find how many filters, in this order, leave at least this accuracy, by bisection."""
    masked = MaskedNetwork(bench.copy, layers, bench.call, statistics="running")
    low, high = 0, layers.total - 1
    while low < high:
        middle = (low + high + 1) // 2
        masks = torch.ones(layers.total, device=bench.device)
        masks[order[:middle]] = 0.0
        logits, labels = clean_logits(masked, bench.data, bench.batch_size, masks=masks)
        low, high = (middle, high) if accuracy(logits, labels) >= least else (low, middle - 1)
    return low

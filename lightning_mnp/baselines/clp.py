"""CLP, Channel Lipschitzness based Pruning (Zheng et al., ECCV 2022): no data is needed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lightning_mnp.baselines.amount import AmountRule, check_amount, filters_to_prune
from lightning_mnp.baselines.result import BaselineResult
from lightning_mnp.baselines.workbench import Workbench
from lightning_mnp.config import check_options, option
from lightning_mnp.defense_data.defense_set import DefenseSet, Unpack, unpack_batch
from lightning_mnp.surgery.forward import Forward
from lightning_mnp.surgery.guards import running_alone
from lightning_mnp.surgery.layers import FilterLayer, FilterLayers, find_filter_layers
from lightning_mnp.surgery.prune import prune
from lightning_mnp.surgery.tracing import CHANNEL_NORMS

__all__ = ["CLPConfig", "channel_bounds", "clp", "default_clp"]


@dataclass(frozen=True)
class CLPConfig:
    """The options of CLP.

    Args:
        rule: ``"own"`` prunes by `u`; ``"number"`` and ``"share"`` prune `amount`.
        amount: The number of filters, or the share of all filters of the network. For the rule
            ``"own"`` it counts nothing.
        u: For the rule ``"own"``: by how many standard deviations of its layer a filter's bound
            exceeds the layer's mean if it is pruned. The paper has 3 for CIFAR-10.
        batch_size: Most images in a batch when accuracy is measured, at least 3.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> CLPConfig(u=4).rule
        'own'
    """

    rule: AmountRule = option("own", choices=get_args(AmountRule))
    amount: float = option(0.0)
    u: float = option(3.0, above=0)
    batch_size: int = option(128, at_least=3)

    def __post_init__(self) -> None:
        check_options(self)
        check_amount(self)


def clp(
    model: nn.Module,
    loader: Iterable[Any] | DefenseSet,
    *,
    config: CLPConfig | None = None,
    forward: Forward | None = None,
    network: str | None = None,
    unpack: Unpack = unpack_batch,
) -> BaselineResult:
    """Prune a copy of a network by CLP; the network itself does not change.

    Each filter gets a bound of how fast its map can change with the input of its layer, see
    :func:`channel_bounds`. Filters of a backdoor are taken to be the most sensitive of their
    layer. So the filters go whose bound is above mean + `u` times standard deviation of the bounds
    of their layer, and their maps are zero from then on. Nothing is trained, and batch
    normalization keeps its stored statistics.

    The choice needs no images. They serve to find the layers, by running two of them, and to
    measure accuracy before and after.

    The score of a filter is its bound minus the layer's mean, in standard deviations of the layer.
    The rules ``"number"`` and ``"share"`` take the filters of all layers with the highest scores.
    Among n filters no score is above (n - 1) / sqrt(n): in a layer of ten filters or fewer,
    ``u=3`` prunes none.

    These take no part: layers with weights that are standardized when they are used, and those
    followed by a normalization without stored statistics, such as ``GroupNorm``, because its
    factor depends on the images.

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
        The pruned copy, with the scores of the pruned filters, highest first.

    Raises:
        ValueError: If the model, the data and the options do not fit each other, or no layer can
            take part.
        TypeError: If batches or outputs are of an unknown form.
        ArithmeticError: If a bound is not finite.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> batch = torch.rand(8, 1, 2, 2), torch.arange(8) % 2
        >>> result = clp(network, [batch], config=CLPConfig(rule="number", amount=1))
        >>> len(result.pruned), result.model is network
        (1, False)
    """
    config = config or CLPConfig()
    bench = Workbench(
        model,
        loader,
        batch_size=config.batch_size,
        forward=forward,
        network=network,
        unpack=unpack,
    )
    with running_alone(bench.copy):
        found = find_filter_layers(bench.copy, bench.sample, forward=bench.call)
    layers = _bounded_layers(bench.copy, found)
    count = None
    if config.rule != "own":
        count = filters_to_prune(config, found.total, layers.total)
    scores = torch.cat([_standardized(channel_bounds(bench.copy, layer)) for layer in layers])
    if count is None:
        count = int((scores > config.u).sum())
    chosen = scores.argsort(descending=True, stable=True)[:count]
    before = bench.accuracy(bench.copy)
    pruning = prune(bench.copy, layers, chosen)
    return BaselineResult(
        model=bench.copy,
        pruned=pruning.pruned,
        scores=scores[chosen].tolist(),
        accuracy_before=before,
        accuracy_after=bench.accuracy(bench.copy),
    )


def default_clp(
    network: nn.Module, images: Iterable[Any] | DefenseSet, seed: int
) -> BaselineResult:
    """Prune a copy of a network by CLP with its default options, as the registry calls it.

    Args:
        network: The network.
        images: Yields batches of clean, labeled images; or a
            :class:`~lightning_mnp.defense_data.defense_set.DefenseSet`.
        seed: Has no effect: nothing is drawn.

    Returns:
        The result of :func:`clp`.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> batch = torch.rand(8, 1, 2, 2), torch.arange(8) % 2
        >>> default_clp(network, [batch], seed=0).pruned
        []
    """
    return clp(network, images)


@torch.no_grad()
def channel_bounds(network: nn.Module, layer: FilterLayer) -> Tensor:
    r"""Compute the paper's bound of the Lipschitz constant of each channel of a layer (UCLC).

    The weights of filter k are a matrix with a row for each input channel and a column for each
    place of the kernel. Its greatest singular value is multiplied by the factor with which
    normalization scales the channel, :math:`|\gamma_k| / \sqrt{\sigma_k^2 + \epsilon}` with the
    stored variance, or by 1 without normalization. That the kernel moves over the image is left
    out, as in the paper: the constant itself can be higher.

    Args:
        network: The network.
        layer: One of its layers. If a normalization layer belongs to it, it has stored statistics.

    Returns:
        Shape (filters,), in float64 on the CPU.

    Raises:
        ArithmeticError: If a bound is not finite.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Flatten(), nn.Linear(4, 2))
        >>> layer = find_filter_layers(network, torch.rand(2, 1, 1, 1))[0]
        >>> bounds = channel_bounds(network, layer).float()
        >>> bounds.equal(network[0].weight.flatten().abs())
        True
    """
    weight = _values(network.get_submodule(layer.name).weight)
    inputs = len(weight) // layer.groups if layer.transposed else weight.shape[1]
    matrices = layer.rows(weight).unflatten(1, (inputs, -1))
    bounds: Tensor = torch.linalg.matrix_norm(matrices, ord=2)
    if layer.norm is not None:
        norm: Any = network.get_submodule(layer.norm)
        bounds = bounds / (_values(norm.running_var) + norm.eps).sqrt()
        if norm.weight is not None:
            bounds = bounds * _values(norm.weight).abs()
    if not bool(bounds.isfinite().all()):
        raise ArithmeticError(
            f"Expected the channel bounds of {layer.name!r} to be finite, but some are NaN or "
            f"infinity: the stored variance of {layer.norm!r} is zero or negative somewhere. Run "
            "the network on clean images in training mode, so that it is estimated again."
        )
    return bounds


def _values(tensor: Any) -> Tensor:
    values: Tensor = tensor.detach().cpu().double()
    return values


def _standardized(bounds: Tensor) -> Tensor:
    """Return bounds minus their mean, in standard deviations; zeros if they do not vary."""
    centered = bounds - bounds.mean()
    spread = centered.square().sum().div(max(1, len(bounds) - 1)).sqrt()
    varies = spread > 1e-9 * bounds.abs().max()  # not rounding alone
    return centered / spread if bool(varies) else torch.zeros_like(bounds)


def _bounded_layers(network: nn.Module, found: FilterLayers) -> FilterLayers:
    """Return the layers whose channels have a bound that follows from stored numbers."""
    layers = []
    for layer in found:
        norm: Any = None if layer.norm is None else network.get_submodule(layer.norm)
        stored = isinstance(norm, CHANNEL_NORMS) and norm.running_var is not None
        if layer.scale == "weight" and (norm is None or stored):
            layers.append(layer)
    if not layers:
        raise ValueError(
            f"Expected a convolution of {type(network).__name__} with plain weights, followed by "
            f"no normalization or by one with stored statistics, which is what CLP bounds, but "
            f"none of {len(found)} is. Use a defense that looks at images, such as "
            "`lightning_mnp.defend`."
        )
    return FilterLayers(tuple(layers))

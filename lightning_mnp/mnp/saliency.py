"""Magnitude and saliency of filters: how large they are and what their removal would cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_mnp.config import Saliency
from lightning_mnp.surgery.masked_network import (
    MaskedNetwork,
    Normalization,
    Statistics,
    Weights,
)
from lightning_mnp.surgery.precision import full_float32

__all__ = [
    "approximate_clc",
    "batch_clc",
    "exact_blc",
    "exact_clc",
    "filter_magnitudes",
]

Batches = Iterable[tuple[Tensor, Tensor]]


def filter_magnitudes(masked: MaskedNetwork, weights: Weights, p: float = 2.0) -> Tensor:
    """Compute the norm of every filter's weights.

    Args:
        masked: The network.
        weights: The parameters to look at, by name.
        p: Order of the norm, above 0.

    Returns:
        Norms, shape (total filters,), float32.

    Example:
        >>> from torch import nn
        >>> from lightning_mnp.surgery.layers import find_filter_layers
        >>> network = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(2, 2))
        >>> _ = nn.init.ones_(network[0].weight)
        >>> masked = MaskedNetwork(network, find_filter_layers(network, torch.zeros(1, 1, 2, 2)))
        >>> filter_magnitudes(masked, masked.weights())
        tensor([2., 2.])
    """
    if p <= 0:
        raise ValueError(f"Expected argument `p` to be above 0, but got {p}.")
    pairs = zip(masked.layers, masked.filter_weights(weights), strict=True)
    return torch.cat([layer.rows(weight.detach()).float().norm(p, 1) for layer, weight in pairs])


def batch_clc(
    masked: MaskedNetwork,
    weights: Weights,
    images: Tensor,
    labels: Tensor,
    form: Saliency = "map",
    *,
    suppressed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute the first-order loss change of every filter's removal on one batch.

    ``"map"`` removes the output map that the filter's mask acts on: it is minus the derivative of
    the loss by the mask, at 1, with normalization statistics held fixed. ``"weight"`` is Eq. 11 to
    the letter: ``-grad . weight`` of the convolution, with the network's own ``statistics``. With
    those of the batch, no weight in front of batch normalization changes the loss by its scale,
    so that only rounding and BatchNorm's ``eps`` are left.

    Both are computed in float32, without autocast and TF32.

    Args:
        masked: The network.
        weights: Parameters to run with, by name.
        images: Shape (N, C, ...).
        labels: Shape (N,).
        form: What is removed.
        suppressed: Whether the weights are those of clean suppression. If it ran with batch
            statistics, the stored ones are not theirs, and those of this batch are held instead.

    Returns:
        Changes of the batch's mean loss, shape (total filters,), float32; and the logits on the
        way, shape (N, K).
    """
    change = _map_changes if form == "map" else _weight_changes
    with full_float32():
        return change(masked.without_autocast(), weights, images, labels, suppressed)


def _map_changes(
    masked: MaskedNetwork, weights: Weights, images: Tensor, labels: Tensor, suppressed: bool
) -> tuple[Tensor, Tensor]:
    held = suppressed and masked.statistics == "batch"
    masks = torch.ones(masked.layers.total, device=masked.device, requires_grad=True)
    statistics: Normalization = "held" if held else "running"
    logits = masked(images, weights=weights, masks=masks, statistics=statistics)
    (slopes,) = torch.autograd.grad(F.cross_entropy(logits, labels), [masks])
    return -slopes, logits.detach()


def _weight_changes(
    masked: MaskedNetwork, weights: Weights, images: Tensor, labels: Tensor, suppressed: bool
) -> tuple[Tensor, Tensor]:
    tracked = dict(weights)
    leaves = []
    for layer in masked.layers:
        leaf = weights[f"{layer.name}.weight"].detach().requires_grad_()
        tracked[f"{layer.name}.weight"] = leaf
        leaves.append(leaf)
    logits = masked(images, weights=tracked)
    loss = F.cross_entropy(logits, labels)
    # A layer may be called and yet have no part in the logits: its removal costs nothing.
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    products = [
        -layer.rows(gradient * leaf.detach()).float().sum(1)
        for layer, gradient, leaf in zip(masked.layers, gradients, leaves, strict=True)
    ]
    return torch.cat(products), logits.detach()


def approximate_clc(
    masked: MaskedNetwork,
    weights: Weights,
    batches: Batches,
    form: Saliency = "map",
    *,
    suppressed: bool = False,
) -> Tensor:
    """Compute the first-order clean loss change of every filter's removal (Eq. 11).

    Args:
        masked: The network.
        weights: Parameters to run with, by name.
        batches: Pairs (images, labels) of clean data on the network's device.
        form: As for :func:`batch_clc`.
        suppressed: As for :func:`batch_clc`.

    Returns:
        Mean over all images, shape (total filters,), float32.

    Raises:
        ValueError: If there is no batch.

    Example:
        >>> from torch import nn
        >>> from lightning_mnp.surgery.layers import find_filter_layers
        >>> network = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Flatten(), nn.Linear(3, 2))
        >>> images, labels = torch.rand(8, 1, 2, 2), torch.arange(8) % 2
        >>> masked = MaskedNetwork(network, find_filter_layers(network, images))
        >>> approximate_clc(masked, masked.weights(), [(images, labels)]).shape
        torch.Size([3])
    """
    total, count = torch.zeros(masked.layers.total, device=masked.device), 0
    for images, labels in batches:
        changes, _ = batch_clc(masked, weights, images, labels, form, suppressed=suppressed)
        total += changes * len(labels)
        count += len(labels)
    if count == 0:
        raise ValueError("Expected argument `batches` to hold at least one batch, but it is empty.")
    return total / count


def exact_clc(
    masked: MaskedNetwork,
    batches: Sequence[tuple[Tensor, Tensor]],
    progress: Callable[[int, int], None] | None = None,
    statistics: Statistics = "running",
) -> Tensor:
    """Measure the clean loss change of every filter's removal, one filter at a time (Eq. 2).

    It takes a pass over the data for every filter; :func:`approximate_clc` takes one in all, and
    its form ``"map"`` estimates what is measured here.

    Args:
        masked: The network.
        batches: Pairs (images, labels) of clean data on the network's device; read many times.
        progress: Called after every filter with the number done and the number of all.
        statistics: ``"running"`` for the network as it is used, in evaluation mode; ``"batch"``
            to normalize by the statistics of each batch.

    Returns:
        Loss without the filter's map minus loss with it, shape (total filters,), float64.

    Raises:
        ValueError: If there is no batch.

    Example:
        >>> from torch import nn
        >>> from lightning_mnp.surgery.layers import find_filter_layers
        >>> network = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Flatten(), nn.Linear(3, 2))
        >>> images, labels = torch.rand(8, 1, 2, 2), torch.arange(8) % 2
        >>> masked = MaskedNetwork(network, find_filter_layers(network, images))
        >>> exact_clc(masked, [(images, labels)]).shape
        torch.Size([3])
    """
    if not batches:
        raise ValueError("Expected argument `batches` to hold at least one batch, but it is empty.")
    total = masked.layers.total
    masks = torch.ones(total, device=masked.device)
    reference = _mean_loss(masked, batches, None, statistics)
    changes = torch.zeros(total, dtype=torch.float64)
    for index in range(total):
        masks[index] = 0.0
        changes[index] = _mean_loss(masked, batches, masks, statistics) - reference
        masks[index] = 1.0
        if progress is not None:
            progress(index + 1, total)
    return changes


def exact_blc(
    masked: MaskedNetwork,
    batches: Sequence[tuple[Tensor, Tensor]],
    trigger: Callable[[Tensor], Tensor],
    relabel: Callable[[Tensor], Tensor],
    progress: Callable[[int, int], None] | None = None,
    statistics: Statistics = "running",
) -> Tensor:
    """Measure the backdoor loss change of every filter's removal (Eq. 3).

    A defender has no trigger; this is for the study of known attacks.

    Args:
        masked: The network.
        batches: Pairs (images, true labels) of clean data on the network's device.
        trigger: Puts the trigger on images as the network takes them (normalized, say).
        relabel: Gives the attacker's labels for true labels.
        progress: Called after every filter with the number done and the number of all.
        statistics: As for :func:`exact_clc`.

    Returns:
        As :func:`exact_clc`, for triggered images and the attacker's labels.

    Example:
        >>> from torch import nn
        >>> from lightning_mnp.surgery.layers import find_filter_layers
        >>> network = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Flatten(), nn.Linear(3, 2))
        >>> images, labels = torch.rand(8, 1, 2, 2), torch.arange(8) % 2
        >>> masked = MaskedNetwork(network, find_filter_layers(network, images))
        >>> exact_blc(masked, [(images, labels)], torch.ones_like, torch.zeros_like).shape
        torch.Size([3])
    """
    triggered = [(trigger(images), relabel(labels)) for images, labels in batches]
    return exact_clc(masked, triggered, progress, statistics)


@torch.no_grad()
def _mean_loss(
    masked: MaskedNetwork,
    batches: Sequence[tuple[Tensor, Tensor]],
    masks: Tensor | None,
    statistics: Statistics,
) -> float:
    total, count = 0.0, 0
    for images, labels in batches:
        logits = masked(images, masks=masks, statistics=statistics)
        total += float(F.cross_entropy(logits.cpu().double(), labels.cpu(), reduction="sum"))
        count += len(labels)
    return total / count

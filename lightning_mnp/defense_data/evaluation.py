"""Evaluation of a network on a defense set: its logits and its accuracy."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mnp.defense_data.defense_set import DefenseSet
from lightning_mnp.surgery.masked_network import MaskedNetwork, Weights

__all__ = ["accuracy", "class_accuracy", "clean_logits"]


@torch.no_grad()
def clean_logits(
    masked: MaskedNetwork,
    data: DefenseSet,
    batch_size: int,
    *,
    weights: Weights | None = None,
    masks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the logits of all images of a defense set, with stored normalization statistics.

    Args:
        masked: The network.
        data: The defense set.
        batch_size: Most images in a batch.
        weights: Parameters to run with, by name; the network's own if None.
        masks: Filter masks, shape (total filters,); no masks if None.

    Returns:
        Logits, shape (N, K), and labels, shape (N,), on the network's device.

    Example:
        >>> from torch import nn
        >>> from lightning_mnp.surgery.layers import find_filter_layers
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> data = DefenseSet(torch.rand(6, 1, 2, 2), torch.arange(6) % 2)
        >>> masked = MaskedNetwork(network, find_filter_layers(network, data.images))
        >>> clean_logits(masked, data, 4)[0].shape
        torch.Size([6, 2])
    """
    passed = [
        (masked(images, weights=weights, masks=masks, statistics="running"), labels)
        for images, labels in data.batches(batch_size, masked.device)
    ]
    logits, labels = (torch.cat(parts) for parts in zip(*passed, strict=True))
    return logits, labels


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Compute the share of images that are classified correctly, from 0 to 1.

    Args:
        logits: Shape (N, K).
        labels: Shape (N,).

    Example:
        >>> accuracy(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]))
        0.5
    """
    return int((logits.argmax(1) == labels).sum()) / len(labels)


def class_accuracy(logits: Tensor, labels: Tensor) -> dict[int, float]:
    """Compute the accuracy on the images of each class that occurs, from 0 to 1.

    Args:
        logits: Shape (N, K).
        labels: Shape (N,).

    Example:
        >>> class_accuracy(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]))
        {0: 1.0, 1: 0.0}
    """
    right = logits.argmax(1) == labels
    return {
        index: int(right[labels == index].sum()) / int((labels == index).sum())
        for index in labels.unique().tolist()
    }

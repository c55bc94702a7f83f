"""The classifier head of a network, and the features that go into it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["classifier_head", "penultimate_features"]


def classifier_head(network: nn.Module) -> nn.Linear:
    """Return the layer that turns features into logits: the last linear one.

    Args:
        network: Any classifier that ends with a linear layer.

    Returns:
        The layer itself.

    Raises:
        ValueError: If the network has no linear layer.

    Example:
        >>> classifier_head(nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.Linear(6, 2)))
        Linear(in_features=6, out_features=2, bias=True)
    """
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError(
            "Expected argument `network` to end with a linear layer, its classifier head, but "
            f"{type(network).__name__} has none."
        )
    return layers[-1]


def penultimate_features(network: nn.Module, images: Tensor) -> Tensor:
    """Run a network and return the input of its head.

    Args:
        network: Any classifier that ends with a linear layer.
        images: As the network takes them, shape (N, C, H, W).

    Returns:
        Features of shape (N, F). Gradients flow through them to the images.

    Raises:
        ValueError: If the network has no linear layer, or does not use its last one.

    Example:
        >>> network = nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(4, 2))
        >>> penultimate_features(network, torch.tensor([[[[-1.0, 2.0], [3.0, -4.0]]]]))
        tensor([[0., 2., 3., 0.]])
    """
    seen: list[Tensor] = []

    def keep(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0])

    handle = classifier_head(network).register_forward_pre_hook(keep)
    try:
        network(images)
    finally:
        handle.remove()
    if not seen:
        raise ValueError(
            f"Expected argument `network` to use its last linear layer, but "
            f"{type(network).__name__} does not."
        )
    return torch.flatten(seen[-1], 1)

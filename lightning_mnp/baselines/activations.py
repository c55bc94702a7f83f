"""Activations: what enters the last layer of a network, for each image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_mnp.baselines.workbench import Workbench
from lightning_mnp.surgery.forward import evaluating
from lightning_mnp.surgery.guards import running_alone
from lightning_mnp.surgery.tracing import trace_run

__all__ = ["find_head", "last_activations"]


def find_head(bench: Workbench, layer: str | None = None) -> str:
    """Find the layer that produces the logits.

    Args:
        bench: The network and images.
        layer: Dotted name of the layer to take; found by a run on two images if None.

    Returns:
        Its dotted name.

    Raises:
        ValueError: If there is no layer of the name, or no name is passed and the logits do not
            come from exactly one linear layer or convolution.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> find_head(Workbench(network, [(torch.rand(8, 1, 2, 2), torch.arange(8) % 2)]))
        '2'
    """
    names = [name for name, _ in bench.copy.named_modules() if name]
    if layer is not None:
        if layer not in names:
            raise ValueError(
                f"Expected argument `layer` to name a layer of {type(bench.model).__name__}, but "
                f"got {layer!r}. The last of its layers are {names[-5:]}."
            )
        return layer
    with running_alone(bench.copy):
        tracer, logits = trace_run(bench.copy, bench.sample, bench.call)
    heads = sorted(tracer.makers([logits]))
    if len(heads) != 1 or heads[0] not in names:
        raise ValueError(
            f"Expected the logits of {type(bench.model).__name__} to come from one linear layer "
            f"or convolution, whose input is then what images are compared by, but got {heads}. "
            "Name the layer whose input should be taken with the option `layer`."
        )
    return heads[0]


@torch.no_grad()
def last_activations(bench: Workbench, layer: str | None = None) -> Tensor:
    """Compute what enters the last layer for each image, in evaluation mode.

    Args:
        bench: The network and images.
        layer: Dotted name of the layer whose input is taken; the one that produces the logits if
            None.

    Returns:
        Shape (N, D), float32, on the CPU, in the order of the images. If the layer is a
        convolution, maps are averaged over their pixels.

    Raises:
        ValueError: If the layer is not found, or is not called once for each batch.
        ArithmeticError: If an activation is not finite.

    Example:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> bench = Workbench(network, [(torch.rand(8, 1, 2, 2), torch.arange(8) % 2)])
        >>> last_activations(bench).shape
        torch.Size([8, 3])
    """
    name = find_head(bench, layer)
    head = bench.copy.get_submodule(name)
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        maps, *_ = [*args, *named.values()]
        maps = maps.detach().float()
        caught.append(maps.flatten(2).mean(2) if isinstance(module, _ConvNd) else maps.flatten(1))

    handle = head.register_forward_pre_hook(catch, with_kwargs=True)
    batches = 0
    try:
        with running_alone(bench.copy), evaluating(bench.copy):
            for images, _ in bench.data.batches(bench.batch_size, bench.device):
                bench.logits(bench.copy, images)
                batches += 1
    finally:
        handle.remove()
    if len(caught) != batches or sum(map(len, caught)) != len(bench.data):
        raise ValueError(
            f"Expected the layer {name!r} to be called once for each batch of images, but it was "
            f"called {len(caught)} times for {batches} batches. Name another with the option "
            "`layer`."
        )
    activations = torch.cat(caught).cpu()
    if not bool(torch.isfinite(activations).all()):
        raise ArithmeticError(
            f"Expected what enters the layer {name!r} to be finite, but some values are NaN or "
            "infinite. Check that the images are prepared as in training."
        )
    return activations

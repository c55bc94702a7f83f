"""The stages of a network: where the maps of its last convolutions leave a resolution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_mnp.surgery.forward import Forward, call_network, probe_network

__all__ = ["Stage", "find_stages", "recording"]


@dataclass(frozen=True)
class Stage:
    """A place in a network whose maps are compared.

    Attributes:
        name: Dotted name of the module whose output they are.
        size: Height and width of the maps; other numbers of dimensions have other lengths.

    Example:
        >>> Stage("layer3", (8, 8)).name
        'layer3'
    """

    name: str
    size: tuple[int, ...]


def find_stages(
    network: nn.Module, images: Tensor, forward: Forward = call_network, most: int = 3
) -> list[Stage]:
    """Find the stages of a network by running it once.

    All convolutions whose maps have the same size are a stage. Its output is what leaves the last
    module that ends with maps of this size, from the last of these convolutions on: in a residual
    network the sum of a block after its activation. Maps of a single value (1x1) are no stage:
    there is no place in them to attend to.

    Args:
        network: The network, which does not change.
        images: A few images on its device, shape (N, C, ...).
        forward: A function (network, images) that calls it.
        most: Most stages, the last ones of the run.

    Returns:
        The stages in the order of the run, at least one.

    Raises:
        ValueError: If no convolution has maps of more than one value.

    Example:
        >>> network = nn.Sequential(
        ...     nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 2), nn.Flatten())
        >>> find_stages(network, torch.rand(2, 1, 8, 8))
        [Stage(name='1', size=(6, 6)), Stage(name='3', size=(2, 2))]
    """
    seen: list[tuple[Stage, bool]] = []

    def record(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim > 2 and output.shape[2:].numel() > 1:
            seen.append((Stage(name, tuple(output.shape[2:])), isinstance(module, _ConvNd)))

    with ExitStack() as stack:
        for name, module in network.named_modules():
            stack.callback(module.register_forward_hook(partial(record, name)).remove)
        probe_network(network, images, forward)
    convolved: set[tuple[int, ...]] = set()
    last: dict[tuple[int, ...], Stage] = {}
    for stage, is_convolution in seen:
        if is_convolution:
            convolved.add(stage.size)
        if stage.size in convolved:
            last.pop(stage.size, None)  # so that the stages stand in the order of their ends
            last[stage.size] = stage
    if not last:
        raise ValueError(
            f"Expected a convolution of {type(network).__name__} to have maps of more than one "
            "value, whose attention can be compared, but none has. Use larger images, or a defense "
            "that compares no maps, such as `ft_sam`."
        )
    return list(last.values())[-most:]


@contextmanager
def recording(network: nn.Module, stages: Sequence[Stage]) -> Iterator[dict[Stage, Tensor]]:
    """Keep the maps of some stages in each run of a network, until the context ends.

    Args:
        network: The network.
        stages: The stages, of :func:`find_stages`.

    Yields:
        The maps of the last run by stage, shape (N, C, ...). They are there after a run.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten())
        >>> stage = Stage("0", (2, 2))
        >>> with recording(network, [stage]) as maps:
        ...     logits = network(torch.rand(5, 1, 4, 4))
        >>> maps[stage].shape
        torch.Size([5, 4, 2, 2])
    """
    maps: dict[Stage, Tensor] = {}

    def keep(stage: Stage, module: nn.Module, args: Any, output: Any) -> None:
        # One module may be called at several sizes.
        if isinstance(output, Tensor) and output.shape[2:] == torch.Size(stage.size):
            maps[stage] = output

    with ExitStack() as stack:
        for stage in stages:
            module = network.get_submodule(stage.name)
            stack.callback(module.register_forward_hook(partial(keep, stage)).remove)
        yield maps

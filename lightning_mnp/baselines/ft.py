"""FT, plain fine-tuning on clean images: the floor of every comparison."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_mnp.baselines.result import BaselineResult
from lightning_mnp.baselines.tuning import TuningConfig, tune
from lightning_mnp.baselines.workbench import Workbench
from lightning_mnp.defense_data.defense_set import DefenseSet, Unpack, unpack_batch
from lightning_mnp.surgery.forward import Forward

__all__ = ["FTConfig", "default_ft", "ft"]


@dataclass(frozen=True)
class FTConfig(TuningConfig):
    """The options of plain fine-tuning, see :class:`~lightning_mnp.baselines.TuningConfig`.

    Example:
        >>> FTConfig(epochs=10).lr
        0.01
    """


def ft(
    model: nn.Module,
    loader: Iterable[Any] | DefenseSet,
    *,
    config: FTConfig | None = None,
    forward: Forward | None = None,
    network: str | None = None,
    unpack: Unpack = unpack_batch,
) -> BaselineResult:
    """Fine-tune a copy of a network on clean images; the network itself does not change.

    SGD lowers the cross entropy on shifted and mirrored images, with a learning rate that falls
    along half a cosine. The copy is in training mode: batch normalization takes the statistics of
    each batch, and its stored statistics follow. No filter is pruned. Any network is taken.

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
        The fine-tuned copy. The detail ``loss`` is the mean loss over the last pass.

    Raises:
        ValueError: If the model and the data do not fit each other.
        TypeError: If batches or outputs are of an unknown form.
        ArithmeticError: If the loss or a weight is no longer finite.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> batch = torch.rand(8, 1, 2, 2), torch.arange(8) % 2
        >>> ft(network, [batch], config=FTConfig(epochs=1)).pruned
        []
    """
    config = config or FTConfig()
    bench = Workbench.of(config, model, loader, forward, network, unpack)
    before = bench.accuracy(bench.copy)
    loss = tune(bench, config)
    after = bench.accuracy(bench.copy)
    return BaselineResult(bench.copy, [], [], before, after, {"loss": loss})


def default_ft(network: nn.Module, images: Iterable[Any] | DefenseSet, seed: int) -> BaselineResult:
    """Fine-tune a copy of a network with the default options, as the registry calls it.

    Args:
        network: The network.
        images: Yields batches of clean, labeled images; or a
            :class:`~lightning_mnp.defense_data.defense_set.DefenseSet`.
        seed: Seed of batch order and augmentation.

    Returns:
        The result of :func:`ft`.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> batch = torch.rand(8, 1, 2, 2), torch.arange(8) % 2
        >>> 0 <= default_ft(network, [batch], seed=0).accuracy_after <= 1
        True
    """
    return ft(network, images, config=FTConfig(seed=seed))

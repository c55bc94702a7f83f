"""Plain calls: audit a network, or defend it, without a Trainer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from lightning_mnp.config import MNPConfig, require_config
from lightning_mnp.defense_data.defense_set import DefenseSet, Unpack, unpack_batch
from lightning_mnp.engine.defense import MNPDefense, When
from lightning_mnp.engine.runner import forget_state, run_defense
from lightning_mnp.report import DefenseReport
from lightning_mnp.surgery.forward import Forward
from lightning_mnp.surgery.guards import require_module
from lightning_mnp.surgery.network import check_copy

__all__ = ["audit", "defend"]


def audit(
    model: nn.Module,
    loader: Iterable[Any] | Dataset[Any] | DefenseSet,
    *,
    seed: int | None = None,
    config: MNPConfig | None = None,
    network: str | None = None,
    forward: Forward | None = None,
    unpack: Unpack = unpack_batch,
    state_file: Path | str | None = None,
    progress: bool = False,
) -> DefenseReport:
    """Judge whether a network carries a backdoor; the network stays as it is.

    Args:
        model: The network, or a LightningModule around it, on the device to work on.
        loader: Yields batches of clean, labeled images as the network takes them; a few hundred
            are enough. Or a data set of them, or a
            :class:`~lightning_mnp.defense_data.defense_set.DefenseSet`.
        seed: Replaces the seed of ``config``.
        config: Options.
        network: Dotted name of the submodule that classifies, if the model has no ``forward``.
        forward: A function (network, images) that calls it and returns logits, or something that
            holds them.
        unpack: A function (batch) that gives images and labels.
        state_file: A file in which the progress is kept, so that a killed call goes on where it
            was when it is made again; removed at the end.
        progress: Whether to show a progress bar.

    Returns:
        The report; its ``model`` is None.

    Raises:
        ValueError: If the model, the data and the options do not fit each other.
        TypeError: If batches or outputs are of an unknown form.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> batch = torch.rand(8, 1, 2, 2), torch.arange(8) % 2
        >>> audit(network, [batch], seed=0).verdict in ("clean", "backdoored", "undecided")
        True
    """
    require_module(model, loader)
    data = DefenseSet.from_loader(loader, unpack)
    config = _seeded(config, seed)
    defense = MNPDefense(model, data, config, when="never", network=network, forward=forward)
    run_defense(defense, state_file=state_file, progress=progress)
    report = defense.report()
    forget_state(state_file)
    return report


def defend(
    model: nn.Module,
    loader: Iterable[Any] | Dataset[Any] | DefenseSet,
    *,
    when: When = "flagged",
    seed: int | None = None,
    config: MNPConfig | None = None,
    network: str | None = None,
    forward: Forward | None = None,
    unpack: Unpack = unpack_batch,
    state_file: Path | str | None = None,
    progress: bool = False,
) -> DefenseReport:
    """Audit a network and prune the filters that a backdoor works through, in a copy.

    Args:
        model: See :func:`audit`.
        loader: See :func:`audit`.
        when: ``"flagged"`` prunes if the verdict is backdoored, ``"always"`` in any case,
            ``"never"`` audits only.
        seed: See :func:`audit`.
        config: See :func:`audit`.
        network: See :func:`audit`.
        forward: See :func:`audit`.
        unpack: See :func:`audit`.
        state_file: See :func:`audit`.
        progress: See :func:`audit`.

    Returns:
        The report; its ``model`` is the purified copy, or a plain copy if nothing was pruned.

    Raises:
        ValueError: If the model, the data and the options do not fit each other.
        TypeError: If batches or outputs are of an unknown form.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> batch = torch.rand(8, 1, 2, 2), torch.arange(8) % 2
        >>> options = MNPConfig.paper({"pruning.rule": "count", "pruning.amount": 1})
        >>> report = defend(network, [batch], when="always", config=options)
        >>> len(report.pruned), report.model is network
        (1, False)
    """
    require_module(model, loader)
    config = _seeded(config, seed)
    if when == "never" or not config.pruning.reaudit:  # else the engine does
        check_copy(model)
    data = DefenseSet.from_loader(loader, unpack)
    defense = MNPDefense(model, data, config, when=when, network=network, forward=forward)
    run_defense(defense, state_file=state_file, progress=progress)
    report = defense.report()
    report.model = defense.purified()
    forget_state(state_file)
    return report


def _seeded(config: MNPConfig | None, seed: int | None) -> MNPConfig:
    config = require_config(config)
    return config if seed is None else replace(config, seed=seed)

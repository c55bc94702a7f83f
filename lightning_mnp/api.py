"""Plain calls: audit a network, or defend it, without a Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.errors import LiveError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn
from torch.utils.data import Dataset

from lightning_mnp.archive import CheckpointError, printable
from lightning_mnp.checkpoint import read_checkpoint
from lightning_mnp.config import MNPConfig, require_config
from lightning_mnp.defense import MNPDefense, When
from lightning_mnp.defense_set import DefenseSet, Unpack, unpack_batch
from lightning_mnp.forward import Forward
from lightning_mnp.network import check_copy
from lightning_mnp.output import OutputError, check_writable, write_whole
from lightning_mnp.processes import process_rank
from lightning_mnp.result import DefenseReport

__all__ = ["audit", "defend", "forget_state", "run_defense"]

_MOST_STATE_BYTES = 64 * 2**30  # suppressed weights, gradients and momentum beside the masks


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
    """Tell whether a network carries a backdoor; the network stays as it is.

    Args:
        model: The network, or a LightningModule around it, on the device to work on.
        loader: Yields batches of clean, labeled images as the network takes them; a few hundred
            are enough. Or a data set of them, or a :class:`~lightning_mnp.defense_set.DefenseSet`.
        seed: Replaces the seed of ``config``.
        config: Options.
        network: Dotted name of the submodule that classifies, where the model has no ``forward``.
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
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> batch = torch.rand(8, 1, 2, 2), torch.arange(8) % 2
        >>> audit(network, [batch], seed=0).verdict in ("clean", "backdoored", "undecided")
        True
    """
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
        The report; its ``model`` is the purified copy, or a plain copy where nothing was pruned.

    Raises:
        ValueError: If the model, the data and the options do not fit each other.
        TypeError: If batches or outputs are of an unknown form.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> batch = torch.rand(8, 1, 2, 2), torch.arange(8) % 2
        >>> options = MNPConfig(runs=1, rule="count", amount=1)
        >>> report = defend(network, [batch], when="always", config=options)
        >>> len(report.pruned), report.model is network
        (1, False)
    """
    config = _seeded(config, seed)
    if when == "never" or not config.reaudit:  # else the engine does
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


def run_defense(
    defense: MNPDefense,
    *,
    state_file: Path | str | None = None,
    progress: bool = False,
    observe: Callable[[MNPDefense, str, dict[str, float]], None] | None = None,
    guard: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Take all steps of a defense.

    Args:
        defense: The engine.
        state_file: See :func:`audit`; it stays there until :func:`forget_state`, which is for
            when the outcome is safe.
        progress: Whether to show a progress bar.
        observe: Called after every step with the engine, the step's phase and its numbers.
        guard: Makes a context around the whole.

    Raises:
        ValueError: If the state file belongs to another model, data or options, or is damaged.
        OutputError: If the state file is where no file can be written.
        torch.OutOfMemoryError: If a batch is too large.
    """
    path = None if state_file is None else Path(state_file)
    if path is not None:
        check_writable(path, "state_file")
        if path.exists():
            _load_state(defense, path)
    with guard(), _progress_bar(progress) as bar:
        task = bar.add_task("reference", total=defense.most_steps())
        done = 0
        while not defense.finished:
            phase, position = defense.phase, defense.position
            bar.update(task, description=f"{phase}, run {defense.run + 1}")
            metrics = defense.step()
            done += 1
            bar.update(task, completed=done, total=done + defense.most_steps())
            if observe is not None:
                observe(defense, phase, metrics)
            if path is not None and defense.position != position and process_rank() == 0:
                _save_state(defense, path)


@contextmanager
def _progress_bar(progress: bool) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    bar = Progress(*columns, disable=not progress, transient=True)
    try:
        bar.start()
    except LiveError:  # early versions of rich show one bar at a time, such as Lightning's own
        bar = Progress(*columns, disable=True)
    try:
        yield bar
    finally:
        bar.stop()


def forget_state(state_file: Path | str | None) -> None:
    """Remove a state file whose outcome is no longer needed; None does nothing."""
    if state_file is not None and process_rank() == 0:
        Path(state_file).unlink(missing_ok=True)


def _load_state(defense: MNPDefense, path: Path) -> None:
    try:
        state = read_checkpoint(path, max_bytes=_MOST_STATE_BYTES, argument="state_file")
    except CheckpointError as error:
        if not path.exists():  # the first of several processes has just finished an earlier call
            return
        raise CheckpointError(
            f"Expected argument `state_file` to hold the progress of an earlier call, but: {error} "
            "Remove the file to start anew."
        ) from error
    try:
        defense.load_state_dict(state)
    except torch.OutOfMemoryError:  # not the file's fault
        raise
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"Expected argument `state_file` to hold the progress of an earlier call, but what "
            f"{printable(str(path))} holds is incomplete. Remove the file to start anew."
        ) from error


def _save_state(defense: MNPDefense, path: Path) -> None:
    def write(partial: Path) -> None:
        partial.parent.mkdir(parents=True, exist_ok=True)
        torch.save(defense.state_dict(), partial)

    try:
        write_whole(path, write, argument="state_file", replace=True)
    except OutputError as error:  # hours of work are not given up for it
        warnings.warn(
            f"{error} The run goes on; were it killed, it would go on from the file as it was.",
            stacklevel=2,
        )

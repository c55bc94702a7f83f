"""Taking all steps of a defense, with a progress bar and a file that keeps the progress."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import rich
import torch
from rich.errors import LiveError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lightning_mnp.checkpoints.atomic_write import OutputError, check_writable, write_atomically
from lightning_mnp.checkpoints.inspection import CheckpointError
from lightning_mnp.checkpoints.printable import printable
from lightning_mnp.checkpoints.read import read_checkpoint
from lightning_mnp.engine.defense import MNPDefense
from lightning_mnp.hosting.processes import process_rank

__all__ = ["forget_state", "run_defense"]

_MOST_STATE_BYTES = 64 * 2**30  # suppressed weights, gradients and momentum beside the masks
_SECONDS_OF_A_PICTURE = 0.1


def run_defense(
    defense: MNPDefense,
    *,
    state_file: Path | str | None = None,
    progress: bool = False,
    observe: Callable[[MNPDefense, str, dict[str, float]], None] | None = None,
) -> None:
    """Take all steps of a defense.

    Args:
        defense: The engine.
        state_file: See :func:`audit`; it stays there until :func:`forget_state`, which is for
            when the outcome is safe.
        progress: Whether to show a progress bar, if there is a terminal or a notebook.
        observe: Called after every step with the engine, the step's phase and its numbers.

    Raises:
        ValueError: If the state file belongs to another model, data or options, or is damaged.
        OutputError: If the state file is in a place where no file can be written.
        torch.OutOfMemoryError: If a batch is too large.
    """
    path = None if state_file is None else Path(state_file)
    if path is not None:
        check_writable(path, "state_file")
        if path.exists():
            _load_state(defense, path)
    with _progress_bar(progress) as bar:
        task = bar.add_task("reference", total=defense.most_steps())
        done, drawn, drawn_at = 0, -1, 0.0
        while not defense.finished:
            phase, position = defense.phase, defense.position
            # Drawn from here: within another live display, such as Lightning's RichProgressBar,
            # nothing else draws this bar again.
            due = position != drawn or time.monotonic() >= drawn_at + _SECONDS_OF_A_PICTURE
            bar.update(
                task,
                description=f"{phase}, run {defense.run + 1}",
                completed=done,
                total=done + defense.most_steps(),
                refresh=due,
            )
            if due:
                drawn, drawn_at = position, time.monotonic()
            metrics = defense.step()
            done += 1
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
    console = rich.get_console()
    shown = progress and (console.is_terminal or console.is_jupyter)
    bar = Progress(*columns, disable=not shown, transient=True)
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
        write_atomically(path, write, argument="state_file", replace=True)
    except OutputError as error:  # hours of work are not given up for it
        warnings.warn(
            f"{error} The run goes on; were it killed, it would go on from the file as it was.",
            stacklevel=2,
        )

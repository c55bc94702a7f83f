"""Checks of the checkpoints that Lightning's own commands read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Trainer

from lightning_mnp.checkpoints.inspection import CheckpointError
from lightning_mnp.checkpoints.printable import first_names, printable
from lightning_mnp.checkpoints.read import read_checkpoint
from lightning_mnp.checkpoints.state_dict import check_finite

__all__ = ["CheckedCheckpointIO", "use_checked_io"]

_EXPECTED = (
    "Expected argument `ckpt_path` to be a Lightning checkpoint, with the weights under "
    "`state_dict`"
)
_REMEDY = (
    "For other files use `audit` or `defend`; `defend` writes a Lightning checkpoint if its "
    "`--output` ends in .ckpt."
)


class CheckedCheckpointIO(TorchCheckpointIO):
    """Reads checkpoints only by :func:`~lightning_mnp.checkpoints.read.read_checkpoint`.

    So Lightning's ``fit``, ``validate``, ``test`` and ``predict`` refuse the same files as audits
    and defenses do.

    Example:
        >>> CheckedCheckpointIO().load_checkpoint("missing.ckpt")
        Traceback (most recent call last):
        ...
        lightning_mnp.checkpoints.inspection.CheckpointError: Expected argument `ckpt_path` to be an
        existing file, but got missing.ckpt. Check the name and the folder; this is ...
    """

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a whole Lightning checkpoint to the CPU, always with ``weights_only=True``.

        Args:
            path: A local file.
            map_location: Ignored: the Trainer moves what it reads.
            weights_only: Ignored.

        Returns:
            The content of the file.

        Raises:
            CheckpointError: If the file is refused, has no weights under ``state_dict``, or has
                weights that are not finite or whose names are not printable.
        """
        if Path(path).suffix == ".safetensors":
            raise CheckpointError(f"{_EXPECTED}, but got {printable(str(path))}. {_REMEDY}")
        content = read_checkpoint(path, argument="ckpt_path")
        weights = content.get("state_dict") if isinstance(content, dict) else None
        if not isinstance(weights, dict):
            raise CheckpointError(f"{_EXPECTED}. {_REMEDY}")
        odd = [name for name in weights if not (isinstance(name, str) and name.isprintable())]
        if odd:
            raise CheckpointError(
                f"Expected the weights' names to be printable, but got: {first_names(odd)}."
            )
        check_finite({name: value for name, value in weights.items() if torch.is_tensor(value)})
        return dict(content)


def use_checked_io(trainer: Trainer) -> None:
    """Make a Trainer read checkpoints by :class:`CheckedCheckpointIO`.

    A way of reading that the user has configured stays, because it is the user's own code.

    Args:
        trainer: The Trainer.

    Example:
        >>> trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> use_checked_io(trainer)
        >>> type(trainer.strategy.checkpoint_io).__name__
        'CheckedCheckpointIO'
    """
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = CheckedCheckpointIO()

"""Lightning's own commands read checkpoints under the checks that audits and defenses make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Trainer

from lightning_mnp.checkpoints.inspection import CheckpointError
from lightning_mnp.checkpoints.printable import printable
from lightning_mnp.checkpoints.read import read_checkpoint
from lightning_mnp.checkpoints.state_dict import check_finite, first_names

__all__ = ["CheckedCheckpointIO", "read_checked"]

_EXPECTED = (
    "Expected argument `ckpt_path` to be a Lightning checkpoint, with the weights under "
    "`state_dict`"
)
_REMEDY = (
    "For other files use `audit` or `defend`; `defend` writes a Lightning checkpoint where its "
    "`--output` ends in .ckpt."
)


class CheckedCheckpointIO(TorchCheckpointIO):
    """Reads checkpoints by :func:`~lightning_mnp.checkpoints.read.read_checkpoint` only.

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
        """Read a whole Lightning checkpoint to the CPU, with ``weights_only=True`` in any case.

        Args:
            path: A local file.
            map_location: Ignored: the Trainer moves what it reads.
            weights_only: Ignored.

        Raises:
            CheckpointError: If the file is refused, holds no weights under ``state_dict``, holds
                weights that are not finite, or names that cannot be printed.
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


def read_checked(trainer: Trainer) -> None:
    """Let a Trainer read checkpoints by :class:`CheckedCheckpointIO`.

    A reader that the user has configured stays: it is the user's code.
    """
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = CheckedCheckpointIO()

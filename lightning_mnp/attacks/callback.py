"""A callback that keeps the trigger beside the network."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_mnp.attacks.attack import Attack
from lightning_mnp.attacks.trigger import save_trigger

__all__ = ["TriggerCheckpoint"]


class TriggerCheckpoint(Callback):
    """Write the attack's trigger to a file when training ends.

    The attack is that of the module, ``pl_module.attack``, or else that of the datamodule. In the
    second case, the file also has the indices of the poisoned training images. ``lightning-mnp
    fit`` adds this callback if there is an attack.

    Args:
        path: The file, ending in ``.safetensors``; a file that exists is replaced. By default
            ``trigger.safetensors`` in the folder of the checkpoints, or, without any, in the
            Trainer's ``default_root_dir``.

    Raises:
        ValueError: If the path has another ending, or, when training starts, if there is no
            attack.
    """

    def __init__(self, path: Path | str | None = None) -> None:
        if path is not None and Path(path).suffix != ".safetensors":
            raise ValueError(
                f"Expected argument `path` to end in '.safetensors', but got {str(path)!r}."
            )
        self.path = None if path is None else Path(path)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there is an attack before training starts.

        Args:
            trainer: The Trainer.
            pl_module: The module that is trained.
        """
        if find_attack(trainer, pl_module) is None:
            raise ValueError(
                "Expected TriggerCheckpoint to find an attack as `attack` of the module or of the "
                "datamodule, but there is none. Remove the callback from a training without one."
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file, in the first process only.

        Args:
            trainer: The Trainer.
            pl_module: The module that was trained.
        """
        attack = find_attack(trainer, pl_module)
        trial = getattr(trainer, "fast_dev_run", False)  # set outside of the typed attributes
        if attack is None or trial or not trainer.is_global_zero:
            return
        path = self.path or _folder(trainer) / "trigger.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        datamodule: Any = getattr(trainer, "datamodule", None)
        recorded = getattr(datamodule, "attack", None) is attack
        indices: Tensor | None = datamodule.poisoned_indices if recorded else None
        # Written beside the old file first, which stays if anything goes wrong.
        fresh = path.with_name(f".new-{path.name}")
        fresh.unlink(missing_ok=True)
        save_trigger(fresh, attack, indices)
        os.replace(fresh, path)


def find_attack(trainer: Trainer, pl_module: LightningModule) -> Attack | None:
    """Find the attack of a training.

    Args:
        trainer: The Trainer, with or without a datamodule.
        pl_module: The module.

    Returns:
        The module's attack, the datamodule's, or None.
    """
    for owner in (pl_module, getattr(trainer, "datamodule", None)):
        attack = getattr(owner, "attack", None)
        if isinstance(attack, Attack):
            return attack
    return None


def _folder(trainer: Trainer) -> Path:
    checkpoint = trainer.checkpoint_callback
    folder = getattr(checkpoint, "dirpath", None)
    return Path(folder if folder else trainer.default_root_dir)

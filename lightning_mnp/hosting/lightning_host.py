"""What the callback, the module and the commands ask of the Trainer that they work under."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_mnp.checkpoints.atomic_write import check_writable, write_atomically
from lightning_mnp.defense_data.defense_set import DefenseSet, Unpack
from lightning_mnp.defense_data.names import find_class_names
from lightning_mnp.engine.defense import MNPDefense
from lightning_mnp.hosting.loggers import is_a, run_name
from lightning_mnp.hosting.processes import do_in_first, gather_objects, process_count, process_rank
from lightning_mnp.report import DefenseReport
from lightning_mnp.reporting.files import save_report
from lightning_mnp.surgery.logit_shift import LogitShift

__all__ = [
    "check_host",
    "engine_autocast",
    "find_defense_set",
    "follow_first",
    "output_folder",
    "refuse_other_processes",
    "saved_checkpoints",
    "write_outcome",
]

_SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")
_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


def check_host(trainer: Trainer) -> None:
    """Raise if a Trainer's strategy or precision does not leave the whole float32 network.

    Args:
        trainer: The Trainer.

    Raises:
        MisconfigurationException: If the strategy shards the weights, or the precision is none of
            ``"32-true"``, ``"bf16-mixed"`` and ``"16-mixed"``.
    """
    if is_a(trainer.strategy, *_SHARDED):
        raise MisconfigurationException(
            f"Expected a strategy that keeps the whole network in every process, such as 'auto' "
            f"or 'ddp', but got {type(trainer.strategy).__name__}. Train with it, save the full "
            "weights and call `lightning_mnp.defend` on them."
        )
    precision = trainer.precision_plugin.precision
    if precision not in _PRECISIONS:
        raise MisconfigurationException(
            f"Expected a precision that keeps the weights in float32, {', '.join(_PRECISIONS)}, "
            f"but got {precision}. Train with it, save the weights and call "
            "`lightning_mnp.defend` on the network in float32."
        )


def refuse_other_processes(trainer: Trainer) -> None:
    """Raise if a Trainer's processes are not those that can be asked whether they agree.

    Args:
        trainer: The Trainer, set up.

    Raises:
        MisconfigurationException: If PyTorch's process group has others or does not have them
            all, as with strategies for TPUs, or one device each in a group of several processes.
    """
    if trainer.world_size != process_count():
        raise MisconfigurationException(
            f"Expected the Trainer's processes to be those of PyTorch's process group, as with "
            f"`strategy='ddp'`, but {type(trainer.strategy).__name__} has {trainer.world_size} "
            f"and the group has {process_count()}. Call `lightning_mnp.defend` on the network."
        )


def engine_autocast(trainer: Trainer) -> Callable[[], AbstractContextManager[Any]]:
    """Return the context in which the engine runs the network, by the Trainer's precision.

    Under ``16-mixed`` it is float32: gradients of masks and images are small, float16 needs a
    scale for each of them, and steps that are skipped for a wrong scale would be part of the
    result.
    """
    if trainer.precision_plugin.precision == "16-mixed":
        rank_zero_info("The audit runs in float32: its gradients are too small for 16-mixed.")
        return nullcontext
    return trainer.precision_plugin.forward_context


def find_defense_set(
    trainer: Trainer, module: LightningModule, given: Any, unpack: Unpack
) -> DefenseSet:
    """Read the defense set: as given, or from a ``defense_dataloader`` hook.

    Where there are several processes, all of them have to call this, and all get the images that
    any of them has.

    Args:
        trainer: The Trainer, whose datamodule may have the hook.
        module: The LightningModule, which may have the hook.
        given: A loader or a defense set, or None.
        unpack: Takes images and labels out of a batch.

    Raises:
        MisconfigurationException: If there is neither. The training set is never taken for it:
            it may be the poisoned one.
    """
    if given is None:
        datamodule = getattr(trainer, "datamodule", None)
        hooks = (getattr(owner, "defense_dataloader", None) for owner in (datamodule, module))
        hook = next((hook for hook in hooks if callable(hook)), None)
        if hook is None:
            raise MisconfigurationException(
                "Expected a defense set of clean images, but got none. Give a loader as "
                "`defense_loader`, or add a method `defense_dataloader()` to the datamodule or the "
                "LightningModule. The training set is not used: it may be poisoned."
            )
        given = hook()
    data = DefenseSet.from_loader(given, unpack, gather=True)
    owners = (getattr(trainer, "datamodule", None), module)
    names = next(filter(None, map(find_class_names, owners)), ())
    if names and not data.class_names:
        data = copy.copy(data)  # it may be the user's own
        data.class_names = names
    return data


def output_folder(trainer: Trainer, given: Path | str | None) -> Path:
    """Return where the outcome is written: as given, or where the Trainer writes.

    Where there are several processes, all of them have to call this.

    Args:
        trainer: The Trainer.
        given: A folder; if None, the first logger's, else the Trainer's ``default_root_dir``.

    Raises:
        MisconfigurationException: If it is an address and not a local folder.
        OutputError: If it cannot be written to.
    """
    folder = str(given or trainer.log_dir or trainer.default_root_dir)
    folder = trainer.strategy.broadcast(folder)
    if "://" in folder:
        raise MisconfigurationException(
            f"Expected argument `output_dir` to be a local folder, but the loggers or the Trainer "
            f"write to {folder!r}. Give a local one."
        )
    # As Lightning does for its own files; `Path.expanduser` would raise for a folder `~name`.
    path = Path(os.path.expanduser(folder))
    do_in_first(lambda: check_writable(path / "mnp.ckpt", "output_dir"))
    return path


def saved_checkpoints(trainer: Trainer) -> list[str]:
    """Return the files that a Trainer's checkpoint callbacks name as their best and their last.

    Args:
        trainer: The Trainer.
    """
    names = ("best_model_path", "last_model_path")
    found = [getattr(saver, name, "") for saver in trainer.checkpoint_callbacks for name in names]
    return list(dict.fromkeys(path for path in found if path))


class _WholeWeights(TorchCheckpointIO):
    """Saves the weights that the Trainer's module has, whatever its own hooks put in their place.

    A hook of the module comes last when Lightning makes a checkpoint. It may put an average in
    place that still has the backdoor, or keep the last layer only.

    Args:
        trainer: The Trainer.
        changed: Names of weights that have to be in the file.
    """

    def __init__(self, trainer: Trainer, changed: set[str]) -> None:
        super().__init__()
        self.trainer = trainer
        self.changed = changed

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        weights = self.trainer.strategy.lightning_module_state_dict()
        hooked = checkpoint["state_dict"]
        # A hook that leaves some out, such as an attack's generator, may do so.
        left_out = set() if hooked.keys() - weights else weights.keys() - hooked - self.changed
        kept = {name: value for name, value in weights.items() if name not in left_out}
        super().save_checkpoint({**checkpoint, "state_dict": kept}, path, storage_options)


def write_outcome(
    trainer: Trainer, report: DefenseReport, folder: Path, changed: Collection[str] = ()
) -> tuple[Path, Path | None]:
    """Write the report and, if the network was changed, a checkpoint of what the Trainer trained.

    The files are ``mnp-report.html``, ``mnp-report.json`` and ``mnp.ckpt``, or, if one of the names
    is taken, ``mnp-v1-report.html`` and so on. A run of MLflow or W&B is part of the names, if it
    is not part of the folder. Where there are several processes, all of them have to call this,
    and the first writes.

    Args:
        trainer: The Trainer, whose LightningModule holds the purified network meanwhile.
        report: The report.
        folder: Where to write.
        changed: Names of the weights of the module that were changed.

    Returns:
        The page of the report, and the file of the checkpoint, or None if nothing was changed.

    Raises:
        OutputError: If a file cannot be written; there is no partial one then.
    """
    first = name = run_name(trainer.loggers, folder)
    number, endings = 0, ("-report.html", "-report.json", ".ckpt")
    while any((folder / f"{name}{ending}").exists() for ending in endings):
        number += 1
        name = f"{first}-v{number}"
    name = trainer.strategy.broadcast(name)
    page, numbers, purified = (folder / f"{name}{ending}" for ending in endings)
    for path in (page, numbers):
        do_in_first(partial(save_report, report, path, argument="output_dir"))
    if not report.changes:
        return page, None
    unfinished = folder / f".{name}.ckpt.unfinished"
    # The user's own way of saving may be to another place, or later.
    users = trainer.strategy.checkpoint_io
    trainer.strategy.checkpoint_io = _WholeWeights(trainer, set(changed))
    try:
        trainer.save_checkpoint(unfinished, weights_only=False)
        do_in_first(lambda: _publish(unfinished, purified))
    finally:
        trainer.strategy.checkpoint_io = users
        if trainer.is_global_zero:
            unfinished.unlink(missing_ok=True)
    return page, purified


def _publish(finished: Path, path: Path) -> None:
    def write(partial: Path) -> None:
        finished.replace(partial)

    write_atomically(path, write, argument="output_dir")


def follow_first(defense: MNPDefense) -> DefenseReport:
    """Take the first process's outcome, so that rounding cannot part the processes.

    Args:
        defense: The engine, finished; it is told which filters to remove, the masks of the kernels,
            the tuned weights, and the repair.

    Returns:
        The first process's report.
    """
    # Not a broadcast, which would not tell that another process has died.
    own = defense.purification.changes
    bias = None if own.shift is None else own.shift.name
    first = process_rank() == 0  # of the others, nothing is taken
    masks = own.kernel_masks.cpu() if first and own.kernel_masks is not None else None
    tuned = None
    if first and own.tuned is not None:
        tuned = {name: weight.cpu() for name, weight in own.tuned.items()}
    outcome = own.removed.tolist(), bias, masks, tuned, defense.report()
    removed, bias, masks, tuned, report = gather_objects(outcome)[0]
    # In double precision, as the report has the numbers: the default type could round them.
    shift = torch.tensor(report.pruning.shift, dtype=torch.float64)
    own.shift = None if bias is None else LogitShift(bias, shift)
    device = own.removed.device
    own.removed = torch.tensor(removed, dtype=torch.long, device=device)
    own.kernel_masks = None if masks is None else masks.to(device)
    own.tuned = None if tuned is None else {k: v.to(device) for k, v in tuned.items()}
    return cast(DefenseReport, report)

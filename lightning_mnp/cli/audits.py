"""Audits of checkpoints: one in this process, or several at a time in others."""

from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer

from lightning_mnp.benchmark.executors import Executor, HereExecutor
from lightning_mnp.benchmark.jobs import Job, run_jobs
from lightning_mnp.calibration.run import TimedReport
from lightning_mnp.checkpoints.load import PrefixMatch, load_into
from lightning_mnp.checkpoints.read import read_weights
from lightning_mnp.checkpoints.state_dict import check_finite
from lightning_mnp.config import MNPConfig
from lightning_mnp.defense_data.defense_set import DefenseSet
from lightning_mnp.engine.defense import MNPDefense, When
from lightning_mnp.engine.runner import run_defense
from lightning_mnp.hosting.lightning_host import engine_autocast

__all__ = ["FileAudit", "audit_elsewhere", "audit_files", "load_file", "new_defense"]


def load_file(
    model: LightningModule, path: Path, key: str | None, argument: str = "ckpt_path"
) -> tuple[PrefixMatch, list[str]]:
    """Load the weights in a file into a model.

    Args:
        model: The model.
        path: The file.
        key: Where in the file the weights are; None to look for them.
        argument: Name of the argument that names the file, for messages.

    Returns:
        How their names differ from the model's, and what to say of the file.

    Raises:
        CheckpointError: If the file cannot be read, or holds the weights of another network.
    """
    weights = read_weights(path, key=key, argument=argument)
    check_finite(weights.tensors)
    return load_into(model, weights.tensors), weights.warnings()


def new_defense(
    trainer: Trainer,
    model: LightningModule,
    data: DefenseSet,
    config: MNPConfig,
    network: str | None,
    when: When = "never",
) -> MNPDefense:
    """Begin a defense on the device and with the precision of a Trainer.

    Args:
        trainer: The Trainer.
        model: The model, its weights loaded.
        data: The defense set.
        config: Options.
        network: Name of the submodule that classifies; None for the model itself.
        when: See :class:`~lightning_mnp.engine.defense.MNPDefense`.
    """
    return MNPDefense(
        model.to(trainer.strategy.root_device),
        data,
        config,
        when=when,
        network=network,
        autocast=engine_autocast(trainer),
    )


@dataclass(frozen=True)
class FileAudit:
    """What the audits of several files share.

    Attributes:
        model: The model that the weights belong to.
        data: The defense set.
        config: Options.
        key: Where in the files the weights are; None to look for them.
        network: Name of the submodule that classifies; None for the model itself.
    """

    model: LightningModule
    data: DefenseSet
    config: MNPConfig
    key: str | None = None
    network: str | None = None

    def carry_out(self, file: str, trainer: Trainer) -> TimedReport:
        """Audit the network in a file.

        Args:
            file: Name of the file.
            trainer: Says on which device, with which precision, and whether with a bar.
        """
        started = time.perf_counter()
        load_file(self.model, Path(file), self.key, "ckpt_paths")
        defense = new_defense(trainer, self.model, self.data, self.config, self.network)
        run_defense(defense, progress=trainer.progress_bar_callback is not None)
        return TimedReport(defense.report(), time.perf_counter() - started)


def audit_elsewhere(audit: FileAudit, accelerator: str, precision: str, file: str) -> TimedReport:
    """Audit the network in a file in a process that has no Trainer yet.

    Args:
        audit: What it shares with others. A tensor that is sent to processes is one that they
            share, so weights are loaded into a copy of the model.
        accelerator: Lightning's name of the kind of device.
        precision: Lightning's name of the precision.
        file: Name of the file.
    """
    trainer = Trainer(
        accelerator=accelerator,
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return replace(audit, model=copy.deepcopy(audit.model)).carry_out(file, trainer)


def audit_files(
    audit: FileAudit, files: Sequence[str], trainer: Trainer, executor: Executor
) -> Iterator[tuple[str, TimedReport | Exception]]:
    """Audit the networks in files, as many at a time as an executor does.

    Args:
        audit: What they share.
        files: Names of the files.
        trainer: Does the work if it is done in this process; otherwise others do it like this one.
        executor: Where work is done.

    Yields:
        Each file with its report, or with the error that ended the audit, as they finish.

    Raises:
        ValueError: If the model cannot be sent to other processes.
    """
    if isinstance(executor, HereExecutor):
        jobs = [Job(file, 0.0, audit.carry_out, (file, trainer)) for file in files]
    else:
        like = trainer.strategy.root_device.type, str(trainer.precision_plugin.precision)
        _check_portable(audit)
        jobs = [Job(file, 0.0, audit_elsewhere, (audit, *like, file)) for file in files]
    for job, result in run_jobs(jobs, executor):
        yield job.name, result


def _check_portable(audit: FileAudit) -> None:
    try:
        pickle.dumps(audit)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            "Expected a model that can be sent to other processes (option `jobs`), but got one "
            f"that cannot: {error}. Leave `jobs` and `executor` out."
        ) from error

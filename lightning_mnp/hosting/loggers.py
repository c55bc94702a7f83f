"""Loggers: the outcome as numbers, pictures and files, by each logger's own way."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_mnp.report import DefenseReport
from lightning_mnp.reporting import html, markdown
from lightning_mnp.reporting.pictures import pictures

__all__ = ["is_a", "log_files", "log_outcome", "run_name"]


def is_a(thing: object, *names: str) -> bool:
    """Return whether a thing is of a class of one of these names, from whatever package.

    The same classes exist in ``lightning`` and in ``pytorch_lightning``, and neither knows of the
    other's.

    Args:
        thing: Any object.
        names: Names of classes.

    Example:
        >>> is_a(True, "int"), is_a("a", "int")
        (True, False)
    """
    return any(base.__name__ in names for base in type(thing).__mro__)


def log_outcome(
    loggers: Sequence[Any],
    report: DefenseReport,
    step: int,
    rates: Mapping[str, float] | None = None,
) -> None:
    """Log the numbers, the verdict as a word, and the pictures.

    TensorBoard gets images and the report as text, W&B images and the page, MLflow images and
    tags, a CSV logger files in its folder. All others get the numbers.

    Args:
        loggers: The loggers, of the first process.
        report: The outcome.
        step: The Trainer's global step.
        rates: Further numbers, such as CA and ASR.
    """
    drawn = pictures(report) if loggers else {}
    for logger in loggers:
        logger.log_metrics({**report.metrics(), **(rates or {})}, step=step)
        if is_a(logger, "TensorBoardLogger"):
            logger.experiment.add_text("mnp/report", markdown(report), step)
            for name, picture in drawn.items():
                array = np.asarray(picture)
                logger.experiment.add_image(f"mnp/{name}", array, step, dataformats="HWC")
        elif is_a(logger, "WandbLogger"):
            import wandb  # there, since its logger is

            shown = {f"mnp/{name}": wandb.Image(picture) for name, picture in drawn.items()}
            logger.experiment.log({**shown, "mnp/report": wandb.Html(html(report))})
            logger.experiment.summary["mnp/verdict"] = report.verdict
        elif is_a(logger, "MLFlowLogger"):
            logger.experiment.set_tag(logger.run_id, "mnp.verdict", report.verdict)
            for name, picture in drawn.items():
                logger.experiment.log_image(logger.run_id, np.asarray(picture), f"mnp/{name}.png")
        elif is_a(logger, "CSVLogger"):
            folder = Path(logger.log_dir)
            folder.mkdir(parents=True, exist_ok=True)
            for name, picture in drawn.items():
                picture.save(folder / f"mnp-{_plain(name)}.png")


def log_files(loggers: Sequence[Any], files: Sequence[Path]) -> None:
    """Keep the files of a report as artifacts of the runs of MLflow and W&B.

    Args:
        loggers: The loggers, of the first process.
        files: Existing files.
    """
    for logger in loggers:
        if is_a(logger, "MLFlowLogger"):
            for path in files:
                logger.experiment.log_artifact(logger.run_id, str(path), "mnp")
        elif is_a(logger, "WandbLogger"):
            import wandb  # there, since its logger is

            artifact = wandb.Artifact(f"mnp-report-{logger.experiment.id}", type="report")
            for path in files:
                artifact.add_file(str(path))
            logger.experiment.log_artifact(artifact)


def run_name(loggers: Sequence[Any], folder: Path) -> str:
    """Return what the files of a run begin with: ``mnp``, and the run if the folder does not say.

    Args:
        loggers: The loggers.
        folder: Where the files are written.
    """
    for logger in loggers:
        if is_a(logger, "MLFlowLogger", "WandbLogger"):
            run = _plain(str(logger.version))
            return "mnp" if run in folder.parts else f"mnp-{run}"
    return "mnp"


def _plain(name: str) -> str:
    """Return a name that can be part of a file's name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name)[:60]

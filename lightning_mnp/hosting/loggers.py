"""Loggers: the outcome as numbers, pictures, curves and files, by each logger's own way."""

from __future__ import annotations

import csv
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_mnp.report import DefenseReport
from lightning_mnp.reporting import html, markdown
from lightning_mnp.reporting.curves import harm_curve, suppression_curves, trace_curves
from lightning_mnp.reporting.pictures import mask_values, pictures

__all__ = ["is_a", "log_outcome", "run_name"]

_MOST_AT_ONCE = 1000  # numbers that MLflow takes in one call
_HISTOGRAM = "mnp/masks"


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
    """Log the numbers, the verdict as a word, pictures, curves, masks and the report.

    TensorBoard gets the report as text, W&B as a page. W&B and MLflow keep page and JSON as
    artifacts of their run. These three get curves as numbers with steps of their own: passes of
    clean suppression from 1, or pruned filters from 0. A CSV logger gets pictures and curves as
    files in its folder. All others get the numbers. Numbers that are not finite are left out.

    Args:
        loggers: The loggers, of the first process.
        report: The outcome.
        step: The Trainer's global step.
        rates: Further numbers, such as CA and ASR.

    Raises:
        Exception: What the first logger that failed has raised, after all others.
    """
    numbers = {
        name: value
        for name, value in {**report.metrics(), **(rates or {})}.items()
        if math.isfinite(value)
    }
    failures: list[Exception] = []
    for logger in loggers:
        try:
            for kind, log in _OWN_WAYS.items():
                if is_a(logger, kind):
                    log(logger, report, step)
            logger.log_metrics(numbers, step=step)
            logger.save()  # outside of a fit, nobody else does
        except Exception as failure:
            failures.append(failure)
    if failures:
        raise failures[0]


def _log_to_tensorboard(logger: Any, report: DefenseReport, step: int) -> None:
    logger.experiment.add_text("mnp/report", markdown(report), step)
    for name, picture in _pictures(report).items():
        logger.experiment.add_image(name, np.asarray(picture), step, dataformats="HWC")
    if masks := mask_values(report):
        logger.experiment.add_histogram(_HISTOGRAM, np.asarray(masks), step)
    for number, values in _by_number(report).items():
        logger.log_metrics(values, step=number)


def _log_to_wandb(logger: Any, report: DefenseReport, step: int) -> None:
    import wandb  # there, since its logger is

    for number, values in _by_number(report).items():
        logger.log_metrics(values, step=number)
    shown = {name: wandb.Image(picture) for name, picture in _pictures(report).items()}
    if masks := mask_values(report):
        shown[_HISTOGRAM] = wandb.Histogram(masks)
    page = html(report)
    logger.experiment.log({**shown, "mnp/report": wandb.Html(page)})
    logger.experiment.summary["mnp/verdict"] = report.verdict
    artifact = wandb.Artifact(f"mnp-report-{logger.experiment.id}", type="report")
    for name, content in (("report.html", page), ("report.json", report.to_json())):
        with artifact.new_file(name, mode="w", encoding="utf-8") as file:
            file.write(content)
    logger.experiment.log_artifact(artifact)


def _log_to_mlflow(logger: Any, report: DefenseReport, step: int) -> None:
    from mlflow.entities import Metric  # there, since its logger is

    client, run, now = logger.experiment, logger.run_id, int(1000 * time.time())
    client.set_tag(run, "mnp.verdict", report.verdict)
    for name, picture in pictures(report).items():
        client.log_image(run, np.asarray(picture), f"mnp/{_plain(name)}.png")
    points = [Metric(name, value, now, number) for name, number, value in _points(report)]
    for start in range(0, len(points), _MOST_AT_ONCE):
        client.log_batch(run, metrics=points[start : start + _MOST_AT_ONCE])
    client.log_text(run, html(report), "mnp/report.html")
    client.log_text(run, report.to_json(), "mnp/report.json")


def _log_to_csv(logger: Any, report: DefenseReport, step: int) -> None:
    if "://" in str(logger.log_dir):
        return  # files are written to local folders only
    folder = Path(logger.experiment.log_dir)  # made now, before files are in it
    for name, picture in pictures(report).items():
        picture.save(folder / f"mnp-{_plain(name)}.png")
    if points := list(_points(report)):
        with (folder / "mnp-curves.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("curve", "number", "value"), *points])


_OWN_WAYS = {
    "TensorBoardLogger": _log_to_tensorboard,
    "WandbLogger": _log_to_wandb,
    "MLFlowLogger": _log_to_mlflow,
    "CSVLogger": _log_to_csv,
}


def _pictures(report: DefenseReport) -> dict[str, Any]:
    """Return the pictures for loggers that draw histograms by themselves."""
    return {f"mnp/{name}": each for name, each in pictures(report).items() if name != "masks"}


def _points(report: DefenseReport) -> Iterator[tuple[str, int, float]]:
    """Yield the name of a curve, a pass or a number of filters, and the value there."""
    counts = report.pruning.counts
    curves: list[tuple[str, Sequence[int], Sequence[float]]] = [
        *(
            (f"accuracy-{run}", range(1, len(values) + 1), values)
            for run, values in suppression_curves(report).items()
        ),
        *((f"left-{name}", counts, values) for name, values in trace_curves(report).items()),
        ("harm", counts, harm_curve(report)),
    ]
    for name, numbers, values in curves:
        for number, value in zip(numbers, values, strict=False):
            if math.isfinite(value):
                yield f"mnp/curve/{_plain(name)}", number, value


def _by_number(report: DefenseReport) -> dict[int, dict[str, float]]:
    """Return the values of all curves by pass or number of filters, in their order."""
    found: dict[int, dict[str, float]] = {}
    for name, number, value in _points(report):
        found.setdefault(number, {})[name] = value
    return dict(sorted(found.items()))


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

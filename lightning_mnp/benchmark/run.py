"""The run of a benchmark: train what is missing, measure what is missing, keep each result."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lightning_mnp.benchmark.code_version import code_version
from lightning_mnp.benchmark.executors import Executor
from lightning_mnp.benchmark.grid import Cell
from lightning_mnp.benchmark.jobs import Job, run_jobs
from lightning_mnp.benchmark.machine import Meter, describe_machine
from lightning_mnp.benchmark.networks import Fit, NetworkFolder, training_version, using_threads
from lightning_mnp.benchmark.recipe import NetworkRecipe
from lightning_mnp.benchmark.records import SCHEMA, cell_file, read_cells, write_json
from lightning_mnp.hosting.memory import is_out_of_memory

__all__ = ["Places", "Summary", "cell_version", "run_benchmark", "run_cell"]

_TRACE_LINES = 8


@dataclass(frozen=True)
class Places:
    """Where a benchmark reads and writes.

    Attributes:
        results: Folder of the results, a file for each cell.
        networks: Folder of the trained networks.
        data: Folder of the images; as configured if None.
    """

    results: Path
    networks: Path
    data: Path | None = None


@dataclass
class Summary:
    """What a run has done.

    Attributes:
        kept: Cells that had a result already.
        done: Cells that were measured.
        failed: Cells whose result is an error.
        left: Cells that did not fit into the budget.
    """

    kept: int = 0
    done: int = 0
    failed: int = 0
    left: int = 0

    def __str__(self) -> str:
        told = [f"{self.done} cells measured", f"{self.kept} kept"]
        told += [f"{self.failed} failed"] if self.failed else []
        told += [f"{self.left} left, which did not fit into the budget"] if self.left else []
        return ", ".join(told)


def cell_version(cell: Cell) -> str:
    """Return the version of the code that a cell's result depends on.

    It covers the training of the network, the method and the metrics, with all that they import;
    not the documentation, other methods or the benchmark itself, although that draws the clean
    images (whoever changes ``benchmark.images`` so that it draws others has to measure anew).

    Args:
        cell: The cell.
    """
    modules = [*cell.method.modules(cell.task), "lightning_mnp.metrics.success"]
    return f"{training_version(cell.network)}-{code_version(modules)}"


def run_cell(
    cell: Cell, places: Places, threads: int = 1, any_code: bool = False
) -> dict[str, Any]:
    """Measure one cell.

    Args:
        cell: The cell, whose network is trained.
        places: Where things are.
        threads: Threads to compute with.
        any_code: Whether a network that other code has trained will do.

    Returns:
        The content of its file. If the method fails, its status is ``"failed"`` and it has the
        error in place of figures.
    """
    with using_threads(threads):
        content = _head(cell)
        try:
            content.update(_measured(cell, places, any_code))
        except Exception as error:
            content.update(_failure(error))
        return content


def _head(cell: Cell) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "cell": cell.described(),
        "digest": cell.digest,
        "code": cell_version(cell),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": describe_machine(cell.network.device),
    }


def _failure(error: BaseException) -> dict[str, Any]:
    trace = traceback.format_exception(error)
    lines = "".join(trace).splitlines()[-_TRACE_LINES:]
    kind = "OutOfMemoryError" if is_out_of_memory(error) else type(error).__name__
    return {"status": "failed", "error": {"type": kind, "message": str(error), "trace": lines}}


def _measured(cell: Cell, places: Places, any_code: bool) -> dict[str, Any]:
    folder = NetworkFolder(places.networks, cell.network, any_code)
    images, network = folder.images(places.data), folder.load()
    trained = folder.figures() or {}
    before = {"CA": trained.get("CA"), "ASR": trained.get("ASR")}
    if trained.get("test_images") != cell.test_images:
        before = images.test(cell.test_images).measure(network, cell.network.device)
    clean = images.defense_set(cell.size, cell.seed)
    kind = cell.suspect_kind
    suspects = None if kind is None else images.suspects(kind, cell.suspects, cell.seed)
    with Meter(network, cell.network.device) as meter:
        if cell.task == "defense":
            outcome = cell.method.defend(network, clean, cell.seed)
        else:
            outcome = cell.method.detect(network, clean, cell.seed, suspects)
    after = None
    if outcome.model is not None:
        after = images.test(cell.test_images).measure(outcome.model, cell.network.device)
    return {
        "status": "done",
        "before": before,
        "after": after,
        "verdict": outcome.verdict,
        "target_class": outcome.target_class,
        "score": outcome.score,
        "pruned": len(outcome.pruned),
        "pruned_filters": outcome.pruned,
        "details": outcome.details,
        "seconds": meter.seconds,
        "passes": meter.passes if outcome.passes is None else outcome.passes,
        "peak_mib": meter.peak_mib,
        "start_mib": meter.start_mib,
        "suspects": 0 if suspects is None else len(suspects),
        "training": {
            name: trained.get(name) for name in ("seconds", "weights_sha256", "code", "machine")
        },
    }


def _train(
    folder: NetworkFolder, fit: Fit, data: Path | None, test_images: int | None, threads: int
) -> dict[str, Any]:
    with using_threads(threads):
        return folder.train(fit, data, test_images)


def run_benchmark(
    cells: Sequence[Cell],
    places: Places,
    executor: Executor,
    fit: Fit,
    *,
    budget: float | None = None,
    threads: int = 1,
    any_code: bool = False,
    say: Callable[[str, int, int], None] | None = None,
) -> Summary:
    """Measure all cells that have no result yet.

    A result is kept if the same code would measure it again; with ``any_code``, in any case. A
    cell that has failed is tried again, and a failure replaces no earlier result. Networks are
    trained when the first of their cells comes.

    Args:
        cells: The cells, in the order in which they are measured.
        places: Where things are.
        executor: Does the work.
        fit: Trains a network; other processes must be able to import it.
        budget: Seconds in all; what would take longer is not begun. None for no limit.
        threads: Threads of each piece of work.
        any_code: Whether results and networks of other code are kept.
        say: Called before the first piece of work and after each with a line, the number of pieces
            that are done and the number of all.

    Returns:
        How many cells were measured, kept and so on.
    """
    known, summary = read_cells(places.results), Summary()
    missing = [cell for cell in cells if not _is_kept(cell, known.get(cell.name), any_code)]
    summary.kept = len(cells) - len(missing)
    jobs = _jobs(missing, places, fit, threads, any_code, list(known.values()))
    if say is not None:
        say(f"{summary.kept} of {len(cells)} cells are there", 0, len(jobs))
    started, left = time.monotonic(), {cell.name: cell for cell in missing}
    for number, (job, result) in enumerate(run_jobs(jobs, executor, budget), 1):
        line = _told(job, result)
        if job.name in left:
            cell = left.pop(job.name)
            if isinstance(result, BaseException):  # of the training, or of the process
                result = {**_head(cell), **_failure(result)}
            result["at_a_time"] = executor.slots  # cells beside each other slow each other down
            failed = _has_failed(result)
            before = known.get(cell.name)
            if not (failed and before is not None and before["status"] == "done"):
                write_json(cell_file(places.results, cell.name), result)
            summary.failed, summary.done = summary.failed + failed, summary.done + (not failed)
        if say is not None:
            say(f"{line} ({time.monotonic() - started:.0f} s)", number, len(jobs))
    summary.left = len(left)
    return summary


def _is_kept(cell: Cell, content: dict[str, Any] | None, any_code: bool) -> bool:
    if content is None or content["status"] != "done":
        return False
    return any_code or content["code"] == cell_version(cell)


def _jobs(
    cells: Sequence[Cell],
    places: Places,
    fit: Fit,
    threads: int,
    any_code: bool,
    known: Sequence[dict[str, Any]],
) -> list[Job]:
    """Return a job for each cell, behind those that train its networks."""
    jobs: dict[str, Job] = {}

    def train(folder: NetworkFolder, cell: Cell) -> tuple[str, ...]:
        if folder.figures() is not None:
            return ()
        name = folder.recipe.name
        if name not in jobs:
            needs = () if folder.clean is None else train(folder.clean, cell)
            arguments = (folder, fit, places.data, cell.test_images, threads)
            kind = f"train/{folder.recipe.attack}-{folder.recipe.network}"
            seconds = _usual(
                each["training"]["seconds"]
                for each in known
                if _is_alike(each, folder.recipe, "attack", "epochs")
            )
            jobs[name] = Job(name, seconds, _train, arguments, kind, needs)
        return (name,)

    for cell in cells:
        needs = train(NetworkFolder(places.networks, cell.network, any_code), cell)
        arguments = (cell, places, threads, any_code)
        kind = f"cell/{cell.task}-{cell.method.label}-{cell.network.network}"
        seconds = _usual(
            each["seconds"]
            for each in known
            if _is_alike(each, cell.network)
            and (each["cell"]["task"], each["cell"]["label"]) == (cell.task, cell.method.label)
        )
        jobs[cell.name] = Job(cell.name, seconds, run_cell, arguments, kind, needs, _has_failed)
    return list(jobs.values())


def _has_failed(content: dict[str, Any]) -> bool:
    return bool(content["status"] == "failed")


def _is_alike(content: dict[str, Any], recipe: NetworkRecipe, *further: str) -> bool:
    """Return whether a result tells how long work on a network takes: same device, same shape."""
    if content["status"] != "done":
        return False
    network, own = content["cell"]["network"], recipe.described()
    names = ("device", "architecture", "width", "data", *further)
    return all(network[name] == own[name] for name in names)


def _usual(seconds: Any) -> float:
    return max((float(each) for each in seconds if each is not None), default=0.0)


def _told(job: Job, result: Any) -> str:
    if isinstance(result, BaseException):
        return f"{job.name}: {type(result).__name__}: {result}"
    if "status" not in result:
        return f"{job.name}: trained, {_percent(result)}"
    if result["status"] == "failed":
        return f"{job.name}: {result['error']['type']}: {result['error']['message']}"
    figures = [_percent(result["after"])] if result["after"] else []
    figures += [str(result["verdict"])] if result["verdict"] else []
    return f"{job.name}: {', '.join(figures)}, {result['seconds']:.1f} s"


def _percent(figures: dict[str, Any]) -> str:
    asr = "" if figures["ASR"] is None else f", ASR {100 * figures['ASR']:.1f}"
    return f"CA {100 * figures['CA']:.1f}{asr}"

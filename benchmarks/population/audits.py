"""Audit the networks of the population, and keep one small file for each audit."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning_mnp
from benchmarks.population.conditions import USUAL, Condition, condition_set
from benchmarks.population.data import defense_set, load_images
from benchmarks.population.recipes import Recipe
from benchmarks.population.split import split_of
from benchmarks.population.training import load_network, read_row
from lightning_mnp import MNPConfig
from lightning_mnp.benchmark.code_version import undocumented
from lightning_mnp.benchmark.records import read_json, write_json

__all__ = [
    "RESULTS",
    "audit_network",
    "code_version",
    "network_fields",
    "outcome_file",
    "read_audits",
    "read_outcomes",
    "result_file",
]

RESULTS = Path(__file__).parents[1] / "results" / "population"

# What decides on a verdict, without what trains, attacks, prunes and prints.
_ROOMS = ("config", "defense_data", "engine", "mnp", "signals", "surgery")


@functools.cache
def code_version(*more: str) -> str:
    """Return a digest of the code that decides on verdicts, twelve hexadecimal digits.

    Comments, docstrings and line breaks have no part in it. The code is read once in a process:
    what is edited later is not what this process runs.

    Args:
        more: Further folders of the package that have a part in what is measured.
    """
    found = hashlib.sha256()
    package = Path(lightning_mnp.__file__).parent
    for room in (*_ROOMS, *more):
        for file in sorted((package / room).rglob("*.py")):
            found.update(file.relative_to(package).as_posix().encode() + b"\0")
            found.update(undocumented(file.read_text("utf-8")).encode())
    return found.hexdigest()[:12]


def result_file(
    recipe: Recipe, number: int, results: Path = RESULTS, condition: Condition = USUAL
) -> Path:
    """Return where the audit of a network with a defense set is kept.

    Args:
        recipe: How the network was trained.
        number: Number of the defense set, from 0.
        results: Folder of all audits.
        condition: What the defense set is like.
    """
    if condition != USUAL:
        return results / "conditions" / f"{recipe.name}-{condition.name}-set{number}.json"
    return results / f"{recipe.name}-set{number}.json"


def audit_network(
    recipe: Recipe,
    number: int,
    root: Path,
    folder: Path,
    results: Path = RESULTS,
    config: MNPConfig | None = None,
    condition: Condition = USUAL,
) -> dict[str, Any]:
    """Audit a trained network with one defense set, and write what was found.

    Args:
        recipe: How the network was trained.
        number: Number of the defense set, from 0; also the audit's seed.
        root: Folder with the data sets.
        folder: Where networks are kept.
        results: Where audits are kept.
        config: Options; the defaults if None. Its seed is replaced.
        condition: What the defense set is like.

    Returns:
        What the file has: the network's figures, verdict, signals with the value of each class,
        suppression runs, costs, and the version of the code.
    """
    network, row = load_network(recipe, folder), read_row(recipe, folder)
    images = load_images(recipe.data, root, folder / "data")
    if condition == USUAL:
        data = defense_set(recipe, images, number)
    else:
        data = condition_set(recipe, images, number, condition, network, folder)
    version = code_version()  # before the work: of the code that does it
    started = time.process_time(), time.perf_counter()
    report = lightning_mnp.audit(network, data, seed=number, config=config)
    spent = time.process_time() - started[0], time.perf_counter() - started[1]
    told = report.to_dict()
    kept = (
        *("verdict", "judged", "score", "target_class", "all_to_all", "detection_ratio"),
        *("accuracy_before", "warnings", "rare_classes", "filters", "seconds"),
    )
    content: dict[str, Any] = {
        "network": recipe.name,
        "set": number,
        "condition": condition.name,
        **network_fields(recipe, row),
        "version": version,
        "images": len(data),
        "processor_seconds": round(spent[0], 1),
        "wall_seconds": round(spent[1], 1),
        "passes": sum(report.passes.values()),
        **{key: told[key] for key in kept},
        "runs": told["runs"],
        "signals": [
            {key: value for key, value in signal.items() if key != "reason"}
            for signal in told["signals"]
        ],
    }
    write_json(result_file(recipe, number, results, condition), content)
    return content


def network_fields(recipe: Recipe, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what every result says of the network itself.

    Args:
        recipe: How the network was trained.
        row: What was measured of it.
    """
    return {
        "split": split_of(recipe.architecture, recipe.seed),
        "architecture": recipe.architecture,
        "kind": recipe.kind,
        "target": recipe.target,
        "poison": recipe.poison,
        **{key: row[key] for key in ("CA", "ASR", "learned", "weights_sha256")},
    }


def outcome_file(
    kind: str, recipe: Recipe, number: int, method: str, results: Path = RESULTS
) -> Path:
    """Return where the outcome of a method on a network is kept.

    Args:
        kind: The folder beside the audits: ``"defended"``, ``"detected"`` or ``"retuned"``.
        recipe: How the network was trained.
        number: Number of the defense set, from 0.
        method: Name of a defense, an ablation, a detector or a control.
        results: Folder of all audits.
    """
    return results / kind / f"{recipe.name}-{method}-set{number}.json"


def read_outcomes(kind: str, results: Path = RESULTS) -> list[dict[str, Any]]:
    """Read all outcomes of a kind, in the order of their names.

    Args:
        kind: See :func:`outcome_file`.
        results: Folder of all audits.
    """
    return [read_json(file) for file in sorted((results / kind).glob("*.json"))]


def read_audits(results: Path = RESULTS) -> list[dict[str, Any]]:
    """Read all audits in a folder, in the order of their names.

    Args:
        results: Where they are kept.
    """
    rows = [read_json(file) for file in sorted(results.glob("*.json"))]
    return [{"condition": USUAL.name, **row} for row in rows]  # early files do not name it

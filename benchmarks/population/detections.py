"""Judge networks of the population by rival detectors, and keep one small file for each verdict."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.population.audits import RESULTS, code_version, network_fields, outcome_file
from benchmarks.population.data import (
    CLASSES,
    Images,
    defense_set,
    load_images,
    training_images,
    transform_of,
)
from benchmarks.population.recipes import Recipe
from benchmarks.population.table import is_found, is_named, markdown_table, share, share_above
from benchmarks.population.training import attack_of, load_network, read_row
from lightning_mnp.attacks import Attack
from lightning_mnp.baselines import Suspects
from lightning_mnp.benchmark.machine import Meter
from lightning_mnp.benchmark.methods import Method
from lightning_mnp.benchmark.records import write_json
from lightning_mnp.data import balanced_indices

__all__ = [
    "DETECTORS",
    "detect_network",
    "detection_version",
    "detections_table",
    "suspects_of",
]

DETECTORS = {name: Method(name) for name in ("nc", "ac", "sc", "strip", "mm-bd")}
_SUSPECTS = 2000
_INPUTS = 500


def detection_version(detector: str) -> str:
    """Return a digest of the code and the options of a detector.

    Args:
        detector: One of :data:`DETECTORS`.
    """
    return f"{code_version('baselines')} {DETECTORS[detector].label}"


def suspects_of(recipe: Recipe, images: Images, number: int, kind: str, folder: Path) -> Suspects:
    """Draw images of which some are poisoned, unless the network is clean.

    Args:
        recipe: How the network was trained.
        images: Its data set.
        number: Number of the defense set, from 0; others are drawn for each.
        kind: ``"training"`` for images that the network was trained on, the same number of each
            class, with as many poisoned as in the training (cross and noise images of attacks that
            are trained with the network are left out); ``"inputs"`` for test images, half of them
            with the trigger. Inputs are in no defense set.
        folder: Where networks and their triggers are kept.

    Returns:
        About 2,000 training images or 500 inputs, normalized as in training, with the labels of
        the training or, for inputs, the labels that the attacker wants.
    """
    seed, transform = 1000 * recipe.seed + number, transform_of(recipe)
    attack = None if recipe.is_clean else attack_of(recipe, folder)
    if kind == "inputs":
        pixels, labels = _inputs(images, attack, seed)
    else:
        pixels, labels = _training(recipe, images, attack, seed)
    return Suspects(transform.images(pixels), labels)


def _inputs(images: Images, attack: Attack | None, seed: int) -> tuple[Tensor, Tensor]:
    stored = images.measured
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(stored), generator=generator)[:_INPUTS]
    pixels, labels = stored.images[chosen].clone(), stored.labels[chosen].clone()
    if attack is not None:
        others = attack.triggered_indices(labels, CLASSES)
        rows = others[: min(len(labels) // 2, len(others))]
        pixels[rows] = attack.apply(pixels[rows])
        labels[rows] = attack.target_labels(labels[rows], CLASSES)
    return pixels, labels


def _training(
    recipe: Recipe, images: Images, attack: Attack | None, seed: int
) -> tuple[Tensor, Tensor]:
    stored = training_images(recipe, images)
    size = min(_SUSPECTS, CLASSES * int(stored.labels.bincount(minlength=CLASSES).min()))
    chosen = balanced_indices(stored.labels, size, seed, CLASSES)
    pixels, labels = stored.images[chosen].clone(), stored.labels[chosen].clone()
    if attack is not None:
        poisoned = attack.poison_indices(stored.labels, CLASSES)
        rows = torch.isin(chosen, poisoned).nonzero().flatten()
        pixels[rows] = attack.poison(pixels[rows], labels[rows], chosen[rows])
        labels[rows] = attack.poison_labels(labels[rows], CLASSES)
    return pixels, labels


def detect_network(
    recipe: Recipe,
    number: int,
    detector: str,
    root: Path,
    folder: Path,
    results: Path = RESULTS,
) -> dict[str, Any]:
    """Judge a trained network by a detector, and write what it says.

    Args:
        recipe: How the network was trained.
        number: Number of the defense set, from 0; also the detector's seed.
        detector: One of :data:`DETECTORS`.
        root: Folder with the data sets.
        folder: Where networks and their triggers are kept.
        results: Where verdicts are kept.

    Returns:
        What the file has: the verdict, class, score, costs, and the version of the code.
    """
    method = DETECTORS[detector]
    network, row = load_network(recipe, folder), read_row(recipe, folder)
    images = load_images(recipe.data, root, folder / "data")
    kind = method.suspects
    suspects = None if kind is None else suspects_of(recipe, images, number, kind, folder)
    version = detection_version(detector)  # before the work: of the code that does it
    started = time.process_time()
    with Meter(network, "cpu") as meter:
        clean = defense_set(recipe, images, number)
        outcome = method.detect(network, clean, number, suspects)
    content: dict[str, Any] = {
        "network": recipe.name,
        "set": number,
        "defense": detector,
        **network_fields(recipe, row),
        "verdict": outcome.verdict,
        "target_class": outcome.target_class,
        "all_to_all": False,
        "score": outcome.score,
        "suspects": 0 if suspects is None else len(suspects),
        "passes": meter.passes,
        "processor_seconds": round(time.process_time() - started, 1),
        "version": version,
    }
    write_json(outcome_file("detected", recipe, number, detector, results), content)
    return content


def detections_table(
    recipes: Sequence[Recipe],
    detections: Iterable[dict[str, Any]],
    audits: Iterable[dict[str, Any]],
    sets: int,
) -> str:
    """Write which networks each detector flags, by attack, and how many clean ones.

    Args:
        recipes: The networks; those that did not learn their attack are left out.
        detections: Verdicts of rivals on any networks.
        audits: What this package's default says of them.
        sets: Defense sets of each network.

    Returns:
        Markdown: one line for each detector, over the networks and defense sets that it has seen,
        whose numbers stand there. *Score higher* is how often a backdoored network has a higher
        score than a clean one, over all pairs, whatever the threshold.
    """
    known = {recipe.name: recipe for recipe in recipes}
    ours = ({**row, "defense": "default"} for row in audits)
    rows = [
        row
        for row in (*ours, *detections)
        if row["network"] in known and row["set"] < sets and row["learned"] is not False
    ]
    names = [name for name in ("default", *DETECTORS) if any(r["defense"] == name for r in rows)]
    seen = {row["network"] for row in rows}
    kinds = dict.fromkeys(_column(r) for r in recipes if r.name in seen and not r.is_clean)
    lines = [
        _line(name, list(kinds), known, [row for row in rows if row["defense"] == name])
        for name in names
    ]
    heads = ["detector", *kinds, "all", "class right, of the found", "clean audits flagged"]
    return markdown_table([*heads, "score higher", "passes"], lines)


def _column(recipe: Recipe) -> str:
    if recipe.is_clean:
        return "clean"
    return f"{recipe.kind}, 1%" if recipe.is_sparse else recipe.kind


def _line(
    name: str, kinds: Sequence[str], known: dict[str, Recipe], rows: Sequence[dict[str, Any]]
) -> list[str]:
    def hits(part: Sequence[dict[str, Any]]) -> str:
        return f"{sum(map(is_found, part))} of {len(part)}"

    groups = {
        kind: [row for row in rows if _column(known[row["network"]]) == kind]
        for kind in (*kinds, "clean")
    }
    attacked = [row for kind in kinds for row in groups[kind]]
    flagged = [row for row in attacked if is_found(row)]
    clean = [row for row in groups["clean"] if is_found(row)]
    passes = [row["passes"] for row in rows if row["passes"] is not None]
    high, low = (
        [row["score"] for row in part if row["score"] is not None]
        for part in (attacked, groups["clean"])
    )
    return [
        name,
        *(hits(groups[kind]) for kind in kinds),
        share(len(flagged), len(attacked)),
        f"{sum(map(is_named, flagged))} of {len(flagged)}",
        share(len(clean), len(groups["clean"])),
        f"{share_above(high, low):.0%}" if high and low else "-",
        f"{statistics.median(passes):,.0f}" if passes else "-",
    ]

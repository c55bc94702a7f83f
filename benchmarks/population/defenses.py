"""Defend backdoored networks of the population, and keep one small file for each defense."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.population.audits import RESULTS, code_version
from benchmarks.population.data import defense_set, load_images
from benchmarks.population.recipes import Recipe
from benchmarks.population.split import split_of
from benchmarks.population.table import markdown_table
from benchmarks.population.training import load_network, measure, read_row
from lightning_mnp.attacks.trigger import load_trigger
from lightning_mnp.benchmark.methods import Method
from lightning_mnp.benchmark.records import read_json, write_json

__all__ = [
    "DEFENSES",
    "PAPER_SHARE",
    "defend_network",
    "defense_file",
    "defense_version",
    "defenses_table",
    "read_defenses",
]

# Thirty of the 4,800 filters of the paper's ResNet-18.
PAPER_SHARE = 0.00625

_AVERAGED = {
    "augment": "crop-flip",
    "suppression.runs": 3,
    "suppression.lr": 0.01,
    "suppression.momentum": 0.9,
    "suppression.epochs": 20,
    "suppression.parts": 1,
    "suppression.stop_accuracy": 0.2,
    "masks.momentum": 0.9,
}

# Each prunes whatever the verdict, but for the default, as its users run it.
DEFENSES = {
    "default": Method("default", {"when": "flagged"}),
    "mnp": Method("mnp"),
    "mnp-averaged": Method("mnp", _AVERAGED),
    "rnp": Method("rnp"),
    "rnp-share": Method("rnp", {"rule": "share", "amount": PAPER_SHARE}),
    "anp": Method("anp"),
    "clp": Method("clp"),
    "ft": Method("ft"),
}


def defense_version() -> str:
    """Return a digest of the code that decides on defenses, twelve hexadecimal digits."""
    return code_version("baselines", "purify")


def defense_file(recipe: Recipe, number: int, defense: str, results: Path = RESULTS) -> Path:
    """Return where the outcome of a defense is kept.

    Args:
        recipe: How the network was trained.
        number: Number of the defense set, from 0.
        defense: One of :data:`DEFENSES`.
        results: Folder of all audits.
    """
    return results / "defended" / f"{recipe.name}-{defense}-set{number}.json"


def defend_network(
    recipe: Recipe,
    number: int,
    defense: str,
    root: Path,
    folder: Path,
    results: Path = RESULTS,
) -> dict[str, Any]:
    """Defend a trained network with one defense set, and write what it was worth.

    Args:
        recipe: How the network was trained.
        number: Number of the defense set, from 0; also the defense's seed.
        defense: One of :data:`DEFENSES`.
        root: Folder with the data sets.
        folder: Where networks and their triggers are kept.
        results: Where outcomes are kept.

    Returns:
        What the file has: CA and ASR before and after, on images that no defense set has, what
        was pruned, the verdict if there is one, costs, and the version of the code.
    """
    network, row = load_network(recipe, folder), read_row(recipe, folder)
    images = load_images(recipe.data, root, folder / "data")
    started = time.process_time()
    outcome = DEFENSES[defense].defend(network, defense_set(recipe, images, number), number)
    spent = time.process_time() - started
    attack = None
    if not recipe.is_clean:
        attack = load_trigger(folder / f"{recipe.name}.trigger.safetensors")
    # A network that is not flagged is left as it is.
    ca, asr = row["CA"], row["ASR"]
    if outcome.model is not None:
        ca, asr = measure(outcome.model.eval(), recipe, images, attack)
    content: dict[str, Any] = {
        "network": recipe.name,
        "set": number,
        "defense": defense,
        "split": split_of(recipe.architecture, recipe.seed),
        "architecture": recipe.architecture,
        "kind": recipe.kind,
        "target": recipe.target,
        "poison": recipe.poison,
        **{key: row[key] for key in ("CA", "ASR", "learned", "weights_sha256")},
        "CA_after": ca,
        "ASR_after": asr,
        "verdict": outcome.verdict,
        "target_class": outcome.target_class,
        "pruned": len(outcome.pruned),
        "passes": outcome.passes,
        "processor_seconds": round(spent, 1),
        "version": defense_version(),
    }
    write_json(defense_file(recipe, number, defense, results), content)
    return content


def read_defenses(results: Path = RESULTS) -> list[dict[str, Any]]:
    """Read all outcomes in a folder, in the order of their names.

    Args:
        results: Where audits are kept.
    """
    return [read_json(file) for file in sorted((results / "defended").glob("*.json"))]


def defenses_table(recipes: Sequence[Recipe], outcomes: Iterable[dict[str, Any]]) -> str:
    """Write what each defense was worth, and each network's CA and ASR.

    Args:
        recipes: The networks; those that did not learn their attack are left out.
        outcomes: Of any networks, defenses and defense sets.

    Returns:
        Markdown: one line for each defense, over the networks that all defenses have seen, and one
        line for each network, with means over its defense sets.
    """
    known = {recipe.name: recipe for recipe in recipes}
    rows = [row for row in outcomes if row["network"] in known and row["learned"] is not False]
    names = [name for name in DEFENSES if any(row["defense"] == name for row in rows)]
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["network"], row["defense"]), []).append(row)
    common = [name for name in known if all((name, defense) in found for defense in names)]
    columns = ["defense", "networks", "CA drop", "ASR", "above 10%", "worst", "passes", "seconds"]
    lines = [_summary(name, [found[each, name] for each in common]) for name in names if common]
    each = []
    for name in known:
        cells = [_figures(found.get((name, defense), [])) for defense in names]
        before = next((found[name, one][0] for one in names if (name, one) in found), None)
        if before is not None:
            each.append([f"`{name}`", _pair(before["CA"], before["ASR"]), *cells])
    return "\n\n".join(
        [markdown_table(columns, lines), markdown_table(["network", "before", *names], each)]
    )


def _summary(name: str, networks: Sequence[Sequence[dict[str, Any]]]) -> list[str]:
    rows = [row for each in networks for row in each]
    drops = [100 * (row["CA"] - row["CA_after"]) for row in rows]
    attacked = [row for row in rows if row["ASR_after"] is not None]
    rates = [100 * row["ASR_after"] for row in attacked]
    worst = max(attacked, key=lambda row: float(row["ASR_after"]), default=None)
    passes = [row["passes"] for row in rows if row["passes"] is not None]
    return [
        name,
        str(len(networks)),
        f"{statistics.mean(drops):.1f}",
        f"{statistics.mean(rates):.1f}" if rates else "-",
        f"{sum(rate > 10 for rate in rates)} of {len(rates)}",
        f"`{worst['network']}`" if worst else "-",
        f"{statistics.median(passes):,.0f}" if passes else "-",
        f"{statistics.median(row['processor_seconds'] for row in rows):.0f}",
    ]


def _figures(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return "?"
    rates = [row["ASR_after"] for row in rows if row["ASR_after"] is not None]
    figures = _pair(
        statistics.mean(row["CA_after"] for row in rows), statistics.mean(rates) if rates else None
    )
    return f"{figures} ({rows[0]['pruned']})"


def _pair(ca: float, asr: float | None) -> str:
    return f"{100 * ca:.1f}" if asr is None else f"{100 * ca:.1f}/{100 * asr:.1f}"

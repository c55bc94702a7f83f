"""Defend backdoored networks of the population, and keep one small file for each defense."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.population.ablations import ABLATIONS, Ablation
from benchmarks.population.audits import RESULTS, code_version, network_fields, outcome_file
from benchmarks.population.data import defense_set, load_images
from benchmarks.population.recipes import Recipe
from benchmarks.population.table import markdown_table, pair
from benchmarks.population.training import load_network, measure, read_row
from lightning_mnp import MNPConfig
from lightning_mnp.attacks.trigger import load_trigger
from lightning_mnp.benchmark.machine import Meter
from lightning_mnp.benchmark.methods import Method
from lightning_mnp.benchmark.records import write_json
from lightning_mnp.report import DefenseReport

__all__ = [
    "DEFENSES",
    "defend_network",
    "defense_version",
    "defenses_table",
    "find_defense",
]

_PAPER_SHARE = MNPConfig.paper().pruning.amount

# Each prunes whatever the verdict, but for the default, as its users run it.
DEFENSES = {
    "default": Method("default", {"when": "flagged"}),
    "mnp": Method("mnp"),
    "mnp-averaged": Method("mnp-averaged"),
    "rnp": Method("rnp"),
    "rnp-share": Method("rnp", {"rule": "share", "amount": _PAPER_SHARE}),
    "anp": Method("anp"),
    "anp-share": Method("anp", {"rule": "share", "amount": _PAPER_SHARE}),
    "clp": Method("clp"),
    "clp-share": Method("clp", {"rule": "share", "amount": _PAPER_SHARE}),
    "fp": Method("fp"),
    "nc": Method("nc"),
    "nad": Method("nad"),
    "i-bau": Method("i-bau"),
    "ft": Method("ft"),
    "ft-sam": Method("ft-sam"),
    "nft": Method("nft"),
}


def find_defense(defense: str) -> Method | Ablation:
    """Return a defense or an ablation by its name.

    Args:
        defense: One of :data:`DEFENSES`, or of the ablations.
    """
    return ABLATIONS[defense] if defense in ABLATIONS else DEFENSES[defense]


def defense_version(defense: str) -> str:
    """Return a digest of the code and the options of a defense.

    Args:
        defense: One of :data:`DEFENSES`, or of the ablations.
    """
    return f"{code_version('baselines', 'purify')} {find_defense(defense).label}"


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
        defense: One of :data:`DEFENSES`, or of the ablations.
        root: Folder with the data sets.
        folder: Where networks and their triggers are kept.
        results: Where outcomes are kept.

    Returns:
        What the file has: CA and ASR before and after, on images that no defense set has, what
        was pruned, the verdict if there is one, costs, and the version of the code.
    """
    network, row = load_network(recipe, folder), read_row(recipe, folder)
    images = load_images(recipe.data, root, folder / "data")
    version = defense_version(defense)  # before the work: of the code that does it
    started = time.process_time()
    with Meter(network, "cpu") as meter:
        outcome = find_defense(defense).defend(network, defense_set(recipe, images, number), number)
    spent = time.process_time() - started
    assert outcome.model is not None, "a defense returns a copy, also of what it leaves as it is"
    attack = None
    if not recipe.is_clean:
        attack = load_trigger(folder / f"{recipe.name}.trigger.safetensors")
    ca, asr = measure(outcome.model.eval(), recipe, images, attack)
    content: dict[str, Any] = {
        "network": recipe.name,
        "set": number,
        "defense": defense,
        **network_fields(recipe, row),
        "CA_after": ca,
        "ASR_after": asr,
        "verdict": outcome.verdict,
        "target_class": outcome.target_class,
        "pruned": len(outcome.pruned),
        "passes": meter.passes if outcome.passes is None else outcome.passes,
        "processor_seconds": round(spent, 1),
        "version": version,
        **_second_audit(outcome.report),
    }
    write_json(outcome_file("defended", recipe, number, defense, results), content)
    return content


def _second_audit(report: DefenseReport | None) -> dict[str, Any]:
    """What the audits before and after say; nothing after a defense that makes none."""
    if report is None:
        return {}
    after = report.reaudit
    scores = {"score": report.score, "score_after": None if after is None else after.score}
    return {
        **{
            key: value if value is None or math.isfinite(value) else None
            for key, value in scores.items()
        },
        "all_to_all": report.all_to_all,
        "verdict_after": report.verdict_after,
    }


def defenses_table(recipes: Sequence[Recipe], outcomes: Iterable[dict[str, Any]], sets: int) -> str:
    """Write what each defense was worth, and each network's CA and ASR.

    Args:
        recipes: The networks; those that did not learn their attack are left out.
        outcomes: Of any networks, defenses and defense sets.
        sets: Defense sets of each network.

    Returns:
        Markdown: one line for each defense, over the networks and defense sets that all defenses
        have seen, and one line for each network, with means over its defense sets.
    """
    known = {recipe.name: recipe for recipe in recipes}
    rows = [
        row
        for row in outcomes
        if row["network"] in known and row["set"] < sets and row["learned"] is not False
    ]
    names = [
        name for name in (*DEFENSES, *ABLATIONS) if any(row["defense"] == name for row in rows)
    ]
    found = {((row["network"], row["set"]), row["defense"]): row for row in rows}
    pairs = sorted({(row["network"], row["set"]) for row in rows})
    common = [pair for pair in pairs if all((pair, name) in found for name in names)]
    summary = [_summary(name, [found[pair, name] for pair in common]) for name in names]
    each = []
    for network in known:
        own = {name: [row for row in rows if _is_of(row, network, name)] for name in names}
        some = [row for part in own.values() for row in part]
        if some:
            before = pair(some[0]["CA"], some[0]["ASR"])
            attack = known[network].kind
            each.append([f"`{network}`", attack, before, *(_figures(own[name]) for name in names)])
    columns = ("networks", "flagged", "CA drop", "ASR", "median", "above 10%", "worst")
    more = ("clean: CA drop", "passes", "seconds")
    versions = Counter(row["version"].split()[0] for row in rows)
    told = ", ".join(f"{version}: {count}" for version, count in versions.most_common())
    return "\n\n".join(
        [
            markdown_table(["defense", *columns, *more], summary),
            markdown_table(["network", "attack", "before", *names], each),
            f"Versions of the code: {told or 'none'}.",
        ]
    )


def _is_of(row: dict[str, Any], network: str, defense: str) -> bool:
    return bool(row["network"] == network and row["defense"] == defense)


def _summary(name: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    attacked = [row for row in rows if row["ASR"] is not None]
    rates = [100 * row["ASR_after"] for row in attacked]
    worst = max(attacked, key=lambda row: float(row["ASR_after"]), default=None)
    flagged = [row["verdict"] == "backdoored" for row in attacked if row["verdict"] is not None]
    passes = [row["passes"] for row in attacked if row["passes"] is not None]
    return [
        name,
        str(len({row["network"] for row in attacked})),
        f"{sum(flagged)} of {len(flagged)}" if flagged else "-",
        _mean_drop(attacked),
        f"{statistics.mean(rates):.1f}" if rates else "-",
        f"{statistics.median(rates):.1f}" if rates else "-",
        f"{sum(rate > 10 for rate in rates)} of {len(rates)}",
        f"`{worst['network']}`" if worst else "-",
        _mean_drop([row for row in rows if row["ASR"] is None]),
        f"{statistics.median(passes):,.0f}" if passes else "-",
        f"{statistics.median(row['processor_seconds'] for row in attacked):.0f}" if rates else "-",
    ]


def _mean_drop(rows: Sequence[dict[str, Any]]) -> str:
    drops = [100 * (row["CA"] - row["CA_after"]) for row in rows]
    return f"{statistics.mean(drops):.1f}" if drops else "-"


def _figures(rows: Sequence[dict[str, Any]]) -> str:
    """Mean CA and ASR after the defense, and the mean number of filters pruned."""
    if not rows:
        return "?"
    rates = [row["ASR_after"] for row in rows if row["ASR_after"] is not None]
    ca = statistics.mean(row["CA_after"] for row in rows)
    pruned = statistics.mean(row["pruned"] for row in rows)
    return f"{pair(ca, statistics.mean(rates) if rates else None)} ({pruned:.0f})"

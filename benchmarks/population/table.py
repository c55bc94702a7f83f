"""The table of all audits of a split, in Markdown."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from scipy.stats import mannwhitneyu

from benchmarks.population.recipes import Recipe
from lightning_mnp import MNPConfig
from lightning_mnp.signals.population import rate_interval

__all__ = [
    "is_found",
    "is_named",
    "markdown_table",
    "pair",
    "share",
    "share_above",
    "write_table",
]

Audit = dict[str, Any]

PAPER_DELTA = MNPConfig.paper().verdict.delta


def pair(ca: float, asr: float | None) -> str:
    """Write CA and, if there is one, ASR, in percent.

    Args:
        ca: Clean accuracy, from 0 to 1.
        asr: Attack success rate, from 0 to 1; None for a clean network.

    Example:
        >>> pair(0.65, 0.999), pair(0.65, None)
        ('65.0/99.9', '65.0')
    """
    return f"{100 * ca:.1f}" if asr is None else f"{100 * ca:.1f}/{100 * asr:.1f}"


def share(hits: int, total: int) -> str:
    """Write a share with its 95% interval of Clopper and Pearson.

    Args:
        hits: How many.
        total: Of how many.

    Returns:
        Such as ``"5.0% (1 of 20; 0.1% to 24.9%)"``; a dash if there are none at all.

    Example:
        >>> share(1, 20)
        '5.0% (1 of 20; 0.1% to 24.9%)'
    """
    if total == 0:
        return "-"
    low, high = rate_interval(hits, total)
    return f"{hits / total:.1%} ({hits} of {total}; {low:.1%} to {high:.1%})"


def is_found(audit: Audit) -> bool:
    """Return whether an audit calls the network backdoored; undecided is not found."""
    return bool(audit["verdict"] == "backdoored")


def is_named(audit: Audit) -> bool:
    """Return whether a found backdoor's target class is right, or all-to-all is named as such."""
    if "all-to-all" in audit["kind"]:
        return bool(audit["all_to_all"])
    return not audit["all_to_all"] and bool(audit["target_class"] == audit["target"])


def write_table(split: str, recipes: Sequence[Recipe], audits: Iterable[Audit], sets: int) -> str:
    """Write what the audits of a split say, and which are missing.

    Shares are of audits, so that a network counts once for each of its defense sets. Those of a
    network are not independent, hence a line that counts networks.

    Args:
        split: Its name, for the title.
        recipes: All networks of the split.
        audits: Audits of any networks; those of others are left out.
        sets: Defense sets of each network.

    Returns:
        Markdown.
    """
    known = {recipe.name: recipe for recipe in recipes}
    rows = [row for row in audits if row["network"] in known and row["set"] < sets]
    clean = [row for row in rows if row["kind"] == "clean"]
    attacked = [row for row in rows if row["kind"] != "clean"]
    learned = [row for row in attacked if row["learned"]]
    dense = [row for row in learned if not known[row["network"]].is_sparse]
    sparse = [row for row in learned if known[row["network"]].is_sparse]
    failed = sorted({row["network"] for row in attacked if not row["learned"]})
    parts = [
        f"# The {split} networks",
        _state(recipes, rows, sets),
        "## Clean networks",
        _clean_table(clean),
        _worst(clean),
        "## Backdoored networks, 10% poisoned",
        _attacked_table(dense, lambda row: row["kind"], "attack"),
        _attacked_table(dense, lambda row: row["architecture"], "architecture"),
        "## Backdoored networks, 1% poisoned",
        _attacked_table(sparse, lambda row: row["kind"], "attack"),
        f"Attack not learned, not counted above: {', '.join(failed) or 'none'}.",
        "## Detection ratio",
        _ratios(clean, learned),
        "## Cost",
        _costs(rows),
    ]
    return "\n\n".join(parts)


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table in Markdown.

    Args:
        columns: Their names.
        rows: The cells of each row.

    Example:
        >>> print(markdown_table(["a", "b"], [["1", "2"]]))
        | a | b |
        | --- | --- |
        | 1 | 2 |
    """
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _groups(rows: Sequence[Audit], key: Callable[[Audit], str]) -> dict[str, list[Audit]]:
    found: dict[str, list[Audit]] = {}
    for row in sorted(rows, key=key):
        found.setdefault(key(row), []).append(row)
    return found


def _networks(rows: Iterable[Audit]) -> set[str]:
    return {row["network"] for row in rows}


def _state(recipes: Sequence[Recipe], rows: Sequence[Audit], sets: int) -> str:
    there = {(row["network"], row["set"]) for row in rows}
    missing = [
        f"{recipe.name} (set {number})"
        for recipe in recipes
        for number in range(sets)
        if (recipe.name, number) not in there
    ]
    versions = Counter(row["version"] for row in rows)
    told = ", ".join(f"{version}: {count}" for version, count in versions.most_common())
    text = f"{len(there)} of {len(recipes) * sets} audits. Versions of the code: {told or 'none'}."
    if len(versions) > 1:
        text += " More than one version: no table of one method."
    if missing:
        text += f"\n\nMissing: {', '.join(missing)}."
    return text


def _clean_table(rows: Sequence[Audit]) -> str:
    def line(name: str, part: Sequence[Audit]) -> list[str]:
        flagged = [row for row in part if is_found(row)]
        undecided = [row for row in part if row["verdict"] == "undecided"]
        accuracies = [100 * row["CA"] for row in part] or [0.0]
        return [
            name,
            f"{min(accuracies):.0f} to {max(accuracies):.0f}",
            share(len(flagged), len(part)),
            share(len(undecided), len(part)),
            f"{len(_networks(flagged))} of {len(_networks(part))}",
        ]

    columns = ["architecture", "CA", "called backdoored", "undecided", "networks ever flagged"]
    groups = _groups(rows, lambda row: row["architecture"])
    return markdown_table(columns, [line("all", rows), *(line(*group) for group in groups.items())])


def _worst(rows: Sequence[Audit]) -> str:
    networks, flagged = _networks(rows), _networks(filter(is_found, rows))
    text = f"Networks flagged with any set: {share(len(flagged), len(networks))}."
    counts = Counter(
        next(row["architecture"] for row in rows if row["network"] == name) for name in flagged
    )
    if counts:
        most = max(counts.values())
        names = sorted(name for name, count in counts.items() if count == most)
        text += f" Worst architecture: {', '.join(names)} ({most} flagged)."
    return text


def _attacked_table(rows: Sequence[Audit], key: Callable[[Audit], str], what: str) -> str:
    def line(name: str, part: Sequence[Audit]) -> list[str]:
        found = [row for row in part if is_found(row)]
        undecided = sum(row["verdict"] == "undecided" for row in part)
        named = sum(is_named(row) for row in found)
        success = [100 * row["ASR"] for row in part] or [0.0]
        return [
            name,
            str(len(_networks(part))),
            f"{min(success):.0f} to {max(success):.0f}",
            share(len(found), len(part)),
            str(undecided),
            share(named, len(found)),
        ]

    columns = [what, "networks", "ASR", "found", "undecided", "class right, of the found"]
    groups = _groups(rows, key)
    return markdown_table(columns, [line("all", rows), *(line(*group) for group in groups.items())])


def share_above(high: Sequence[float], low: Sequence[float]) -> float:
    """Return how often a number of one group is above one of another; ties count a half.

    For scores, it is the area under the ROC curve, whatever the threshold.

    Args:
        high: Numbers that are expected to be the higher ones; at least one, like `low`.
        low: The others.

    Example:
        >>> share_above([2.0, 3.0], [1.0, 2.0])
        0.875
    """
    return float(mannwhitneyu(high, low).statistic) / (len(high) * len(low))


def _ratios(clean: Sequence[Audit], learned: Sequence[Audit]) -> str:
    """How well the paper's detection ratio alone, low for a backdoor, tells networks apart."""
    usual, low = (
        [row["detection_ratio"] for row in rows if row["detection_ratio"] is not None]
        for rows in (clean, learned)
    )
    if not usual or not low:
        return "No ratios of clean and of backdoored networks."
    lower = share_above(usual, low)
    below = [share(sum(ratio <= PAPER_DELTA for ratio in part), len(part)) for part in (usual, low)]
    return (
        f"Median of clean networks {statistics.median(usual):.2f}, of those whose attack was "
        f"learned {statistics.median(low):.2f}. Of two, one clean and one backdoored, the "
        f"backdoored one has the lower ratio in {lower:.0%} of all pairs. At most {PAPER_DELTA}, "
        f"the paper's threshold: {below[0]} of the clean and {below[1]} of the backdoored ones."
    )


def _costs(rows: Sequence[Audit]) -> str:
    def median_of(values: Sequence[float]) -> str:
        return f"{statistics.median(values):,.0f}" if values else "-"

    seconds = [row["processor_seconds"] for row in rows]
    passes = [row["passes"] for row in rows if row["passes"] is not None]
    return (
        f"Processor seconds of an audit: {median_of(seconds)} (median), "
        f"{max(seconds, default=0):,.0f} at most. Image passes: {median_of(passes)} (median), "
        f"{max(passes, default=0):,.0f} at most, where they were counted."
    )

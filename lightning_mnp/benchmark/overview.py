"""Defenses side by side: one row for each, one column for each attack."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from lightning_mnp.benchmark.notes import (
    fine_tuned,
    not_counted,
    not_learned,
    not_shown,
    of_seed,
    other_code,
    other_recipes,
    trained_again,
)
from lightning_mnp.benchmark.pairs import cell_of, mean_drop, mean_pair, pairs_of
from lightning_mnp.benchmark.results import MISSING, Marks, Result
from lightning_mnp.benchmark.sweeps import comparable, without_trials
from lightning_mnp.benchmark.table import Table, head

__all__ = ["overview"]

_HIGH = 10.0  # ASR in percent from which an attack counts as left


def overview(results: Sequence[Result], marks: Marks) -> list[Table]:
    """Make a table for each setting: CA and ASR after each defense, and what they cost.

    Args:
        results: All results.
        marks: Names what was measured on which machine.

    Returns:
        The tables, that with the most attacks first, then that with the most defenses. Defenses
        that were run on all attacks come first, by their mean ASR. One that was run on a single
        attack out of several, with options of its own, is a trial of these options and has no row;
        nor have other numbers of clean images, on fewer attacks.
    """
    wanted = [r for r in results if r.task == "defense" and (r.network["usual"] or r.is_clean)]
    groups = [group for group in comparable(wanted) if any(not each.is_clean for each in group)]
    groups.sort(key=_breadth, reverse=True)
    return [
        _table(number, group, marks, of_seed(group, wanted))
        for number, group in enumerate(groups, 1)
    ]


def _breadth(group: Sequence[Result]) -> tuple[int, int]:
    """Return the number of attacks and of defenses."""
    return len({each.attack for each in group}), len({each.label for each in group})


def _table(number: int, here: Sequence[Result], marks: Marks, of: str) -> Table:
    attacks = sorted({each.attack for each in here if not each.is_clean})
    columns = [*attacks, *(["clean"] if any(each.is_clean for each in here) else [])]
    shown, trials = without_trials(here)
    rows = [
        _row([each for each in shown if each.label == label], label, columns)
        for label in dict.fromkeys(each.label for each in shown)
    ]
    rows.sort(key=lambda row: row[0])
    cells = [cell_of(_of(here, name), "before", digits=1) for name in columns]
    none = ["no defense", *cells, *[""] * 4]
    heads = ["defense", *columns, "mean CA drop", "mean ASR", f"ASR above {_HIGH:.0f}%", "passes"]
    notes = [
        "Means are over the attacks; several networks of an attack count as one. In brackets: how "
        "many networks or defense seeds a mean is over. Passes are the median over all networks, "
        "clean ones included. Rows are in the order of the mean ASR; defenses that were not run on "
        "all attacks come last.",
        f"Measured on {marks.mark(here)}.",
        *fine_tuned(here),
        *other_recipes(here),
        *trained_again(here),
        *other_code(shown),
        *not_shown(trials),
        *not_counted(shown),
    ]
    for name in attacks:
        notes += not_learned(name, _of(here, name))
    mark = marks.setting(here[0].setting)
    title = f"Defenses side by side: CA / ASR in percent, setting {mark}{of}"
    return Table(f"overview-{number}", title, heads, [none, *(row for _, row in rows)], notes)


def _of(results: Sequence[Result], attack: str) -> list[Result]:
    return [each for each in results if each.attack == attack]


def _row(
    group: Sequence[Result], label: str, columns: Sequence[str]
) -> tuple[tuple[bool, float], list[str]]:
    """The line of a defense, behind what it is sorted by."""
    attacks = [name for name in columns if name != "clean"]
    drops, rates = [], []
    for name in attacks:
        of_attack = _of(group, name)
        drop = mean_drop(of_attack)
        if drop is not None:
            asr = mean_pair(pairs_of(of_attack, "after"))[1]
            drops.append(drop)
            rates += [] if asr is None else [asr]
    short = "" if len(rates) == len(attacks) else f", {len(rates)} of {len(attacks)}"
    means = [f"{statistics.mean(each):.1f}{short}" if each else MISSING for each in (drops, rates)]
    high = f"{sum(rate > _HIGH for rate in rates)} of {len(rates)}" if rates else MISSING
    passes = [each.content["passes"] for each in group if each.is_done]
    cost = f"{statistics.median(passes):,.0f}" if passes else MISSING
    line = [head(label), *(cell_of(_of(group, name), digits=1) for name in columns)]
    return (bool(short), statistics.mean(rates) if rates else math.inf), [*line, *means, high, cost]

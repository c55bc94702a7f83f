"""Defenses side by side: one row for each, one column for each attack."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from lightning_mnp.benchmark.results import MISSING, Marks, Result
from lightning_mnp.benchmark.tables import Table, fine_tuned, head, mean_pair, settings_of

__all__ = ["overview"]

_HIGH = 10.0  # ASR in percent from which an attack counts as left


def overview(results: Sequence[Result], marks: Marks) -> list[Table]:
    """Make a table for each setting: CA and ASR after each defense, and what they cost.

    Args:
        results: All results.
        marks: Names what rows were measured on.

    Returns:
        The tables. Defenses that were run on all attacks come first, by their mean ASR.
    """
    wanted = [r for r in results if r.task == "defense" and (r.network["usual"] or r.is_clean)]
    tables: list[Table] = []
    for setting in settings_of(wanted):
        done = [each for each in wanted if each.setting == setting and each.is_done]
        attacks = sorted({each.attack for each in done if not each.is_clean})
        if not attacks:
            continue
        columns = [*attacks, *(["clean"] if any(each.is_clean for each in done) else [])]
        rows = [
            _row([each for each in done if each.label == label], label, columns)
            for label in dict.fromkeys(each.label for each in done)
        ]
        rows.sort(key=lambda row: row[0])
        first = ["no defense", *(_cell(_of(done, name), "before") for name in columns)]
        heads = ["defense", *columns, "mean CA drop", "mean ASR", f"ASR above {_HIGH:.0f}%"]
        tables.append(
            Table(
                f"overview-{len(tables) + 1}",
                f"Defenses side by side: CA / ASR in percent; {setting}",
                [*heads, "passes", "measured on"],
                [[*first, "", "", "", "", marks.mark(done)], *(line for _, line in rows)],
                [
                    "Means are over the attacks; several networks of an attack count as one. "
                    "Passes are the median over all networks, clean ones included. By mean ASR; "
                    "defenses that were not run on all attacks come last.",
                    *fine_tuned(done),
                ],
            )
        )
    return tables


def _of(results: Sequence[Result], attack: str) -> list[Result]:
    return [each for each in results if each.attack == attack]


def _cell(group: Sequence[Result], when: str) -> str:
    """CA and ASR, each network once; CA alone if there is no attack."""
    if not group:
        return MISSING
    ca, asr = mean_pair([each.percent(when) for each in group])
    return f"{ca:.1f}" if asr is None else f"{ca:.1f} / {asr:.1f}"


def _row(
    group: Sequence[Result], label: str, columns: Sequence[str]
) -> tuple[tuple[bool, float], list[str]]:
    """The line of a defense, behind what it is sorted by."""
    attacks = [name for name in columns if name != "clean"]
    drops, rates = [], []
    for name in attacks:
        if found := _of(group, name):
            before = mean_pair([each.percent("before") for each in found])
            after = mean_pair([each.percent("after") for each in found])
            drops.append(before[0] - after[0])
            rates.append(after[1] or 0.0)
    short = "" if len(rates) == len(attacks) else f", {len(rates)} of {len(attacks)}"
    passes = statistics.median(each.content["passes"] for each in group)
    line = [head(label), *(_cell(_of(group, name), "after") for name in columns)]
    if rates:
        high = sum(rate > _HIGH for rate in rates)
        line += [f"{statistics.mean(drops):.1f}{short}", f"{statistics.mean(rates):.1f}{short}"]
        line += [f"{high} of {len(rates)}"]
    else:
        line += [MISSING] * 3
    order = bool(short), statistics.mean(rates) if rates else 0.0
    return order, [*line, f"{passes:,.0f}", ""]

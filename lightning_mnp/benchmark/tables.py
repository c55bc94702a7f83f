"""The paper's tables, the paper's figures beside ours."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from lightning_mnp.benchmark.names import file_words
from lightning_mnp.benchmark.notes import (
    POINTS,
    fine_tuned,
    losses,
    not_learned,
    not_shown,
    of_seed,
    other_code,
    other_recipes,
)
from lightning_mnp.benchmark.pairs import Pair, cell_of, mean_pair, pairs_of, shown
from lightning_mnp.benchmark.results import MISSING, Marks, Result, paper_figures, settings_of
from lightning_mnp.benchmark.sweeps import comparable, without_trials
from lightning_mnp.benchmark.table import Table, head

__all__ = ["by_rate", "detection", "mitigation"]

_PAPER_DEFENSES = ("fp", "anp", "clp", "rnp", "nc", "nad", "i-bau", "mnp")
_PAPER_DETECTORS = ("nc", "ac", "sc", "strip", "mnp")


def _columns(results: Sequence[Result], published: Sequence[str]) -> list[str]:
    """Return the paper's methods, then all others that were measured."""
    others = dict.fromkeys(each.label for each in results if each.label not in published)
    return [*published, *sorted(others, key=lambda label: (label != "default", label))]


def mitigation(results: Sequence[Result], marks: Marks) -> list[Table]:
    """Make Tables 1 and 2: CA and ASR after each defense, a table for each setting.

    Seeds have a table each if not all defenses were run on all of them.

    Other numbers of clean images, on fewer attacks, and trials of options have tables of their own.

    Args:
        results: All results.
        marks: Names what rows were measured on.
    """
    wanted = [r for r in results if r.task == "defense" and r.network["usual"] and not r.is_clean]
    return [
        _mitigation(number, here, marks, of_seed(here, wanted))
        for number, here in enumerate(comparable(wanted), 1)
    ]


def _mitigation(number: int, here: Sequence[Result], marks: Marks, of: str) -> Table:
    here, trials = without_trials(here)
    setting = here[0].setting
    published = {} if setting.paper_table is None else paper_figures()[setting.paper_table]
    rows, labels = published.get("rows", {}), _columns(here, _PAPER_DEFENSES)
    attacks = [each for each in rows if each != "Average"]
    attacks += sorted({each.attack for each in here} - set(attacks))
    lines, losing = [], []
    for attack in attacks:
        if attack in rows:
            pairs = [rows[attack].get(label) for label in ("none", *labels)]
            told = ["" if pair is None else shown(tuple(pair)) for pair in pairs]
            lines.append([attack, "paper", *told, "as printed"])
        group = [each for each in here if each.attack == attack]
        own = [cell_of([each for each in group if each.label == label]) for label in labels]
        before = cell_of(group, "before")
        lines.append([attack, "ours", before, *own, marks.mark(group) or MISSING])
        losing += [*not_learned(attack, group), *losses(attack, group)]
    lines += _averages(here, attacks, labels, rows)
    notes = ["In brackets: how many networks or defense seeds a mean is over."]
    if losing:
        notes += [f"To lose: no better in CA and ASR, and worse by over {POINTS} points in one."]
    notes += [*losing, *fine_tuned(here), *other_recipes(here), *other_code(here)]
    notes += not_shown(trials)
    what = f"Table {setting.paper_table}" if setting.paper_table else "Defenses"
    name = f"table{setting.paper_table}" if setting.paper_table else "defenses"
    title = f"{what}: CA / ASR in percent, setting {marks.setting(setting)}{of}"
    heads = ["attack", "by", *map(head, ("none", *labels)), "measured on"]
    return Table(f"{name}-{number}", title, heads, lines, notes)


def _averages(
    here: Sequence[Result],
    attacks: Sequence[str],
    labels: Sequence[str],
    rows: dict[str, dict[str, list[float]]],
) -> list[list[str]]:
    lines = []
    if rows:
        published: dict[str, list[Pair]] = {}
        for name, row in rows.items():
            for label, (ca, asr) in row.items():
                published.setdefault(label, []).extend([(ca, asr)] if name != "Average" else [])
        printed = rows["Average"]
        for told, source in (
            ({label: (pair[0], pair[1]) for label, pair in printed.items()}, "as printed"),
            ({label: mean_pair(pairs) for label, pairs in published.items()}, "mean of its rows"),
        ):
            cells = [shown(told[label]) if label in told else "" for label in ("none", *labels)]
            lines.append(["Average", "paper", *cells, source])
    own = []
    for label in labels:
        pairs = []
        for attack in attacks:
            group = [r for r in here if (r.attack, r.label) == (attack, label) and r.is_done]
            if group:
                pairs.append(mean_pair([each.percent("after") for each in group]))
        short = "" if len(pairs) == len(attacks) else f", {len(pairs)} of {len(attacks)} attacks"
        own.append(shown(mean_pair(pairs)) + short if pairs else MISSING)
    return [*lines, ["Average", "ours", "", *own, ""]]


def by_rate(results: Sequence[Result], marks: Marks) -> list[Table]:
    """Make Table 3: BadNets by poison rate and mode, a table for each setting and defense.

    Args:
        results: All results. Those without a rate, as earlier versions left them if it was not
            configured, are left out, and so are defenses that were run at the usual rate only.
        marks: Names what rows were measured on.
    """
    wanted = [
        each
        for each in results
        if each.task == "defense" and each.attack == "BadNets" and "+" not in each.network["attack"]
        if each.network["rate"] is not None
    ]
    others = [each for each in wanted if not each.network["usual"]]
    seeds = {each.network["seed"] for each in others}
    wanted = [each for each in wanted if each.network["seed"] in seeds]
    tables = []
    for number, setting in enumerate(settings_of(others), 1):
        for label in sorted({each.label for each in others if each.setting == setting}):
            group = [r for r in wanted if r.setting == setting and r.label == label]
            tables.append(_by_rate(f"table3-{number}-{file_words(label)}", group, marks))
    return tables


def _by_rate(name: str, group: Sequence[Result], marks: Marks) -> Table:
    published, label, setting = paper_figures()["3"], group[0].label, group[0].setting
    on_cifar10 = setting.paper_table == "1"
    rates = {float(each.network["rate"]) for each in group}
    if on_cifar10:
        rates |= {float(each) for each in published["rows"]["all-to-one"]}
    ordered, lines = sorted(rates), []
    for mode, short in (("all-to-one", "A2O"), ("all-to-all", "A2A")):
        if label == "mnp" and on_cifar10:
            lines += _paper_rate_rows(published["rows"][mode], ordered, short)
        here = [each for each in group if each.network["mode"] == mode]
        lines += _rate_rows(here, (ordered, short), marks)
    heads = [f"{rate:.2%} {each}" for rate in ordered for each in ("no defense", head(label))]
    notes = [published["note"]] if label == "mnp" and on_cifar10 else []
    for mode in dict.fromkeys(each.network["mode"] for each in group):
        for rate in ordered:
            at = [r for r in group if (r.network["mode"], r.network["rate"]) == (mode, rate)]
            notes += not_learned(f"{mode}, {rate:.2%}", at)
    return Table(
        name,
        f"Table 3: BadNets by poison rate, {head(label)}, setting {marks.setting(setting)}",
        ["attack", "in percent", "by", *heads, "measured on"],
        lines,
        [*notes, *fine_tuned(group), *other_recipes(group)],
    )


def _paper_rate_rows(
    published: dict[str, dict[str, list[float]]], rates: Sequence[float], short: str
) -> list[list[str]]:
    groups = [published.get(f"{rate:g}") for rate in rates]
    lines = []
    for place, name in enumerate(("CA", "ASR")):
        told = [
            "" if each is None else f"{each[which][place]:.2f}"
            for each in groups
            for which in ("none", "mnp")
        ]
        lines.append([f"BadNets-{short}", name, "paper", *told, "as printed"])
    return lines


def _rate_rows(
    here: Sequence[Result], which: tuple[Sequence[float], str], marks: Marks
) -> list[list[str]]:
    rates, short = which
    lines = []
    for place, name in enumerate(("CA", "ASR")):
        told = []
        for rate in rates:
            group = [each for each in here if each.network["rate"] == rate]
            done = [each for each in group if each.is_done]
            for when in ("before", "after"):
                value = mean_pair(pairs_of(done, when))[place] if done else None
                count = f" ({len(done)})" if len(done) > 1 and when == "after" else ""
                without = "error" if group else MISSING
                told.append(without if value is None else f"{value:.2f}{count}")
        lines.append([f"BadNets-{short}", name, "ours", *told, marks.mark(here) or MISSING])
    return lines


def detection(results: Sequence[Result], marks: Marks) -> list[Table]:
    """Make Table 4: detection rates and, which the paper omits, false positive rates.

    Args:
        results: All results.
        marks: Names what rows were measured on.
    """
    wanted = [r for r in results if r.task == "detector" and (r.network["usual"] or r.is_clean)]
    return [
        _detection(number, [each for each in wanted if each.setting == setting], marks)
        for number, setting in enumerate(settings_of(wanted), 1)
    ]


def _detection(number: int, here: Sequence[Result], marks: Marks) -> Table:
    setting = here[0].setting
    published = paper_figures()["4"]["rows"] if setting.paper_table == "1" else {}
    attacks = [name for name in published.get("mnp", ()) if name != "Avg"]
    attacks += sorted({each.attack for each in here if not each.is_clean} - set(attacks))
    lines = []
    for label in _columns(here, _PAPER_DETECTORS):
        if label in published:
            rates = published[label]
            told = [f"{rates[each]:.2f}" if each in rates else "" for each in attacks]
            average = f"{rates['Avg']:.2f}"
            lines.append([head(label), "paper", *told, average, "not given", "as printed"])
        group = [each for each in here if each.label == label]
        lines.append(
            [head(label), "ours", *_detected(group, attacks), marks.mark(group) or MISSING]
        )
    notes = [
        "In percent: networks that are called backdoored; undecided is not. AC, SC and STRIP "
        "see images with the trigger, see the documentation; the others see clean images only."
    ]
    for attack in attacks:
        notes += not_learned(attack, [each for each in here if each.attack == attack])
    notes += [*fine_tuned(here), *other_recipes(here), *other_code(here)]
    heads = ["detector", "by", *attacks, "average", "clean networks flagged", "measured on"]
    title = f"Table 4: detection, setting {marks.setting(setting)}"
    return Table(f"table4-{number}", title, heads, lines, notes)


def _detected(group: Sequence[Result], attacks: Sequence[str]) -> list[str]:
    """Return a cell for each attack, the average, and the share of clean networks flagged."""
    shares = [_flagged([each for each in group if each.attack == attack]) for attack in attacks]
    known = [share for share, _ in shares if share is not None]
    average = f"{statistics.mean(known):.2f}" if known else MISSING
    average += f", {len(known)} of {len(attacks)}" if 0 < len(known) < len(attacks) else ""
    alarms = _flagged([each for each in group if each.is_clean])[1]
    return [*(text for _, text in shares), average, alarms]


def _flagged(group: Sequence[Result]) -> tuple[float | None, str]:
    """Return the share of networks that are called backdoored, in percent, and how to write it."""
    done = [each for each in group if each.is_done]
    if not done:
        return None, "error" if group else MISSING
    count = sum(each.content["verdict"] == "backdoored" for each in done)
    told = f"{100 * count / len(done):.2f} ({count} of {len(done)})"
    failed = len(group) - len(done)
    return 100 * count / len(done), told + (f", {failed} failed" if failed else "")

"""Figures 3 and 4 in numbers: results of a method by its options, and by the size of its data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lightning_mnp.benchmark.pairs import cell_of
from lightning_mnp.benchmark.results import Marks, Result, Setting, settings_of
from lightning_mnp.benchmark.table import Table, head

__all__ = ["by_options", "by_size", "comparable", "without_trials"]


def without_trials(results: Sequence[Result]) -> tuple[list[Result], list[str]]:
    """Leave out trials: methods with options that were run on a single attack out of several.

    Args:
        results: The results of one setting.

    Returns:
        The others, and the labels of the trials.
    """
    attacks = {each.attack for each in results if not each.is_clean}
    labels = dict.fromkeys(each.label for each in results if each.has_options)
    trials = [
        label
        for label in labels
        if len(attacks) > 1 and len({r.attack for r in results if r.label == label}) == 1
    ]
    return [each for each in results if each.label not in trials], trials


def comparable(results: Sequence[Result]) -> list[list[Result]]:
    """Part results into groups that can be compared.

    A group is of one setting. Numbers of clean images that had fewer attacks than others are left
    out. If not all methods were run on the networks of all seeds, each seed is a group of its own:
    means over different networks do not compare.

    Args:
        results: The results.

    Returns:
        The groups, in the order of settings and seeds.
    """
    return [part for group in _without_other_sizes(results) for part in _by_seed(group)]


def _by_seed(group: list[Result]) -> list[list[Result]]:
    seeds = sorted({each.network["seed"] for each in group})
    shown = without_trials(group)[0]
    methods = [{r.label for r in shown if r.network["seed"] == seed} for seed in seeds]
    if all(each == methods[0] for each in methods):
        return [group]
    return [[each for each in group if each.network["seed"] == seed] for seed in seeds]


def _without_other_sizes(results: Sequence[Result]) -> list[list[Result]]:
    groups = [[r for r in results if r.setting == setting] for setting in settings_of(results)]
    most: dict[Setting, int] = {}
    for group in groups:
        usual = replace(group[0].setting, size=0)
        most[usual] = max(most.get(usual, 0), _attacks(group))
    return [each for each in groups if _attacks(each) == most[replace(each[0].setting, size=0)]]


def _attacks(results: Sequence[Result]) -> int:
    return len({each.attack for each in results if not each.is_clean})


def by_options(results: Sequence[Result], marks: Marks) -> Table | None:
    """Make a table of trials of options, each beside the method as it is; None without trials.

    Args:
        results: All results.
        marks: Names what rows were measured on.
    """
    wanted = [r for r in results if r.task == "defense" and (r.network["usual"] or r.is_clean)]
    lines = []
    for setting in dict.fromkeys(each.setting for each in wanted):
        here = [each for each in wanted if each.setting == setting]
        for label in without_trials(here)[1]:
            group = [each for each in here if each.label == label]
            seeds = {each.network["seed"] for each in group}
            plain = [
                each
                for each in here
                if each.attack == group[0].attack and each.label == label.partition(" (")[0]
                if each.network["seed"] in seeds
            ]
            lines.append(
                [
                    group[0].attack,
                    head(label),
                    cell_of(group, "before", 1),
                    cell_of(group, digits=1),
                    cell_of(plain, digits=1),
                    marks.setting(setting),
                    marks.mark(group),
                ]
            )
    heads = ["attack", "method", "before", "after", "after, without these options", "setting"]
    title = "Other options, on one attack: CA / ASR in percent"
    return Table("options", title, [*heads, "measured on"], lines) if lines else None


def by_size(results: Sequence[Result], marks: Marks) -> Table | None:
    """Make a table of methods that had different numbers of clean images; None if none had.

    Args:
        results: All results.
        marks: Names what rows were measured on.
    """
    groups: dict[tuple[Setting, str, str, int], list[Result]] = {}
    for each in results:
        if each.task == "defense" and (each.network["usual"] or each.is_clean):
            key = replace(each.setting, size=0), each.attack, each.label, each.network["seed"]
            groups.setdefault(key, []).append(each)
    groups = {key: group for key, group in groups.items() if len(_sizes(group)) > 1}
    sizes = sorted({size for group in groups.values() for size in _sizes(group)})
    lines = []
    for (_, attack, label, _), group in groups.items():
        first = min(each.setting for each in group)
        parts = [[each for each in group if each.setting.size == size] for size in sizes]
        lines.append(
            [
                attack,
                head(label),
                cell_of(group, "before", 1),
                *(cell_of(part, digits=1) for part in parts),
                *([marks.setting(first), marks.mark(group)]),
            ]
        )
    heads = ["attack", "method", "before", *map(str, sizes), "setting of the fewest", "measured on"]
    title = "By the number of clean images: CA / ASR in percent"
    return Table("sizes", title, heads, lines) if lines else None


def _sizes(group: Sequence[Result]) -> set[int]:
    return {each.setting.size for each in group}

"""What reviewers ask for beside the paper's tables: harm, cost, spread, errors."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence

from lightning_mnp.benchmark.notes import not_counted, other_recipes
from lightning_mnp.benchmark.results import Marks, Result, Setting, settings_of
from lightning_mnp.benchmark.table import Table, head

__all__ = ["cost", "every_cell", "failures", "harm", "spread"]

_FIGURES = ("verdict", "target_class", "score", "pruned", "seconds", "passes", "peak_mib")


def _groups(results: Sequence[Result]) -> Iterator[tuple[Setting, str, list[Result]]]:
    """Go through results by setting and method; only those with figures."""
    done = [each for each in results if each.is_done]
    for setting in settings_of(done):
        here = [each for each in done if each.setting == setting]
        for label in sorted({each.label for each in here}):
            yield setting, label, [each for each in here if each.label == label]


def harm(results: Sequence[Result], marks: Marks) -> Table | None:
    """Make a table of what defenses do to clean networks; None if there are no such results.

    Args:
        results: All results.
        marks: Names what rows were measured on.
    """
    lines = []
    wanted = [each for each in results if each.is_clean and each.task == "defense"]
    for setting, label, group in _groups(wanted):
        drops = [each.percent("before")[0] - each.percent("after")[0] for each in group]
        flagged = sum(each.content["verdict"] == "backdoored" for each in group)
        judged = any(each.content["verdict"] is not None for each in group)
        lines.append(
            [
                head(label),
                f"{statistics.mean(each.percent('before')[0] for each in group):.2f}",
                f"{statistics.mean(each.percent('after')[0] for each in group):.2f}",
                f"{statistics.mean(drops):.2f}",
                f"{max(drops):.2f}",
                f"{statistics.mean(each.content['pruned'] for each in group):.1f}",
                f"{flagged} of {len(group)}" if judged else "no verdict",
                str(len(group)),
                marks.setting(setting),
                marks.mark(group),
            ]
        )
    heads = ["defense", "CA before", "CA after", "mean drop", "largest drop", "filters pruned"]
    heads += ["flagged", "networks", "setting", "measured on"]
    title = "Harm to clean networks, in percent"
    return Table("harm", title, heads, lines) if lines else None


def cost(results: Sequence[Result], marks: Marks) -> Table | None:
    """Make a table of time, passes and memory; None if there are no results.

    Args:
        results: All results.
        marks: Names what rows were measured on.
    """
    lines = []
    for task in ("defense", "detector"):
        for setting, label, group in _groups([each for each in results if each.task == task]):
            for mark in dict.fromkeys(marks.mark([each]) for each in group):
                part = [each for each in group if marks.mark([each]) == mark]
                memory = [r.content["peak_mib"] for r in part if r.content["peak_mib"] is not None]
                lines.append(
                    [
                        head(label),
                        task,
                        f"{statistics.median(r.content['seconds'] for r in part):.1f}",
                        f"{statistics.median(r.content['passes'] for r in part):.0f}",
                        f"{max(memory):.0f}" if memory else "not known",
                        str(len(part)),
                        marks.setting(setting),
                        mark,
                    ]
                )
    heads = ["method", "as", "seconds", "passes", "peak MiB", "cells", "setting", "measured on"]
    notes = [
        "Medians; the peak is the highest. A pass is one image, forward and backward; forward "
        "alone is a third. On a CPU, the peak is that of the whole process."
    ]
    notes += not_counted(results)
    return Table("cost", "Cost", heads, lines, notes) if lines else None


def spread(results: Sequence[Result], marks: Marks) -> Table | None:
    """Make a table of how results differ between seeds; None if there is one seed only.

    Args:
        results: All results.
        marks: Names what rows were measured on.
    """
    lines, notes = [], dict[str, None]()
    for setting, label, group in _groups([each for each in results if each.task == "defense"]):
        notes |= dict.fromkeys(other_recipes(group))
        kinds = sorted({_kind(each) for each in group})
        for kind in kinds:
            part = [each for each in group if _kind(each) == kind]
            if len(part) < 2:
                continue
            pairs = [each.percent("after") for each in part]
            rates = [rate for _, rate in pairs if rate is not None]
            networks = {each.network_key for each in part}
            lines.append(
                [
                    kind,
                    head(label),
                    _range([ca for ca, _ in pairs]),
                    _range(rates) if rates else "-",
                    f"{len(part)} cells, {len(networks)} networks",
                    marks.setting(setting),
                    marks.mark(part),
                ]
            )
    heads = ["attack", "defense", "CA", "ASR", "over", "setting", "measured on"]
    title = "Spread over seeds: mean (lowest to highest), in percent"
    return Table("spread", title, heads, lines, [*notes]) if lines else None


def _kind(result: Result) -> str:
    rate, mode = result.network["rate"], result.network["mode"]
    name = result.attack if "+" not in result.network["attack"] else result.network["attack"]
    return name if result.network["usual"] else f"{name}, {mode}, rate {rate}"


def _range(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def failures(results: Sequence[Result], marks: Marks) -> Table | None:
    """Make a table of cells that ended with an error; None if there is none.

    Args:
        results: All results.
        marks: Names what rows were measured on.
    """
    lines = []
    for each in (result for result in results if not result.is_done):
        error = each.content["error"]
        lines.append([each.name, error["type"], error["message"][:300], marks.mark([each])])
    lines = [[cell.replace("\n", " ") for cell in line] for line in lines]
    heads = ["cell", "error", "message", "measured on"]
    return Table("errors", "Cells that failed", heads, lines) if lines else None


def every_cell(results: Sequence[Result]) -> Table:
    """Make a table of all cells, one in each row, for further work.

    Args:
        results: All results.
    """
    names = ["attack", "attack_class", "mode", "rate", "seed", "data", "base", "architecture"]
    names += ["width", "epochs"]
    lines = []
    for each in results:
        content, cell, machine = each.content, each.content["cell"], each.content["machine"]
        before, after = content.get("before") or {}, content.get("after") or {}
        row = [each.name, cell["task"], cell["label"], cell["defense_size"], cell["defense_seed"]]
        row += [each.network[name] for name in names]
        row.append(json.dumps(each.network.get("fine_tuning", {}), sort_keys=True))
        row += [before.get("CA"), before.get("ASR"), after.get("CA"), after.get("ASR")]
        row += [content.get(name) for name in _FIGURES]
        row += [content["status"], machine["device"], machine["name"], machine["threads"]]
        row += [machine["versions"]["torch"], content["code"], content["date"]]
        lines.append(["" if value is None else str(value) for value in row])
    heads = ["cell", "task", "method", "defense_size", "defense_seed", *names, "fine_tuning"]
    heads += ["CA_before", "ASR_before", "CA_after", "ASR_after", *_FIGURES]
    heads += ["status", "device", "machine", "threads", "torch", "code", "date"]
    return Table("cells", "All cells", heads, lines)

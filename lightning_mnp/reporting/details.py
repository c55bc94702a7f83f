"""The lower part of a report's page: curves, filters, classes, settings and digests."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from lightning_mnp.config.dotted import dotted
from lightning_mnp.report import DefenseReport
from lightning_mnp.report.words import Words
from lightning_mnp.reporting.charts import line_chart, share_bar
from lightning_mnp.reporting.curves import harm_curve, suppression_curves, trace_curves
from lightning_mnp.reporting.markup import Markup, join, tag

__all__ = [
    "class_table",
    "curves",
    "file_name",
    "moment",
    "origin",
    "purification",
    "settings",
]

_MOST_ROWS = 50  # of a table
_MOST_NUMBERS = 40  # of filters in one row


def file_name(report: DefenseReport) -> str:
    """Return the name of the file that was audited.

    Args:
        report: The outcome.
    """
    return "a network in memory" if report.weights_file is None else report.weights_file.name


def moment(report: DefenseReport) -> str:
    """Return when the report was made, for people.

    Args:
        report: The outcome.
    """
    return report.date.replace("T", " ").replace("+00:00", " UTC")


def curves(report: DefenseReport) -> Markup | None:
    """Return how accuracy falls in clean suppression, and what pruning does, as charts.

    Args:
        report: The outcome.
    """
    charts = [*_suppression(report), *_pruning(report)]
    if not charts:
        return None
    return tag("section", tag("h2", "Curves"), tag("div", *charts, class_="charts"))


def _suppression(report: DefenseReport) -> Iterator[Markup]:
    lines = list(suppression_curves(report).items())
    if lines:
        ends = ", ".join(f"{curve[-1]:.0%}" for _, curve in lines)
        label = f"Accuracy falls in {len(lines)} runs of clean suppression; it ends at {ends}"
        yield tag(
            "div",
            tag("h3", "Accuracy while the network unlearns its task"),
            line_chart(lines, across="pass", first=1, label=label, percent=True),
        )


def _pruning(report: DefenseReport) -> Iterator[Markup]:
    harm, traces = harm_curve(report), list(trace_curves(report).items())
    if not harm:
        return
    pruned = len(report.pruned)
    if traces:
        ends = ", ".join(f"{levels[-1]:.0%}" for _, levels in traces)
        label = f"What is left of the backdoor's traces: {ends}; filters pruned: {pruned}"
        yield tag(
            "div",
            tag("h3", "What is left of the backdoor"),
            line_chart(traces, across="step of pruning", first=0, label=label, percent=True),
        )
    label = f"Harm to clean images: {harm[-1]:.3g} nats; filters pruned: {pruned}"
    yield tag(
        "div",
        tag("h3", "Harm to clean images, in nats"),
        line_chart([("harm", harm)], across="step of pruning", first=0, label=label),
    )


def purification(report: DefenseReport) -> Markup | None:
    """Return a table of the layers in which filters were pruned or turned down.

    Args:
        report: The outcome.
    """
    if not report.changes:
        return None
    pruned = defaultdict(list)
    for layer, index in report.pruned:
        pruned[layer].append(index)
    sizes = {str(layer.get("name")): layer.get("filters") for layer in report.layers}
    names = dict.fromkeys([*sizes, *pruned, *report.pruning.masks])
    rows = []
    for name in names:
        down = sum(0 < value < 0.99 for value in report.pruning.masks.get(name, ()))
        if not (pruned[name] or down):
            continue
        numbers = ", ".join(str(index) for index in sorted(pruned[name])[:_MOST_NUMBERS])
        more = " …" if len(pruned[name]) > _MOST_NUMBERS else ""
        rows.append(
            tag(
                "tr",
                tag("td", tag("code", name)),
                _number(size if isinstance(size := sizes.get(name), int) else "?"),
                tag("td", numbers + more or "-"),
                _number(down),
            )
        )
    if not rows:
        return None
    head = tag(
        "tr",
        tag("th", "layer"),
        tag("th", "filters", class_="number"),
        tag("th", "pruned filters, by number"),
        tag("th", "turned down", class_="number"),
    )
    left = len(names) - len(rows)
    note = (
        tag("p", f"Layers without such filters: {left:,}.", class_="muted small") if left else None
    )
    return tag("section", tag("h2", "Filters that were changed"), tag("table", head, *rows), note)


def class_table(words: Words) -> Markup | None:
    """Return the accuracy of each class, before and after, those first that lose most.

    Args:
        words: The words of the report.
    """
    report = words.report
    before, after = report.class_accuracy_before, report.class_accuracy_after
    if not before:
        return None

    def loss(index: int) -> float:
        return before[index] - after[index] if index in after else 0.0

    order = sorted(before)
    if after:
        order.sort(key=loss, reverse=True)
    counts = {} if report.defense_set is None else report.defense_set.classes
    rows = []
    for index in order[:_MOST_ROWS]:
        bars = [share_bar(before[index], 0, 1, "quiet")]
        if index in after:
            bars.append(share_bar(after[index], 0, 1, "first"))
        rows.append(
            tag(
                "tr",
                tag("td", words.name(index)),
                _number(counts.get(index, "?")),
                tag("td", *bars, class_="bar"),
                _number(f"{before[index]:.0%}"),
                _number(f"{after[index]:.0%}") if index in after else None,
            )
        )
    head = tag(
        "tr",
        tag("th", "class"),
        tag("th", "images", class_="number"),
        tag("th", ""),
        tag("th", "before", class_="number"),
        tag("th", "purified", class_="number") if after else None,
    )
    left = len(order) - len(rows)
    more = tag("p", f"and {left:,} more classes", class_="muted small") if left else None
    return tag(
        "section", tag("h2", "Accuracy by class, on clean images"), tag("table", head, *rows), more
    )


def settings(report: DefenseReport) -> Markup | None:
    """Return tables of options, versions, digests and cost, and what was left alone; they fold.

    Args:
        report: The outcome.
    """
    file, data = report.weights_file, report.defense_set
    digests = {
        "file": None if file is None else f"{file.name} ({file.bytes:,} bytes)",
        "SHA-256 of the file": None if file is None else file.sha256,
        "SHA-256 of the weights": report.weights_sha256 or None,
        "clean images": None if data is None else f"{data.images:,} of shape {data.shape}",
        "SHA-256 of the clean images": None if data is None else data.sha256,
    }
    spent = {
        name: f"{seconds:.1f} s, {report.passes.get(name, math.nan):,.0f} image passes"
        for name, seconds in report.seconds.items()
    }
    suppression = {
        f"run {index}": f"accuracy {run.accuracy:.0%} after {run.steps} steps ({run.stopped}); "
        f"pile-up {run.pile_up:.0%} on class {run.top_class}; "
        f"detection ratio {run.detection_ratio:.3f} (Eq. 8)"
        for index, run in enumerate(report.runs, 1)
    }
    parts = (
        _folded("Digests of file, weights and images", digests),
        _folded("Suppression runs", suppression),
        _folded("Options", dotted(report.config)),
        _folded("Versions", report.versions),
        _folded("Time and image passes by phase", spent),
        _folded("Convolutions left alone", dict(report.skipped)),
    )
    return tag("section", tag("h2", "Details"), *parts) if any(parts) else None


def _folded(title: str, content: Mapping[str, Any]) -> Markup | None:
    rows = [
        tag("tr", tag("td", name), tag("td", tag("code", str(value))))
        for name, value in content.items()
        if value is not None
    ]
    return tag("details", tag("summary", title), tag("table", *rows)) if rows else None


def _number(value: str | int) -> Markup:
    return tag("td", f"{value:,}" if isinstance(value, int) else value, class_="number")


def origin(report: DefenseReport) -> Markup:
    """Return what made the page, and when.

    Args:
        report: The outcome.
    """
    version = report.versions.get("lightning-mnp", "of an unknown version")
    made = f"Made by lightning-mnp {version} {moment(report)}".strip() + "."
    limits = (
        "A verdict is evidence and no proof: a network called clean may carry a backdoor of a kind "
        "that leaves no such signal, and a network called backdoored may carry none."
    )
    return tag("footer", join(tag("p", limits), tag("p", made)))

from __future__ import annotations

import math

from reports import full_report

from lightning_mnp.report import DefenseReport, PruningReport, RunResult
from lightning_mnp.report.words import Words
from lightning_mnp.reporting.details import class_table, curves, purification, settings


def test_nothing_is_shown_of_what_is_not_known() -> None:
    report = DefenseReport("clean")
    assert curves(report) is purification(report) is settings(report) is None
    assert class_table(Words(report)) is None


def test_curves_that_are_too_short_or_have_no_trace() -> None:
    runs = [RunResult(0.3, 0.1, (1, 2), 0, 0.5, "it took no step")]
    assert curves(DefenseReport("clean", runs=runs)) is None
    assert curves(DefenseReport("clean", pruning=PruningReport(curve=[[0.0, 1.0]]))) is None
    step = PruningReport(counts=[0, 2], curve=[[0.0], [0.5]])
    both = [("conv1", 0), ("conv1", 1)]
    bare = curves(DefenseReport("clean", pruned=both, pruning=step))
    assert bare is not None
    assert "Harm to clean images: 0.5 nats; filters pruned: 2" in bare
    assert "What is left" not in bare
    holes = PruningReport(curve=[[0.0, 1.0], [math.nan, math.nan]])
    assert "nan," not in str(curves(DefenseReport("clean", pruning=holes)))


def test_classes_that_lose_most_come_first() -> None:
    table = str(class_table(Words(full_report())))
    assert table.index("1 (dog)") < table.index("0 (cat)")
    before = str(class_table(Words(full_report(class_accuracy_after={}))))
    assert before.index("0 (cat)") < before.index("1 (dog)")
    assert "purified" not in before


def test_long_lists_of_filters_are_cut() -> None:
    pruned = [("conv1", index) for index in range(100)]
    table = str(purification(full_report(pruned=pruned, pruning=PruningReport())))
    assert "37, 38, 39 …" in table
    assert "Layers without such filters: 2." in table

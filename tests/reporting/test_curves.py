from __future__ import annotations

from reports import full_report

from lightning_mnp.report import DefenseReport, PruningReport
from lightning_mnp.reporting.curves import harm_curve, suppression_curves, trace_curves


def test_curves_of_a_full_report() -> None:
    report = full_report()
    assert suppression_curves(report) == {"run 1": (0.9, 0.5, 0.2)}
    assert trace_curves(report) == {"patch": [1.0, 0.2]}
    assert harm_curve(report) == [0.0, 0.01]


def test_what_is_no_curve() -> None:
    report = DefenseReport("clean")
    assert suppression_curves(report) == trace_curves(report) == {}
    assert harm_curve(report) == []
    point = DefenseReport("clean", pruning=PruningReport(curve=[[0.0, 1.0]], traces=["patch"]))
    assert trace_curves(point) == {}
    assert harm_curve(point) == []


def test_traces_without_a_name_are_numbered() -> None:
    pruning = PruningReport(curve=[[0.0, 1.0, 0.5], [0.1, 0.9, 0.4]], traces=["patch"])
    report = DefenseReport("clean", pruning=pruning)
    assert trace_curves(report) == {"patch": [1.0, 0.9], "trace 0": [0.5, 0.4]}

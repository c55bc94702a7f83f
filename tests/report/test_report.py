from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from lightning_mnp.report import DefenseReport, RunResult

RUN = RunResult(0.25, 0.1, (2, 5, 1), steps=12, accuracy=0.2, stopped="the accuracy fell")


def make(**changes: Any) -> DefenseReport:
    content: dict[str, Any] = {
        "verdict": "backdoored",
        "detection_ratio": 0.3456,
        "pile_up": 0.625,
        "target_class": 1,
        "reasons": ["the ratio is low"],
        "runs": [RUN, RunResult(0.5, 0.2, (8, 0, 0), 11, 0.1, "")],
        "pruned": [("layer1.0.conv1", 3), ("conv1", 0)],
        "scores": [1.25, 1.5],
        "filters": 30,
        "accuracy_before": 0.85,
        "accuracy_after": 0.84,
        "layers": [{"name": "conv1", "filters": 4}],
        "skipped": [("head", "classifier head: its filters are classes")],
        "defense_set": {"images": 8, "classes": {0: 4, 1: 4}},
        "config": {"runs": 2, "include": ["*"]},
        "seconds": {"masks": 1.5},
        "versions": {"torch": "2"},
        "warnings": ["M1 of run 1 stopped early"],
        "model": nn.Linear(2, 2),
    }
    return DefenseReport(**{**content, **changes})


def test_pile_up_of_a_run() -> None:
    assert (RUN.top_class, RUN.pile_up) == (1, 5 / 8)
    assert RunResult(1, 1, (3, 3, 0), 0, 0, "").top_class == 0


@pytest.mark.parametrize(("verdict", "code"), [("clean", 0), ("backdoored", 3), ("undecided", 4)])
def test_exit_codes(verdict: Any, code: int) -> None:
    assert make(verdict=verdict).exit_code == code


def test_json_holds_everything_but_the_model() -> None:
    report = make()
    content = json.loads(report.to_json())
    assert content == json.loads(json.dumps(report.to_dict()))
    assert set(content) == set(vars(report)) - {"model"}
    assert content["pruned"] == [["layer1.0.conv1", 3], ["conv1", 0]]
    assert content["defense_set"]["classes"] == {"0": 4, "1": 4}
    assert content["runs"][0] == {
        "detection_ratio": 0.25,
        "correlation": 0.1,
        "predictions": [2, 5, 1],
        "steps": 12,
        "accuracy": 0.2,
        "stopped": "the accuracy fell",
        "pile_up": 0.625,
        "top_class": 1,
    }


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_become_null(number: float) -> None:
    run = RunResult(number, number, (1, 0), 0, number, "")
    report = make(detection_ratio=number, runs=[run], seconds={"masks": number}, scores=[number])

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    content = json.loads(report.to_json(), parse_constant=refuse)
    assert content["detection_ratio"] is None
    assert content["runs"][0]["detection_ratio"] is None
    assert content["runs"][0]["accuracy"] is None
    assert content["seconds"] == {"masks": None}
    assert content["scores"] == [None]
    assert content["pile_up"] == 0.625


def test_the_smallest_report() -> None:
    report = DefenseReport("undecided", math.nan, 0.1)
    assert json.loads(report.to_json())["accuracy_before"] is None
    assert str(report).splitlines()[0] == "verdict: undecided"
    assert "model" not in repr(report)


def test_a_dict_shares_nothing_with_the_report() -> None:
    report = make()
    before = copy.deepcopy(report.to_dict())
    content = report.to_dict()
    content["reasons"].append("more")
    content["config"]["include"].append("more")
    assert report.to_dict() == before


# --- saving ------------------------------------------------------------------------------------


def test_save_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "report.json"
    make(filters=1).save(path)
    make(filters=2).save(str(path))
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == make(filters=2).to_dict() | json.loads(text)
    assert json.loads(text)["filters"] == 2
    assert text.endswith("}\n")
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    with pytest.raises(TypeError, match="not JSON serializable"):
        make(config={"object": object()}).save(path)
    assert path.read_text() == "old"
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        make().save(tmp_path / "folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "report.json"]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_saved_report_has_the_permissions_of_a_new_file(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    make().save(tmp_path / "report.json")
    modes = [(tmp_path / name).stat().st_mode for name in ("other", "report.json")]
    assert modes[0] == modes[1]


# --- for readers -------------------------------------------------------------------------------


def test_text() -> None:
    assert str(make()).splitlines() == [
        "verdict: backdoored",
        "target class: 1",
        "detection ratio: 0.346 (runs: 0.25 to 0.50)",
        "pile-up on one class: 62.5%",
        "  - the ratio is low",
        "filters pruned: 2 of 30",
        "accuracy on the defense set: 85.0%, after pruning 84.0%",
        "warning: M1 of run 1 stopped early",
    ]


def test_text_of_an_audit() -> None:
    report = make(
        verdict="clean", target_class=None, runs=[RUN], pruned=[], accuracy_after=None, warnings=[]
    )
    assert str(report).splitlines() == [
        "verdict: clean",
        "detection ratio: 0.346",
        "pile-up on one class: 62.5%",
        "  - the ratio is low",
        "filters pruned: 0 of 30",
        "accuracy on the defense set: 85.0%",
    ]


def test_metrics() -> None:
    assert make().metrics() == {
        "mnp/detection_ratio": 0.3456,
        "mnp/pile_up": 0.625,
        "mnp/backdoored": 1.0,
        "mnp/pruned_filters": 2.0,
        "mnp/defense_accuracy_before": 0.85,
        "mnp/defense_accuracy_after": 0.84,
    }
    audit = make(verdict="undecided", accuracy_after=None, pruned=[]).metrics()
    assert audit["mnp/backdoored"] == audit["mnp/pruned_filters"] == 0.0
    assert "mnp/defense_accuracy_after" not in audit

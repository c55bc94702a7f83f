from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from reports import full_report
from torch import nn

from lightning_mnp.report import (
    DefenseReport,
    DefenseSetSummary,
    PruningReport,
    ReferenceRate,
    ReportError,
    RunResult,
    SecondAudit,
    Signal,
    SurrogateTrigger,
    TriggerExample,
    WeightsFile,
)
from lightning_mnp.report.report import is_report
from lightning_mnp.reporting import html

SIGNAL = Signal("patch", 1.5, 1, 1.275, 0.85, "a patch", {0: -0.5, 1: 1.0})
RUN = RunResult(0.25, 0.1, (2, 5, 1), 12, 0.2, stopped="the accuracy fell", curve=(0.75, 0.2))
EXAMPLE = TriggerExample(label=0, before=0, after=1, clean="YQ==", triggered="Yg==")
TRIGGER = SurrogateTrigger("patch", 1, 0.97, 64, "Yw==", (EXAMPLE, EXAMPLE))


def make(**changes: Any) -> DefenseReport:
    content: dict[str, Any] = {
        "verdict": "backdoored",
        "detection_ratio": 0.3456,
        "target_class": 1,
        "reasons": ["the ratio is low"],
        "runs": [RUN, RunResult(0.5, 0.2, (8, 0, 0), 11, 0.1, "")],
        "pruned": [("layer1.0.conv1", 3), ("conv1", 0)],
        "pruning": PruningReport(scores=[1.25, 1.5], masks={"conv1": [0.0, 0.5]}),
        "signals": [SIGNAL],
        "triggers": [TRIGGER],
        "class_names": ["cat", "dog"],
        "class_accuracy_before": {0: 0.75, 1: 1.0},
        "class_accuracy_after": {0: 0.5, 1: 1.0},
        "weights_file": WeightsFile("model.pt", "cd34", 4096),
        "filters": 30,
        "accuracy_before": 0.85,
        "accuracy_after": 0.84,
        "layers": [{"name": "conv1", "filters": 4}],
        "skipped": [("head", "classifier head: its filters are classes")],
        "defense_set": DefenseSetSummary(8, [3, 32, 32], {0: 4, 1: 4}, "ab12"),
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
    unchanged = make(verdict=verdict, pruned=[], pruning=PruningReport())
    assert (unchanged.verdict_after, unchanged.exit_code) == (verdict, code)
    again = make(reaudit=SecondAudit(verdict, 0.1, None, False, 0.9, 0.2, []))
    assert (again.verdict, again.verdict_after, again.exit_code) == ("backdoored", verdict, code)


@pytest.mark.parametrize("changes", [{"pruned": []}, {"pruning": PruningReport()}])
def test_a_changed_network_that_is_not_audited_again_is_undecided(changes: Any) -> None:
    for verdict in ("clean", "backdoored"):
        report = make(verdict=verdict, **changes)
        assert (report.verdict_after, report.exit_code) == ("undecided", 4)


def test_json_holds_everything_but_the_model() -> None:
    report = make()
    content = json.loads(report.to_json())
    assert content == json.loads(json.dumps(report.to_dict()))
    assert set(content) == set(vars(report)) - {"model"} | {"schema"}
    assert content["schema"] == 1
    assert content["pruned"] == [["layer1.0.conv1", 3], ["conv1", 0]]
    assert content["defense_set"]["classes"] == {"0": 4, "1": 4}
    assert content["triggers"][0]["examples"][0] == {
        "label": 0,
        "before": 0,
        "after": 1,
        "clean": "YQ==",
        "triggered": "Yg==",
    }
    assert content["class_accuracy_after"] == {"0": 0.5, "1": 1.0}
    assert content["weights_file"] == {"name": "model.pt", "sha256": "cd34", "bytes": 4096}
    assert content["runs"][0] == {
        "detection_ratio": 0.25,
        "correlation": 0.1,
        "predictions": [2, 5, 1],
        "steps": 12,
        "accuracy": 0.2,
        "stopped": "the accuracy fell",
        "curve": [0.75, 0.2],
        "pile_up": 0.625,
        "top_class": 1,
    }


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_become_null(number: float) -> None:
    run = RunResult(number, number, (1, 0), 0, number, "")
    pruning = PruningReport(scores=[number])
    report = make(detection_ratio=number, runs=[run], seconds={"masks": number}, pruning=pruning)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    content = json.loads(report.to_json(), parse_constant=refuse)
    assert content["detection_ratio"] is None
    assert content["runs"][0]["detection_ratio"] is None
    assert content["runs"][0]["accuracy"] is None
    assert content["seconds"] == {"masks": None}
    assert content["pruning"]["scores"] == [None]


def test_the_smallest_report() -> None:
    report = DefenseReport("undecided")
    assert json.loads(report.to_json())["accuracy_before"] is None
    assert str(report).startswith("UNDECIDED. ")
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


def test_metrics() -> None:
    assert make().metrics() == {
        "mnp/detection_ratio": 0.3456,
        "mnp/pile_up": (0.625 + 1.0) / 2,
        "mnp/backdoored": 1.0,
        "mnp/undecided": 0.0,
        "mnp/judged": 1.0,
        "mnp/strength/patch": 1.5,
        "mnp/target_class": 1.0,
        "mnp/pruned_filters": 2.0,
        "mnp/defense_accuracy_before": 0.85,
        "mnp/defense_accuracy_after": 0.84,
    }
    audit = make(
        verdict="undecided", judged=False, target_class=None, accuracy_after=None, pruned=[]
    ).metrics()
    assert audit["mnp/judged"] == 0.0
    assert "mnp/target_class" not in audit
    assert audit["mnp/backdoored"] == audit["mnp/pruned_filters"] == 0.0
    assert audit["mnp/undecided"] == 1.0
    clean = make(verdict="clean").metrics()
    assert clean["mnp/backdoored"] == clean["mnp/undecided"] == 0.0
    assert "mnp/defense_accuracy_after" not in audit
    unknown = make(score=math.inf, accuracy_before=math.nan, detection_ratio=math.nan).metrics()
    assert all(math.isfinite(value) for value in unknown.values())
    assert clean.keys() - unknown.keys() == {
        "mnp/detection_ratio",
        "mnp/defense_accuracy_before",
    }


def test_a_signal_is_found_by_its_name() -> None:
    report = make()
    assert report.signal("patch") is SIGNAL
    assert report.signal("warp") is None


@pytest.mark.parametrize(
    ("strength", "decides", "counts"),
    [(0.99, True, False), (1.0, True, True), (1.0, False, False), (9.0, False, False)],
)
def test_a_signal_that_decides_counts_from_one_on(
    strength: float, decides: bool, counts: bool
) -> None:
    report = make(signals=[Signal("warp", strength, 0, 0.1, 0.5, "", decides=decides)])
    assert report.signals[0].counts is counts
    [content] = report.to_dict()["signals"]
    assert (content["counts"], content["decides"]) == (counts, decides)


# --- reading -----------------------------------------------------------------------------------

EXCHANGE = Signal("permutation", 2.0, None, 0.9, 0.46, "one patch", {0: 2, 1: 0, 2: 1})
PILE_UP = Signal("pile-up", 2.0, 1, 2.0, 1.0, "a pile-up", {0: 0.1, 1: 0.9}, decides=False)
AGAIN = SecondAudit("clean", 0.5, None, False, 0.9, 0.2, ["nothing stands out"])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reaudit": AGAIN, "rare_classes": {3: 1.5}, "weights_sha256": "00ff", "date": "2026"},
        {"reaudit": replace(AGAIN, score=math.nan), "target_class": None, "all_to_all": True},
        {"score": 0.5, "accuracy_after": None, "defense_set": None, "signals": []},
        {"triggers": [], "class_names": [], "weights_file": None, "class_accuracy_after": {}},
        {"target_class": None, "all_to_all": True, "signals": [EXCHANGE, PILE_UP]},
        {
            "pruning": PruningReport(
                [1.5], [[0.0, 1.0], [0.1, 0.5]], ["patch"], {"a": [1.0, 0.5]}, [0.0, 0.1]
            )
        },
    ],
)
def test_what_is_saved_is_read_back(changes: dict[str, Any], tmp_path: Path) -> None:
    report = make(**changes)
    report.save(tmp_path / "report.json")
    again = DefenseReport.load(tmp_path / "report.json")
    assert again.to_dict() == report.to_dict()
    assert again.model is None
    assert again.runs == report.runs
    assert again.signals == report.signals
    assert again.triggers == report.triggers
    assert again.weights_file == report.weights_file
    assert again.pruned == report.pruned
    assert again.pruning == report.pruning
    assert again.defense_set == report.defense_set
    assert str(again) == str(report)
    assert DefenseReport.from_dict(report.to_dict()).to_json() == report.to_json()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({}, "one without a schema"),
        ({"verdict": "clean", "pile_up": 0.2}, "one without a schema"),
        ({"schema": 0, "verdict": "clean"}, "schema 0"),
        ({"schema": 2, "verdict": "clean"}, "schema 2"),
        ([], "one without a schema"),
    ],
)
def test_another_schema_is_refused(content: Any, found: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(content))
    message = f"report.json: Expected a report of schema 1, .* but got {found}. .*anew"
    with pytest.raises(ReportError, match=message):
        DefenseReport.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"runs": None},
        {"verdict": "maybe"},
        {"pruned": [["conv1"]]},
        {"signals": [{"name": "patch"}]},
        {"signals": [{n: v for n, v in asdict(SIGNAL).items() if n != "decides"}]},
        {"pruning": {"scores": []}},
        {"reaudit": {"verdict": "clean"}},
        {"reaudit": {**asdict(AGAIN), "verdict": "<b>clean"}},
        {"triggers": [{"signal": "patch"}]},
        {"triggers": [{**asdict(TRIGGER), "examples": [{"label": 0}]}]},
        {"weights_file": {"name": "model.pt"}},
        {"score": "high"},
    ],
)
def test_a_report_in_which_something_is_wrong_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(
        ReportError, match=r"something is missing or wrong: .*\. Make the report anew"
    ):
        DefenseReport.from_dict({**make().to_dict(), **change})
    content = make().to_dict()
    name = next(iter(change))
    del content[name]
    with pytest.raises(ReportError, match=rf"it has no '{name}'\. Make the report anew"):
        DefenseReport.from_dict(content)


@pytest.mark.parametrize(
    ("change", "known"),
    [
        ({}, True),
        ({"schema": 2, "new": [], "signals": "of another form"}, True),
        ({"schema": 0}, True),
        ({"schema": "1"}, False),
        ({"schema": True}, False),
        ({"verdict": "passed"}, False),
        ({"verdict": []}, False),
    ],
)
def test_a_report_of_any_version_is_known(
    change: dict[str, Any], known: bool, tmp_path: Path
) -> None:
    path = tmp_path / "report.json"
    content = {**make().to_dict(), **change}
    path.write_text(json.dumps(content))
    assert is_report(path) == known


@pytest.mark.parametrize("name", ["schema", "verdict", "detection_ratio", "reasons", "pruned"])
def test_a_file_of_another_program_is_no_report(name: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    assert not is_report(path)
    content = make().to_dict()
    del content[name]
    for other in (json.dumps(content), "[]", "{}", "{no JSON", '{"schema": 1, "verdict": "clean"}'):
        path.write_text(other)
        assert not is_report(path)


RUN_READ, PRUNING_READ = asdict(RUN), asdict(PruningReport())
WHOLE = r"a whole number from 0 to 2\*\*63 - 1"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"score": 10**400}, "`score` to be a finite number or null, but got 1000"),
        ({"score": math.inf}, "`score` to be a finite number or null, but got inf"),
        ({"pruned": [["a", math.inf]]}, rf"`pruned\[0\]\[1\]` to be {WHOLE}, but got inf"),
        ({"pruned": [["a", 0, 0]]}, r"`pruned\[0\]` to be a list of two, but got a list"),
        (
            {"pruning": {**PRUNING_READ, "counts": [math.inf]}},
            rf"`pruning\.counts\[0\]` to be {WHOLE}, but got inf",
        ),
        (
            {"pruning": {**PRUNING_READ, "curve": [[], []]}},
            r"`pruning\.curve\[0\]` to be a list of 1 or more",
        ),
        (
            {"reference": {**asdict(ReferenceRate(1, 0, 0.0, 0.5, "networks")), "networks": 0}},
            r"`reference\.networks` to be a whole number from 1 .*, but got 0",
        ),
        (
            {"runs": [{**RUN_READ, "predictions": []}]},
            r"`runs\[0\]\.predictions` to be a list of numbers that are not all 0, but got a list "
            "with nothing in it",
        ),
        ({"runs": [{**RUN_READ, "predictions": [0, 0]}]}, "numbers that are not all 0, but got"),
        ({"config": []}, "`config` to be an object, but got a list"),
        ({"config": {"verdict": 1}}, r"`config\.verdict` to be an object, but got 1"),
        (
            {"config": {"verdict": {"threshold": "high"}}},
            r"`config\.verdict\.threshold` to be a finite number, but got 'high'",
        ),
        (
            {"config": {"verdict": {"threshold": 0}}},
            r"`config\.verdict\.threshold` to be a number above 0, but got 0",
        ),
        ({"config": {"verdict": {"delta": None}}}, r"`config\.verdict\.delta` to be .*got null"),
        ({"layers": [3]}, r"`layers\[0\]` to be an object, but got 3"),
        ({"versions": [1]}, "`versions` to be an object, but got a list"),
        ({"date": 5}, "`date` to be text, but got 5"),
        ({"seconds": {"a": "b"}}, r"`seconds\.a` to be a finite number or null, but got 'b'"),
        ({"warnings": [1]}, r"`warnings\[0\]` to be text, but got 1"),
        ({"target_class": "abc"}, f"`target_class` to be {WHOLE}, but got 'abc'"),
        ({"judged": "no"}, "`judged` to be true or false, but got 'no'"),
        ({"verdict": "maybe"}, "`verdict` to be one of clean, backdoored, undecided, but got 'may"),
        (
            {"signals": [{**asdict(SIGNAL), "target_class": None, "classes": {"0": None}}]},
            r"`signals\[0\]\.classes` to be classes, each taken to another one, but got null",
        ),
        (
            {"signals": [{**asdict(SIGNAL), "classes": {"0": 2**64}}]},
            r"`signals\[0\]\.classes\.0` to be a whole number from -9223372036854775808",
        ),
    ],
)
def test_a_report_that_was_tampered_with_is_refused(
    change: dict[str, Any], told: str, tmp_path: Path
) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps({**make().to_dict(), **change}))
    with pytest.raises(ReportError, match=told):
        DefenseReport.load(path)


def places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Every part of a report: what holds it, and its name or number there."""
    if isinstance(content, (dict, list)):
        for name in list(content if isinstance(content, dict) else range(len(content))):
            yield content, name
            yield from places(content[name])


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_what_is_not_refused_can_be_shown(every: int) -> None:
    content = json.loads(full_report(all_to_all=True).to_json())
    shown = 0
    for number, (holder, name) in enumerate(places(content)):
        whole = holder[name]
        for place, odd in enumerate((None, 0, 1e308, [], {})):
            if (number + place) % every:
                continue
            holder[name] = odd
            try:
                report = DefenseReport.from_dict(content)
            except ReportError:
                continue
            finally:
                holder[name] = whole
            assert all((str(report), html(report), report.to_json(), report.metrics()))
            shown += 1
    assert shown > 100 / every


def test_numbers_that_are_not_known_are_read_as_such() -> None:
    content = make(seconds={"masks": math.nan}, passes={"masks": math.inf}).to_dict()
    report = DefenseReport.from_dict(content)
    assert math.isnan(report.seconds["masks"])
    assert report.to_dict() == content


def test_reports_of_earlier_versions_know_nothing_of_tuning() -> None:
    content = make().to_dict()
    del content["pruning"]["tuned"], content["pruning"]["cut"]
    pruning = DefenseReport.from_dict(content).pruning
    assert (pruning.tuned, pruning.cut) == (0.0, 0)


def test_files_that_are_no_reports_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(ReportError, match=r"`report` to be an existing file, but got .*a\.json"):
        DefenseReport.load(path, argument="report")
    path.write_text("{no JSON")
    with pytest.raises(ReportError, match=r"`path` to be a report as JSON, but .*a\.json is none"):
        DefenseReport.load(path)
    path.write_text("[" * 100_000)
    with pytest.raises(ReportError, match="as JSON"):
        DefenseReport.load(path)
    with path.open("wb") as file:
        file.truncate(2**28 + 1)  # a hole, which takes no space
    with pytest.raises(ReportError, match="268,435,457 bytes"):
        DefenseReport.load(path)


@pytest.mark.parametrize(
    ("changed", "options"),
    [
        (False, {}),
        (True, {"pruned": [("conv1", 0)]}),
        (True, {"pruning": PruningReport(masks={"conv1": [1.0, 0.5]})}),
        (True, {"pruning": PruningReport(tuned=0.01)}),
    ],
)
def test_a_network_is_changed_by_pruning_masks_or_tuning(
    changed: bool, options: dict[str, Any]
) -> None:
    assert DefenseReport("backdoored", **options).changes is changed

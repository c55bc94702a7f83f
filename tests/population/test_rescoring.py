from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.population.__main__ import main
from benchmarks.population.audits import read_audits
from benchmarks.population.rescoring import rescored

LEVELS = {str(index): -0.1 * index for index in range(10)}
EVEN = [4] * 10


def audit(predictions: list[int] | None = None, **values: dict[str, float]) -> dict[str, Any]:
    """An audit in which no class stands out, but for what is given of single signals."""
    classes = {"margin": {str(k): 29.0 - k for k in range(10)}, "patch": LEVELS, "warp": LEVELS}
    classes = {
        **classes,
        "pile-up": LEVELS,
        "reach": {str(k): 5.0 - 0.2 * k for k in range(10)},
        "permutation": {str(k): (k + 1) % 10 for k in range(10)},
    }
    run = {"detection_ratio": 0.5, "correlation": 0.3, "steps": 9, "accuracy": 0.2, "stopped": ""}
    return {
        "network": "x",
        "judged": True,
        "verdict": "clean",
        "version": "ab12",
        "accuracy_before": 0.6,
        "rare_classes": {},
        "runs": [{**run, "predictions": predictions or EVEN, "pile_up": 0.1, "top_class": 0}],
        "signals": [
            {"name": name, "value": 0.2, "classes": {**each, **values.get(name, {})}}
            for name, each in classes.items()
        ],
    }


def test_what_was_measured_is_judged_by_the_present_rules() -> None:
    calm = rescored(audit())
    assert (calm["verdict"], calm["target_class"], calm["all_to_all"]) == ("clean", None, False)
    assert calm["version"] == "ab12, judged anew"
    found = rescored(audit(patch={"7": 2.0}))
    assert (found["verdict"], found["target_class"]) == ("backdoored", 7)
    assert found["score"] == pytest.approx(2.0 / 0.9 / 1.5)
    bent = rescored(audit(warp={"5": 1.3}))
    assert (bent["verdict"], bent["target_class"]) == ("backdoored", 5)


def test_runs_and_rare_classes_have_their_part() -> None:
    piled = [4, 4, 40, *[4] * 7]
    assert rescored(audit(piled))["verdict"] == "clean"
    rare = {**audit(piled), "rare_classes": {"2": 1.8}}
    assert (rescored(rare)["verdict"], rescored(rare)["target_class"]) == ("backdoored", 2)
    for sure in (audit(piled, margin={"2": 60.0}), audit(piled, reach={"2": 20.0})):
        assert (rescored(sure)["verdict"], rescored(sure)["target_class"]) == ("backdoored", 2)
    unknown = audit(piled, reach=dict.fromkeys(map(str, range(10)), 0.0))
    assert rescored(unknown)["verdict"] == "clean"


def test_what_could_not_be_judged_stays_so() -> None:
    before = {**audit(patch={"7": 9.0}), "judged": False, "verdict": "undecided"}
    assert rescored(before) == before


def test_a_signal_of_another_version_is_refused() -> None:
    before = audit()
    before["signals"][0]["name"] = "overlay"
    with pytest.raises(ValueError, match="is known here, but got 'overlay' of another version"):
        rescored(before)


def test_kept_audits_of_the_present_rules_keep_their_verdict() -> None:
    """What the audits say, and what the figures in their files say, is the same."""
    present = [row for row in read_audits() if row["split"] == "reporting"]
    assert present, "no audit of a reporting network is kept"
    for row in present:
        again = rescored(row)
        assert (again["verdict"], again["target_class"]) == (row["verdict"], row["target_class"])
        if row["judged"]:
            assert again["score"] == pytest.approx(row["score"], rel=1e-3)


def test_the_table_is_of_what_was_judged_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {**audit(patch={"7": 9.0}), "network": "cnn-light-202", "set": 0, "kind": "clean"}
    row |= {"architecture": "cnn", "CA": 0.6, "ASR": None, "learned": None, "passes": 3.0}
    row |= {"detection_ratio": 0.5, "processor_seconds": 1.0}
    (tmp_path / "x.json").write_text(json.dumps(row))
    only = ["table", "--only", "cnn-light-202", "--results", str(tmp_path), "--sets", "1"]
    assert main(only) == 0
    assert "Networks flagged with any set: 0.0%" in capsys.readouterr().out
    assert main([*only, "--rescored"]) == 0
    assert "Networks flagged with any set: 100.0%" in capsys.readouterr().out

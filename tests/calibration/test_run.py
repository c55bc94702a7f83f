from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lightning_mnp import DefenseReport, MNPConfig, calibrate_threshold
from lightning_mnp.calibration.file import CalibrationFile, NetworkScore
from lightning_mnp.calibration.run import (
    TimedReport,
    check_networks,
    collect_scores,
    digest_networks,
    score_table,
)
from lightning_mnp.signals.population import read_population


def report(score: float, **changes: Any) -> DefenseReport:
    verdict: Any = "clean" if score < 1 else "backdoored"
    return DefenseReport(verdict, score=score, reasons=["as it is"], **changes)


def test_names_of_the_files() -> None:
    paths = [Path("a.pt"), Path("more/a.pt")]
    assert check_networks(paths, 0.4, MNPConfig()) == ["a.pt", "more/a.pt"]


@pytest.mark.parametrize(
    ("names", "rate", "message"),
    [
        (["a.pt", "b.pt", "./a.pt"], 0.3, r"name every file once, but got a\.pt again\. Leave"),
        (["a.pt", "b.pt"], 0.05, "Expected at least 19 clean networks for a `rate` of 0.05"),
        (["a.pt"], 2.0, "`rate` to be between 0 and 1, but got 2.0"),
    ],
)
def test_arguments_that_make_no_calibration(names: list[str], rate: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_networks([Path(name) for name in names], rate, MNPConfig())


def test_a_verdict_without_a_score_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'signals', whose score is calibrated, but got 'ratio'"):
        check_networks([Path("a.pt")], 0.5, MNPConfig.paper())


def test_digests_by_the_names_of_the_files() -> None:
    found = {"a": "1", "b": "2"}
    assert digest_networks(["a", "b"], found.__getitem__) == found
    with pytest.raises(ValueError, match=r"but a and c hold the same weights\. A copy says"):
        digest_networks(["a", "b", "c"], {**found, "c": "1"}.__getitem__)


def test_only_networks_without_a_score_are_audited(tmp_path: Path) -> None:
    kept = CalibrationFile(tmp_path / "calibration.json", {"seed": 0})
    known = NetworkScore("b", "2", 0.25, "clean", 3.0)
    kept.add(known)
    audited: list[str] = []
    lines: list[str] = []

    def audits(files: Sequence[str]) -> Iterator[tuple[str, TimedReport]]:
        for file in reversed(files):  # whichever is done first
            audited.append(file)
            yield file, TimedReport(report(1.5), 7.1234)

    scores = collect_scores({"a": "1", "b": "2", "c": "3"}, kept, audits, lines.append)
    assert audited == ["c", "a"]
    assert lines == [
        "1 of 3: b: score 0.25 (from the file)",
        "2 of 3: c: score 1.5",
        "3 of 3: a: score 1.5",
    ]
    assert [score.file for score in scores] == ["a", "b", "c"]
    assert scores[1] == known
    assert scores[0] == NetworkScore("a", "1", 1.5, "backdoored", 7.123)
    again = CalibrationFile(tmp_path / "calibration.json", {"seed": 0})
    assert again.networks == [known, scores[2], scores[0]]


def test_another_spelling_of_a_name_is_no_other_network(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    kept = CalibrationFile(path, {"seed": 0})
    kept.add(NetworkScore("a", "1", 0.25, "clean", 2.0))
    asked: list[str] = []

    def audits(files: Sequence[str]) -> list[tuple[str, TimedReport]]:
        asked.extend(files)
        return []

    scores = collect_scores({"./a": "1"}, kept, audits, lambda line: None)
    assert asked == []
    kept.finish(calibrate_threshold([0.25], 0.5), [score.file for score in scores])
    assert len(kept.networks) == 1
    assert read_population(str(path)).scores == {"1": 0.25}


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (report(math.nan), r"that of b is nan \(verdict: backdoored; as it is\)\. Leave the"),
        (report(math.inf), "that of b is inf"),
        (report(0.5, judged=False), r"that of b is of no meaning \(verdict: clean; as it is\)"),
    ],
)
def test_an_audit_without_a_score_keeps_the_others(
    result: DefenseReport, message: str, tmp_path: Path
) -> None:
    kept = CalibrationFile(tmp_path / "calibration.json", {"seed": 0})
    lines: list[str] = []
    found = [("a", report(0.25)), ("b", result), ("c", report(0.5))]
    audits = [(file, TimedReport(each, 1.0)) for file, each in found]
    with pytest.raises(ValueError, match=f"Expected every network to have a score, but {message}"):
        collect_scores({"a": "1", "b": "2", "c": "3"}, kept, lambda files: audits, lines.append)
    assert [network.file for network in kept.networks] == ["a", "c"]
    assert lines[1].startswith("2 of 3: b: no score: Expected every network to have a score")
    assert lines[2] == "3 of 3: c: score 0.5"


def test_the_first_error_is_raised_after_all_audits(tmp_path: Path) -> None:
    kept = CalibrationFile(tmp_path / "calibration.json", {"seed": 0})
    audits = [
        ("a", OSError("no such file")),
        ("b", RuntimeError("out of memory")),
        ("c", TimedReport(report(0.5), 1.0)),
    ]
    with pytest.raises(OSError, match="no such file"):
        collect_scores({"a": "1", "b": "2", "c": "3"}, kept, lambda files: audits, print)
    assert [network.file for network in kept.networks] == ["c"]


def test_other_weights_are_told_before_any_audit(tmp_path: Path) -> None:
    kept = CalibrationFile(tmp_path / "calibration.json", {"seed": 0})
    kept.add(NetworkScore("b", "2", 0.25, "clean", 3.0))
    audited: list[str] = []

    def audits(files: Sequence[str]) -> list[tuple[str, TimedReport]]:
        audited.extend(files)
        return []

    with pytest.raises(ValueError, match="Expected b to hold the weights whose score is in"):
        collect_scores({"a": "1", "b": "another"}, kept, audits, print)
    assert audited == []


def test_names_in_the_table_do_nothing() -> None:
    scores = [NetworkScore("[red]a[/]\x1b[2J.pt", "12", 0.5, "clean", 61.6)]
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(score_table(scores, calibrate_threshold([0.5], 0.5)))
    text = console.export_text()
    assert r"[red]a[/]\x1b[2J.pt" in text
    assert "62" in text

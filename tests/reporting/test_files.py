from __future__ import annotations

import json
from pathlib import Path

import pytest
from reports import full_report

from lightning_mnp.checkpoints.atomic_write import OutputError
from lightning_mnp.report import DefenseReport
from lightning_mnp.reporting import html, markdown, sarif
from lightning_mnp.reporting.files import save_report


def test_the_ending_says_the_form(tmp_path: Path) -> None:
    report = full_report()
    for name in ("a/report.json", "a/report", "a/report.HTML", "a/report.md", "a/report.sarif"):
        save_report(report, tmp_path / name)
    found = {path.name: path.read_text("utf-8") for path in (tmp_path / "a").iterdir()}
    assert DefenseReport.load(tmp_path / "a" / "report.json").to_dict() == report.to_dict()
    assert found["report"] == found["report.json"]
    assert found["report.HTML"] == html(report)
    assert found["report.md"] == markdown(report)
    log = sarif(report, artifact="models/suspicious.pt")
    assert json.loads(found["report.sarif"]) == log


def test_sarif_of_a_network_in_memory(tmp_path: Path) -> None:
    save_report(DefenseReport("clean"), tmp_path / "a.sarif")
    [run] = json.loads((tmp_path / "a.sarif").read_text())["runs"]
    assert run["artifacts"][0]["location"] == {"uri": "network"}


def test_what_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.html").mkdir()
    with pytest.raises(OutputError, match=r"`report`: .*a\.html could not"):
        save_report(DefenseReport("clean"), tmp_path / "a.html", argument="report")

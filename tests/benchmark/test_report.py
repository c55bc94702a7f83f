from __future__ import annotations

from pathlib import Path

import pytest
from cell_results import result, write

from lightning_mnp.benchmark import report as module
from lightning_mnp.benchmark.report import write_report


def test_a_report_of_all_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "draw_plots", lambda found, out: [out / "some.png"])
    monkeypatch.setattr(module, "find_spec", lambda name: True)
    results = [
        result("anp"),
        result("anp", seed=1),
        result("mnp", (0.85, 0.1), rate=0.01, usual=False),
        result("mnp", (0.9, None), attack="clean"),
        result("nc", None, task="detector", verdict="clean"),
        result("rnp", error="broken"),
    ]
    files = write_report(write(results, tmp_path / "cells"), tmp_path / "report")
    names = [path.name for path in files]
    assert names[0] == "report.md"
    assert names[-1] == "some.png"
    assert names[1] == "overview-1.csv"
    assert {"table1-1.csv", "table3-1-mnp.csv", "table4-1.csv"} <= set(names)
    assert "table3-1-anp.csv" not in names  # at the usual rate only
    assert {"harm.csv", "cost.csv", "spread.csv", "errors.csv", "cells.csv"} <= set(names)
    page = files[0].read_text()
    assert page.index("## Defenses side by side") < page.index("## Table 1")
    assert "6 cells, of which 1 failed, measured from 2026-01-02 to 2026-01-02" in page
    assert "![some](some.png)" in page
    assert "- m1: A processor" in page
    assert "Magnitude-based Neuron Pruning" in page


def test_tables_of_an_earlier_report_are_removed(tmp_path: Path) -> None:
    many = [result(), result(width=8), result(data="DigitsDataModule"), result(error="broken")]
    many += [result(attack="clean"), result(size=50), result(seed=1)]
    trial = {"name": "mnp", "options": {"suppression.mu": 0.1}}
    many += [result("mnp (suppression.mu=0.1)", method=trial), result(attack="SIG")]
    write_report(write(many, tmp_path / "many"), tmp_path / "report", plots=False)
    for mine in ("of-mine.csv", "of-mine.png"):
        (tmp_path / "report" / mine).touch()
    page = tmp_path / "report" / "report.md"
    for plot in ("defenses-1.png", "figure3-1.png"):  # drawn by a report with plots
        (tmp_path / "report" / plot).touch()
        page.write_text(f"{page.read_text()}![{plot[:-4]}]({plot})\n")
    earlier = {path.name for path in (tmp_path / "report").iterdir()}
    assert {"errors.csv", "spread.csv", "sizes.csv", "options.csv", "harm.csv"} <= earlier
    assert {"defenses-3.csv", "overview-2.csv"} <= earlier
    files = write_report(write([result()], tmp_path / "one"), tmp_path / "report", plots=False)
    left = {path.name for path in (tmp_path / "report").iterdir()}
    assert left == {path.name for path in files} | {"of-mine.csv", "of-mine.png"}


def test_files_that_a_report_has_not_written_stay(tmp_path: Path) -> None:
    out = tmp_path / "report"
    write_report(write([result()], tmp_path / "cells"), out, plots=False)
    mine = {"options.csv": "a,b\n1,2\n", "harm.csv": "", "table1-2020-mine.csv": "x"}
    mine |= {"defenses-7.png": "a picture", "overview-8.csv": "my own\n"}
    for name, text in mine.items():
        (out / name).write_text(text)
    write_report(tmp_path / "cells", out, plots=False)
    assert {name: (out / name).read_text() for name in mine} == mine


def test_options_that_are_paths_make_names_of_files(tmp_path: Path) -> None:
    method = {"name": "default", "options": {"verdict.reference": "/tmp/c.json"}}
    label = 'default (verdict.reference="/tmp/c.json")'
    results = [result(label, method=method, rate=rate, usual=rate == 0.1) for rate in (0.1, 0.01)]
    files = write_report(write(results, tmp_path / "cells"), tmp_path / "report", plots=False)
    assert "table3-1-default-verdict.reference-tmp-c.json.csv" in {path.name for path in files}


def test_without_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write([result()], tmp_path / "cells")
    monkeypatch.setattr(module, "draw_plots", None)  # would fail
    assert write_report(tmp_path / "cells", tmp_path / "report", plots=False)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert write_report(tmp_path / "cells", tmp_path / "report")


def test_no_results(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`results` to be a folder with results of cells"):
        write_report(tmp_path / "cells", tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_every_table_says_that_it_mixes_recipes(tmp_path: Path) -> None:
    results = [result(epochs=epochs) for epochs in (10, 40)]
    results += [result(epochs=each, rate=0.01, usual=False) for each in (10, 40)]
    results += [
        result("nc", None, task="detector", verdict="clean", epochs=each) for each in (10, 40)
    ]
    page = write_report(write(results, tmp_path / "cells"), tmp_path / "report", plots=False)[0]
    parts = page.read_text().split("\n## ")
    mixed = [part.partition(":")[0] for part in parts if "Networks of several recipes" in part]
    assert mixed == ["Defenses side by side", "Table 1", "Table 3", "Table 4", "Spread over seeds"]

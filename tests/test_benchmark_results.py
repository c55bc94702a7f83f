"""What is committed of the benchmark: the report is that of the cells."""

from __future__ import annotations

from pathlib import Path

from lightning_mnp.benchmark.overview import overview
from lightning_mnp.benchmark.report import write_report
from lightning_mnp.benchmark.results import Marks, read_results

REPOSITORY = Path(__file__).parents[1]
CELLS = REPOSITORY / "benchmarks" / "results" / "cells"
REPORT = REPOSITORY / "benchmarks" / "results" / "report"


def test_the_committed_report_is_made_of_the_committed_cells(tmp_path: Path) -> None:
    files = write_report(CELLS, tmp_path, plots=False)
    assert {path.name for path in files} == {path.name for path in REPORT.iterdir()}
    for path in files:
        told = "run `lightning-mnp benchmark report --plots false --out benchmarks/results/report`"
        assert path.read_text("utf-8") == (REPORT / path.name).read_text("utf-8"), told


def test_the_documentation_shows_the_tables_of_the_cells() -> None:
    text = (REPOSITORY / "docs" / "explanation" / "comparison.md").read_text("utf-8")
    for number, table in enumerate(overview(read_results(CELLS), Marks()), 1):
        shown = text.partition(f"<!-- overview {number} -->")[2]
        shown = shown.partition(f"<!-- end of overview {number} -->")[0]
        assert shown.split("\n\n")[1:-1] == table.markdown().split("\n\n")[1:]

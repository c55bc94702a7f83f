"""The report of a benchmark: Markdown, CSV and plots, made of the files of cells alone."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from lightning_mnp.benchmark import side_tables, sweeps, tables
from lightning_mnp.benchmark.overview import overview
from lightning_mnp.benchmark.plots import draw_plots
from lightning_mnp.benchmark.results import Marks, Result, paper_figures, read_results
from lightning_mnp.benchmark.table import Table, markdown_line
from lightning_mnp.checkpoints.atomic_write import write_atomically

__all__ = ["write_report"]

# Whatever a report may have written, with other results.
_OURS = re.compile(
    r"((overview|table[124]|defenses)-\d+|table3-\d+-.*|harm|cost|spread|sizes|options|errors)\.csv"
    r"|(defenses|figure\d)-\d+\.png"
)


def write_report(results: Path, out: Path, plots: bool = True) -> list[Path]:
    """Write the report.

    Args:
        results: Folder of the results of cells.
        out: Folder of the report; files of an earlier one are replaced.
        plots: Whether to draw plots, if matplotlib is installed.

    Returns:
        The files: `report.md` first, then a CSV for each table, then plots.

    Raises:
        ValueError: If there are no results, or a file is damaged.
    """
    found, marks = read_results(results), Marks()
    made = _tables(found, marks)
    out.mkdir(parents=True, exist_ok=True)
    drawn: list[Path] = []
    if plots and find_spec("matplotlib") is not None:
        drawn = draw_plots(found, out)
    page = out / "report.md"
    earlier = page.read_text("utf-8") if page.is_file() else ""
    _write(page, _page(found, made, marks, drawn))
    files = [page]
    for table in [*made, side_tables.every_cell(found)]:
        files.append(out / f"{table.name}.csv")
        _write(files[-1], table.csv())
    files += drawn
    for old in set(out.iterdir()) - set(files):
        if _OURS.fullmatch(old.name) and _is_of(earlier, old):
            old.unlink()
    return files


def _is_of(page: str, file: Path) -> bool:
    """Return whether the page of a report shows a file; one of the same name may be the user's."""
    if file.suffix == ".png":
        return f"]({file.name})" in page
    with file.open(newline="", encoding="utf-8", errors="replace") as lines:
        header = next(csv.reader(lines), None)
    return header is not None and markdown_line(header) in page.splitlines()


def _write(path: Path, text: str) -> None:
    write_atomically(
        path, lambda partial: partial.write_text(text, "utf-8"), argument="out", replace=True
    )


def _tables(found: Sequence[Result], marks: Marks) -> list[Table]:
    made = [
        *overview(found, marks),
        *tables.mitigation(found, marks),
        *tables.by_rate(found, marks),
        *tables.detection(found, marks),
    ]
    for make in (
        sweeps.by_options,
        sweeps.by_size,
        side_tables.harm,
        side_tables.cost,
        side_tables.spread,
        side_tables.failures,
    ):
        table = make(found, marks)
        made += [] if table is None else [table]
    return made


def _page(
    found: Sequence[Result], made: Sequence[Table], marks: Marks, drawn: Sequence[Path]
) -> str:
    dates = sorted(str(each.content["date"])[:10] for each in found)
    failed = sum(not each.is_done for each in found)
    parts = [
        "# Benchmark",
        f"{len(found)} cells, of which {failed} failed, measured from {dates[0]} to {dates[-1]}. "
        f"Rows of the paper are from {paper_figures()['source']}. *missing* means that there is no "
        "result yet. The last part tells the settings (s1 and so on) and machines (m1 and so on).",
        *(table.markdown() for table in made),
        *(f"![{path.stem}]({path.name})" for path in drawn),
        "## Settings and machines",
        "\n".join(f"- {line}" for line in marks.lines()),
    ]
    return "\n\n".join(parts) + "\n"

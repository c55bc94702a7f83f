from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cell_results import result

from lightning_mnp.benchmark.plots import draw_plots

pytest.importorskip("matplotlib", reason="plots need matplotlib")


def varied(option: str, value: float, **more: Any) -> Any:
    method = {"name": "mnp", "options": {option: value}}
    return result(f"mnp ({option}={value})", method=method, **more)


def test_what_there_are_results_for_is_drawn(tmp_path: Path) -> None:
    results = [
        result("anp"),
        result("mnp"),
        result("mnp", size=50),
        result("mnp", size=50, seed=1),
        *(varied("masks.penalty", value) for value in (0.0, 5e-4)),
        varied("suppression.mu", 0.1),  # one value is no line
        result("mnp", error="broken", size=10),
        result("anp", (0.9, None), attack="clean"),
    ]
    files = draw_plots(results, tmp_path)
    assert [path.name for path in files] == [
        "defenses-1.png",
        "defenses-2.png",
        "figure3-1.png",
        "figure4-1.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    assert draw_plots([result(error="broken")], tmp_path) == []

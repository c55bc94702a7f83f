from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lightning_mnp.benchmark.records import SCHEMA, cell_file, read_cells, read_json, write_json

CELL = {"schema": SCHEMA, "cell": {"network": {}}, "code": "a-b", "status": "done"}


def test_numbers_are_strict_and_short(tmp_path: Path) -> None:
    path = tmp_path / "new" / "cell.json"
    write_json(path, {"a": [1 / 3, math.inf, (2, "x")], "b": {"c": math.nan, "d": True}, "e": None})
    text = path.read_text()
    assert json.loads(text) == {
        "a": [0.333333, None, [2, "x"]],
        "b": {"c": None, "d": True},
        "e": None,
    }
    assert len(text.splitlines()) == 5  # a line for each field
    assert read_json(path) == json.loads(text)
    assert [each.name for each in path.parent.iterdir()] == ["cell.json"]  # nothing is left beside


def test_a_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "cell.json"
    for value in (1, 2):
        write_json(path, {"value": value})
    assert read_json(path) == {"value": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", r"cell\.json to be JSON, but: .* Remove the file"), ("3", "to hold a JSON object")],
)
def test_damaged_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "cell.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_json(path)


def test_all_cells_of_a_folder(tmp_path: Path) -> None:
    assert read_cells(tmp_path / "missing") == {}
    for name in ("b", "a"):
        write_json(cell_file(tmp_path, name), {**CELL, "name": name})
    (tmp_path / "notes.txt").write_text("no cell")
    assert list(read_cells(tmp_path)) == ["a", "b"]


def test_a_file_of_another_schema(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"schema": 99})
    with pytest.raises(ValueError, match=r"a\.json to be a cell of schema 1, but got 99. Move it"):
        read_cells(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"status": None},
            r"`status` in .*a\.json to be that of a cell, but got None\. Remove",
        ),
        ({"cell": "clean"}, r"`cell` in .* but got 'clean'"),
        ({"cell": {}}, r"`cell` in .* but got \{\}"),
        ({"code": 3}, "`code` in .* but got 3"),
    ],
)
def test_a_file_that_is_no_cell(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {**CELL, **changes})
    with pytest.raises(ValueError, match=message):
        read_cells(tmp_path)


def test_a_folder_with_the_name_of_a_cell(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    with pytest.raises(ValueError, match=r"a\.json to be a file of JSON, but: .*\. Move it out"):
        read_cells(tmp_path)

"""The files of a benchmark: one small JSON for each cell."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_mnp.checkpoints.atomic_write import write_atomically
from lightning_mnp.checkpoints.printable import printable

__all__ = ["SCHEMA", "cell_file", "read_cells", "read_json", "write_json"]

SCHEMA = 1


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file, whole or not at all: strict JSON, a line for each field.

    Args:
        path: The file; it is replaced, and its folder is made if it is missing.
        content: Primitives, by name. Numbers get six digits; those that are not finite are null.

    Raises:
        OutputError: If it cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "cell.json")
        >>> write_json(path, {"CA": 1 / 3, "ASR": math.nan})
        >>> print(path.read_text())
        {
        "CA": 0.333333,
        "ASR": null
        }
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        f"{json.dumps(name)}: {json.dumps(_strict(value), allow_nan=False)}"
        for name, value in content.items()
    ]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    write_atomically(
        path, lambda partial: partial.write_text(text, "utf-8"), argument="out", replace=True
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of :func:`write_json`.

    Args:
        path: The file.

    Raises:
        ValueError: If it is damaged or cannot be read.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:  # a folder of this name, say
        raise ValueError(
            f"Expected {path} to be a file of JSON, but: {error.strerror}. Move it out of the "
            "folder."
        ) from error
    except ValueError as error:
        raise ValueError(f"Expected {path} to be JSON, but: {error}. Remove the file.") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"Expected {path} to hold a JSON object, but got a {type(content).__name__}. Remove "
            "the file."
        )
    return content


def cell_file(folder: Path, name: str) -> Path:
    """Return where the result of a cell is kept.

    Args:
        folder: Folder of all results.
        name: Name of the cell.
    """
    return folder / f"{name}.json"


def read_cells(folder: Path) -> dict[str, dict[str, Any]]:
    """Read all cells, by name, in the order of the names.

    Args:
        folder: Folder of all results; none may be there yet.

    Raises:
        ValueError: If a file is damaged, or of another schema.
    """
    cells = {}
    for path in sorted(folder.glob("*.json")):
        content = read_json(path)
        if content.get("schema") != SCHEMA:
            raise ValueError(
                f"Expected {path} to be a cell of schema {SCHEMA}, but got "
                f"{content.get('schema')!r}. Move it out of the folder."
            )
        _check_cell(path, content)
        cells[path.stem] = content
    return cells


def _check_cell(path: Path, content: Mapping[str, Any]) -> None:
    """Raise if a file lacks what a run asks of every cell."""
    cell = content.get("cell")
    wanted = {
        "status": content.get("status") in ("done", "failed"),
        "cell": isinstance(cell, Mapping) and isinstance(cell.get("network"), Mapping),
        "code": isinstance(content.get("code"), str),
    }
    for name, is_sound in wanted.items():
        if not is_sound:
            raise ValueError(
                f"Expected `{name}` in {path} to be that of a cell, but got "
                f"{printable(repr(content.get(name)), 100)}. Remove the file."
            )


def _strict(value: Any) -> Any:
    """Return primitives: six digits of each number, None for those that are not finite."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _strict(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(each) for each in value]
    return value

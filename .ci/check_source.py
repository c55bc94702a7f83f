"""Refuse what must not be in the source: unsafe loading of files, and leftovers."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
FOLDERS = ("lightning_mnp", "benchmarks", "examples", "tests", "docs")
LEFTOVERS = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError|breakpoint\(|pdb\.set_trace)")


def unsafe_calls(source: str) -> Iterator[tuple[int, str]]:
    """Find calls that could run code from a file: (line, what is wrong)."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called == "torch.load" and options.get("weights_only") != "True":
            yield node.lineno, "torch.load without weights_only=True"
        elif called.endswith(".load_from_checkpoint"):
            yield node.lineno, "load_from_checkpoint can run code from the file"


def faults(path: Path) -> Iterator[str]:
    """Describe everything that is wrong with a file."""
    source = path.read_text("utf-8")
    for line, what in unsafe_calls(source):
        yield f"{path}:{line}: {what}"
    for number, text in enumerate(source.splitlines(), 1):
        if found := LEFTOVERS.search(text):
            yield f"{path}:{number}: {found[0]} left in the source"


if __name__ == "__main__":
    paths = [path for folder in FOLDERS for path in sorted((REPOSITORY / folder).rglob("*.py"))]
    sys.exit("\n".join(fault for path in paths for fault in faults(path)) or None)

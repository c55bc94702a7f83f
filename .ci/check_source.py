"""Refuse what must not be in the source: unsafe loading of files, and leftovers."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
FOLDERS = (".ci", "lightning_mnp", "benchmarks", "examples", "tests", "docs")
LEFTOVERS = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError|breakpoint\(|pdb\.set_trace)")
CODE_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Calls that run what a file says, whatever their options; tests make hostile files with some.
RUNS_CODE = {
    "torch.hub.load",
    "torch.jit.load",
    "torch.package.PackageImporter",
    "torch.export.load",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "joblib.load",
    "torch.serialization.add_safe_globals",
}


def full_names(tree: ast.AST) -> dict[str, str]:
    """What imported names stand for: {"np": "numpy", "load": "torch.load"}."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update({each.asname: each.name for each in node.names if each.asname})
        elif isinstance(node, ast.ImportFrom):
            names.update(
                {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
            )
    return names


def unsafe_calls(source: str, is_test: bool = False) -> Iterator[tuple[int, str]]:
    """Find calls that could run code from a file: (line, what is wrong)."""
    tree = ast.parse(source)
    names = full_names(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        first, dot, rest = ast.unparse(node.func).partition(".")
        called = names.get(first, first) + dot + rest
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in ("torch.load", "torch.serialization.load"):
            if options.get("weights_only") != "True":
                yield node.lineno, "torch.load without weights_only=True"
        elif called.endswith(".load_from_checkpoint"):
            yield node.lineno, "load_from_checkpoint can run code from the file"
        elif called == "numpy.load" and "allow_pickle" in options:
            yield node.lineno, "numpy.load with allow_pickle can run code from the file"
        elif called in RUNS_CODE and not is_test:
            yield node.lineno, f"{called} can run code from the file"


def blocks(path: Path, text: str) -> Iterator[tuple[int, str]]:
    """Return the Python in a file (all, or the code blocks of a page) with the lines before."""
    if path.suffix == ".py":
        yield 0, text
        return
    for block in CODE_BLOCK.finditer(text):
        yield text[: block.start(1)].count("\n"), block[1]


def faults(path: Path) -> Iterator[str]:
    """Describe everything that is wrong with a file."""
    text = path.read_text("utf-8")
    for before, source in blocks(path, text):
        for line, what in unsafe_calls(source, path.name.startswith("test_")):
            yield f"{path}:{before + line}: {what}"
    if path.suffix == ".py" and path != Path(__file__).resolve():
        for number, line_text in enumerate(text.splitlines(), 1):
            if found := LEFTOVERS.search(line_text):
                yield f"{path}:{number}: {found[0]} left in the source"


def checked_files() -> list[Path]:
    """List the Python files and the pages of the project."""
    found = [
        path
        for folder in FOLDERS
        for path in sorted((REPOSITORY / folder).rglob("*"))
        if path.suffix in (".py", ".md")
    ]
    return [*found, *sorted(REPOSITORY.glob("*.md"))]


if __name__ == "__main__":
    sys.exit("\n".join(fault for path in checked_files() for fault in faults(path)) or None)

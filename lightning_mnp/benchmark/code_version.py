"""A digest of the source that a figure depends on.

A figure depends on a module and on all modules of this package that it imports, directly or by
way of others. Comments, docstrings and layout are left out, and so is everything that the module
does not import: an edit of the documentation or of another defense changes no digest.
"""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import lightning_mnp

__all__ = ["code_version", "imported_modules", "undocumented"]

_PACKAGE = "lightning_mnp"
_MAIN = "__main__"
_ROOT = Path(lightning_mnp.__file__).parent


def code_version(modules: Iterable[str]) -> str:
    """Compute a digest of modules and of what they import.

    Args:
        modules: Full names. Of modules of other packages, only their own source counts.
            ``__main__`` is the script that runs, also in the processes that it starts.

    Returns:
        Twelve hexadecimal digits.

    Example:
        >>> code_version(["lightning_mnp.metrics.share"]) == code_version([])
        False
    """
    # A process that is started has the script under this name.
    return _digest(frozenset(_MAIN if name == "__mp_main__" else name for name in modules))


@cache
def _digest(modules: frozenset[str]) -> str:
    found = hashlib.sha256()
    for name in sorted(imported_modules(modules)):
        found.update(f"{name}\0{_code(name)}\0".encode())
    return found.hexdigest()[:12]


def imported_modules(modules: Iterable[str]) -> set[str]:
    """Return the names of modules and of all modules of this package that they import.

    A name that a package passes on, as in ``from lightning_mnp.config import option``, counts as
    the module that defines it.

    Args:
        modules: Full names.

    Example:
        >>> "lightning_mnp.metrics.share" in imported_modules(["lightning_mnp.metrics.success"])
        True
    """
    seen: set[str] = set()
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += _imports(name)
    return seen


def _path(name: str) -> Path | None:
    """Return the file of a module; None if there is none."""
    if name != _PACKAGE and not name.startswith(f"{_PACKAGE}."):
        return _script() if name == _MAIN else _foreign_path(name)
    place = _ROOT.joinpath(*name.split(".")[1:])
    for path in (place.with_suffix(".py"), place / "__init__.py"):
        if path.is_file():
            return path
    return None


def _script() -> Path | None:
    """Return the file that Python was started with; None if there is none, as in a shell."""
    file = getattr(sys.modules[_MAIN], "__file__", None)
    return Path(file) if file is not None and Path(file).is_file() else None


def _foreign_path(name: str) -> Path | None:
    """Return the file of a module of another package; None if it has no source."""
    spec = find_spec(name)
    known = spec is not None and spec.origin is not None and spec.origin.endswith(".py")
    return Path(spec.origin) if known else None  # type: ignore[union-attr, arg-type]


@cache
def _tree(name: str) -> ast.Module:
    path = _path(name)
    return ast.parse("" if path is None else path.read_text("utf-8"))


@cache
def _code(name: str) -> str:
    """Return the source of a module without comments and docstrings."""
    return _undocumented(_tree(name))


def undocumented(source: str) -> str:
    r"""Return a source without comments, docstrings and layout.

    Args:
        source: The source of a module.

    Example:
        >>> undocumented("def f():\n    'Add one.'\n    return (1 +\n            1)  # two")
        'def f():\n    return 1 + 1'
    """
    return _undocumented(ast.parse(source))


def _undocumented(tree: ast.Module) -> str:
    for node in ast.walk(tree):
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            node.body[:1] = [] if len(node.body) > 1 else [ast.Pass()]
    return ast.unparse(tree)


@cache
def _imports(name: str) -> tuple[str, ...]:
    return tuple(_resolved(*pair) for pair in _imported_names(name))


def _imported_names(name: str) -> list[tuple[str, str]]:
    """Return pairs of a module of this package and a name in it; "" for the module itself."""
    pairs: list[tuple[str, str]] = []
    for node in ast.walk(_tree(name)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == _PACKAGE:
            pairs += [(str(node.module), each.name) for each in node.names]
        elif isinstance(node, ast.Import):
            pairs += [(n.name, "") for n in node.names if n.name.split(".")[0] == _PACKAGE]
    return pairs


def _resolved(module: str, name: str) -> str:
    """Return the module that a name of a module comes from."""
    if not name:
        return module
    if _path(f"{module}.{name}") is not None:
        return f"{module}.{name}"
    path = _path(module)
    if path is None or path.name != "__init__.py":
        return module
    for origin, passed_on in _imported_names(module):
        if passed_on == name:
            return _resolved(origin, name)
    return module

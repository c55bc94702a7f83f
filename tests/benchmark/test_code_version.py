from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from lightning_mnp.benchmark import code_version as module
from lightning_mnp.benchmark.code_version import code_version, imported_modules

FILES = {
    "__init__.py": "from lightning_mnp.api import audit\n",
    "api.py": '"""Doors."""\nfrom lightning_mnp.config import option\n\naudit = option\n',
    "config/__init__.py": "from lightning_mnp.config.ranges import option\nlimit = 3\n",
    "config/ranges.py": "def option():\n    '''Return one.'''\n    return 1\n",
    "config/other.py": "import lightning_mnp.api\n",
    "plain.py": "from lightning_mnp import config\nfrom lightning_mnp.config import limit, other\n",
}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """A package of its own in place of this one."""

    def forget() -> None:
        for function in (module._tree, module._code, module._imports, module._digest):
            function.cache_clear()

    def write(name: str, text: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        forget()

    monkeypatch.setattr(module, "_ROOT", tmp_path)
    for name, text in FILES.items():
        write(name, text)
    yield write
    forget()


def names(*modules: str) -> set[str]:
    return {name.removeprefix("lightning_mnp") for name in imported_modules(modules)}


@pytest.mark.usefixtures("write")
def test_a_name_that_is_passed_on_counts_as_the_module_that_defines_it() -> None:
    assert names("lightning_mnp.api") == {".api", ".config.ranges"}


@pytest.mark.usefixtures("write")
def test_packages_and_modules_that_are_imported_as_such() -> None:
    found = names("lightning_mnp.plain")
    assert found == {".plain", ".config", ".config.other", ".config.ranges", ".api"}


@pytest.mark.parametrize(
    ("name", "text", "changes"),
    [
        ("api.py", FILES["api.py"].replace("Doors", "Windows"), False),
        ("api.py", FILES["api.py"] + "# A comment\n\n\n", False),
        ("api.py", FILES["api.py"].replace('"""Doors."""', ""), False),
        ("config/ranges.py", "def option():\n    return 1\n", False),
        ("config/ranges.py", "def option():\n    return 2\n", True),
        ("config/other.py", "limit = 4\n", False),
        ("api.py", FILES["api.py"] + "again = audit\n", True),
    ],
)
def test_what_changes_the_version(
    write: Callable[[str, str], None], name: str, text: str, changes: bool
) -> None:
    before = code_version(["lightning_mnp.api"])
    write(name, text)
    assert (code_version(["lightning_mnp.api"]) != before) == changes


def test_a_docstring_that_is_all_of_a_function(write: Callable[[str, str], None]) -> None:
    write("api.py", "def audit():\n    '''Do nothing.'''\n")
    before = code_version(["lightning_mnp.api"])
    write("api.py", "def audit():\n    pass\n")
    assert code_version(["lightning_mnp.api"]) == before


def test_modules_of_others_count_alone() -> None:
    assert imported_modules(["json.decoder", "math"]) == {"json.decoder", "math"}
    assert code_version(["json.decoder"]) != code_version(["json.encoder"])


def test_the_script_that_runs_counts_by_its_file(
    write: Callable[[str, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", script)
    write("script", "from lightning_mnp.api import audit\n")
    script.__file__ = str(tmp_path / "script")
    assert names("__main__") == {"__main__", ".api", ".config.ranges"}
    before = code_version(["__main__"])
    assert code_version(["__mp_main__"]) == before  # in a process that the script has started
    write("script", "from lightning_mnp.api import audit\nlimit = 3\n")
    assert code_version(["__main__"]) != before


@pytest.mark.parametrize("file", [None, "<stdin>"])
def test_a_script_without_a_file(
    file: str | None, write: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = ModuleType("__main__")
    script.__file__ = file
    monkeypatch.setitem(sys.modules, "__main__", script)
    write("config/other.py", "")  # forgets what was read before
    assert code_version(["__main__"]) != code_version([])


def test_a_defense_does_not_depend_on_another_one_nor_on_the_documentation() -> None:
    found = names("lightning_mnp.baselines.anp")
    assert ".baselines.workbench" in found
    assert not {".baselines.nad", ".baselines", "", ".benchmark.run"} & found

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from importlib.metadata import entry_points, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import lightning_mnp

REPOSITORY = Path(__file__).parents[1]
PROJECT = (REPOSITORY / "pyproject.toml").read_text("utf-8")


def dependency_lines() -> list[str]:
    """List the lines of pyproject.toml that require something with a floor."""
    pattern = re.compile(r'\s+"[\w-]+(\[\w+\])?>=')
    return [line.strip() for line in PROJECT.splitlines() if pattern.match(line)]


def test_version_is_the_same_everywhere() -> None:
    [declared] = re.findall(r'^version = "(.+?)"', PROJECT, re.MULTILINE)
    citation = (REPOSITORY / "CITATION.cff").read_text("utf-8")
    assert version("lightning-mnp") == declared
    assert f"\nversion: {declared}\n" in citation
    assert declared in (REPOSITORY / "CHANGELOG.md").read_text("utf-8")


def test_every_floor_has_its_reason() -> None:
    lines = dependency_lines()
    assert len(lines) >= 12
    for line in lines:
        floor = re.search(r">=([\d.]+)", line)
        assert floor, line
        assert f"# {floor[1]}: " in line, f"no reason for the floor in: {line}"


def test_floors_script_lists_every_floor() -> None:
    script = REPOSITORY / ".ci" / "floors.py"
    output = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    floors = output.stdout.split()
    assert len(floors) == len(dependency_lines())
    assert "torch==2.6" in floors
    assert "jsonargparse==4.39" in floors


@pytest.mark.parametrize("withdrawn", ["2.6.2", "2.6.3"])
def test_withdrawn_releases_of_lightning_are_excluded(withdrawn: str) -> None:
    [lightning] = [
        requirement
        for requirement in map(Requirement, requires("lightning-mnp") or [])
        if requirement.name == "lightning"
    ]
    assert not lightning.specifier.contains(withdrawn)
    assert lightning.specifier.contains("2.6.1")


def test_types_are_published() -> None:
    assert (Path(lightning_mnp.__file__).parent / "py.typed").is_file()


def test_command_leads_to_a_function() -> None:
    [command] = entry_points(group="console_scripts", name="lightning-mnp")
    assert command.value == "lightning_mnp.cli.command_line:main"
    assert callable(command.load())


def test_readme_has_the_two_commands_that_ci_runs() -> None:
    readme = (REPOSITORY / "README.md").read_text("utf-8")
    ci = (REPOSITORY / ".ci" / "run").read_text("utf-8")
    assert '\npip install ".[demo]" && lightning-mnp demo\n' in readme
    assert '\npip install -e ".[dev]" && pytest -n auto\n' in readme
    assert re.search(r'^pip install .*-e "\.\[dev\]"$', ci, re.MULTILINE)
    assert re.search(r"^pytest -n auto ", ci, re.MULTILINE)


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("torch.load(path, weights_only=True)", None),
        ("torch.load(path, weights_only=False)", "torch.load without"),
        ("torch.load(\n    path, map_location='cpu'\n)", "torch.load without"),
        ("torch.load(path, weights_only=flag)", "torch.load without"),
        ("from torch import load as read\nread(path)", "torch.load without"),
        ("import torch as t\nt.load(path, weights_only=False)", "torch.load without"),
        ("from torch import serialization\nserialization.load(path)", "torch.load without"),
        ("from torch import load\nload(path, weights_only=True)", None),
        ("Model.load_from_checkpoint(path)", "load_from_checkpoint can run"),
        ("import pickle\npickle.loads(data)", "pickle.loads can run"),
        ("from pickle import Unpickler\nUnpickler(file).load()", "pickle.Unpickler can run"),
        ("torch.hub.load(repository, name)", "torch.hub.load can run"),
        ("torch.serialization.add_safe_globals([print])", "add_safe_globals can run"),
        ("import numpy as np\nnp.load(path, allow_pickle=True)", "numpy.load with"),
        ("import numpy as np\nnp.load(path)", None),
        ("x = 1  # " + "TO" + "DO later", "left in the source"),
    ],
)
def test_source_check_finds_faults(tmp_path: Path, source: str, fault: str | None) -> None:
    check = runpy.run_path(str(REPOSITORY / ".ci" / "check_source.py"))
    (tmp_path / "module.py").write_text(source)
    found = list(check["faults"](tmp_path / "module.py"))
    assert len(found) == (fault is not None)
    assert fault is None or fault in found[0]


def test_source_check_reads_pages(tmp_path: Path) -> None:
    check = runpy.run_path(str(REPOSITORY / ".ci" / "check_source.py"))
    (tmp_path / "page.md").write_text(
        "Never `torch.load(path)`.\n\n```python\nimport torch\ntorch.load(path)\n```\n"
    )
    [found] = check["faults"](tmp_path / "page.md")
    assert found.endswith("page.md:5: torch.load without weights_only=True")


def test_source_check_covers_every_file() -> None:
    check = runpy.run_path(str(REPOSITORY / ".ci" / "check_source.py"))
    names = {str(path.relative_to(REPOSITORY)) for path in check["checked_files"]()}
    assert {
        "README.md",
        ".ci/audit.py",
        "lightning_mnp/checkpoints/read.py",
        "tests/helpers.py",
    } <= names


def test_license_is_apache() -> None:
    text = (REPOSITORY / "LICENSE").read_text("utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_reading_checkpoints_does_not_import_lightning() -> None:
    code = (
        "import sys, lightning_mnp.checkpoints.read\n"
        "sys.exit('lightning' in sys.modules or 'pytorch_lightning' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

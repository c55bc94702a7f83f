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
    assert command.value == "lightning_mnp.cli.entry:main"
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


def test_lightning_is_imported_by_what_needs_it_only() -> None:
    """Each of these alone would do without it; one process imports them all."""
    modules = ["checkpoints.read", "metrics", "surgery.prune", "engine.defense", "api"]
    code = "import sys\n"
    for name in modules:
        code += f"import lightning_mnp.{name}\n"
        code += "found = {'lightning', 'pytorch_lightning'} & set(sys.modules)\n"
        code += f"assert not found, '{name}'\n"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- what the forge does -----------------------------------------------------------------------

FORGE = sorted((REPOSITORY / ".github").rglob("*.yml"))
SCRIPTS = [REPOSITORY / ".ci" / name for name in ("coverage", "processors", "run")]
posix = pytest.mark.skipif(sys.platform == "win32", reason="the scripts are for bash")


def test_every_action_is_pinned_to_a_commit() -> None:
    used = [
        line.strip()
        for path in FORGE
        for line in path.read_text("utf-8").splitlines()
        if re.match(r"\s*(- )?uses:", line)
    ]
    assert len(used) >= 10
    pinned = re.compile(r"(- )?uses: (\./[\w./-]+|[\w-]+/[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+)")
    assert [line for line in used if not pinned.fullmatch(line)] == []


def test_the_index_of_torch_is_asked_for_torch_only() -> None:
    text = "\n".join(path.read_text("utf-8") for path in [*FORGE, *SCRIPTS])
    assert "EXTRA_INDEX" not in text.upper().replace("-", "_")
    lines = [line for line in text.splitlines() if "--index-url" in line]
    assert len(lines) == 2
    assert all(line.endswith(" torch torchvision") for line in lines)
    assert text.count("--no-deps") == 2


@posix
def test_each_processor_is_a_job_of_its_own() -> None:
    script = (REPOSITORY / ".ci" / "processors").read_text("utf-8")
    [all_of_them] = re.findall(r"^    set -- (.+)$", script, re.MULTILINE)
    workflow = (REPOSITORY / ".github" / "workflows" / "ci.yml").read_text("utf-8")
    assert f"setting: [{', '.join(all_of_them.split())}]" in workflow
    command = ["bash", str(REPOSITORY / ".ci" / "processors"), "avx2", "abacus"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Expected default, avx2, ")
    assert "but got abacus." in done.stderr


@pytest.mark.parametrize(("options", "passed"), [([], ["quick"]), (["-m", "slow"], ["slow"])])
def test_slow_tests_run_when_asked_for(
    tmp_path: Path, options: list[str], passed: list[str]
) -> None:
    (tmp_path / "test_both.py").write_text(
        "import pytest\n\n"
        "def test_quick():\n    pass\n\n"
        "@pytest.mark.slow\ndef test_slow():\n    pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-c", str(REPOSITORY / "pyproject.toml"), "-rp"]
    command += ["-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-p", "no:xdist"]
    command += ["-p", "no:pytest_cov", *options, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert re.findall(r"^PASSED .*::test_(\w+)", done.stdout, re.MULTILINE) == passed


# --- links and the built package ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("link", "fault"),
    [
        ("[a](other.md)", None),
        ("[a](below/)", None),
        ("[a](other.md#first-part)", None),
        ("[a](other.md#first-part-1)", None),
        ("[a](other.md#m1-and-m2-100)", None),
        ("[a](#here)", None),
        ("[a](https://example.org/x#y)", None),
        ("[a](mailto:a@example.org)", None),
        ("`[a](gone.md)`", None),
        ("```\n[a](gone.md)\n```", None),
        ("[a](gone.md)", "gone.md leads to no file"),
        ("![a](gone.png)", "gone.png leads to no file"),
        ("[a][b]\n\n[b]: gone.md", "gone.md leads to no file"),
        ("| [a](gone.md) |\n| --- |\n| b |", "gone.md leads to no file"),
        ("[a](other.md#second-part)", "other.md#second-part leads to no heading"),
        ("[a](#there)", "#there leads to no heading"),
    ],
)
def test_links_that_lead_nowhere_are_found(tmp_path: Path, link: str, fault: str | None) -> None:
    check = runpy.run_path(str(REPOSITORY / ".ci" / "check_links.py"))
    (tmp_path / "below").mkdir()
    (tmp_path / "other.md").write_text(
        "# First part\n\n## First *part*\n\n## `M1` and M2: 100%\n\n```\n# Second part\n```\n"
    )
    (tmp_path / "page.md").write_text(f"# Here\n\n{link}\n")
    found = list(check["faults"](tmp_path / "page.md"))
    expected = [] if fault is None else [f"{tmp_path / 'page.md'}:3: {fault}"]
    assert found == expected


def test_links_are_checked_outside_docs() -> None:
    check = runpy.run_path(str(REPOSITORY / ".ci" / "check_links.py"))
    names = {path.relative_to(REPOSITORY).as_posix() for path in check["checked_files"]()}
    assert {"README.md", "CONTRIBUTING.md", ".github/PULL_REQUEST_TEMPLATE.md"} <= names
    assert not any(name.startswith("docs/") for name in names)


def test_build_check_knows_what_belongs_in() -> None:
    check = runpy.run_path(str(REPOSITORY / ".ci" / "check_build.py"))
    package = check["package_files"]()
    assert {"lightning_mnp/py.typed", "lightning_mnp/cli/demo.yaml"} <= package
    assert not any("__pycache__" in name for name in package)
    others = check["configurations"]()
    assert {"examples/audit-cifar10.yaml", "examples/attacks/badnets.yaml"} <= others
    complete = {*package, "lightning_mnp-0.1.0.dist-info/METADATA"}
    assert list(check["wheel_faults"](complete, package)) == []
    changed = {*complete, "tests/helpers.py"} - {"lightning_mnp/cli/demo.yaml"}
    assert list(check["wheel_faults"](changed, package)) == [
        "the wheel lacks lightning_mnp/cli/demo.yaml",
        "the wheel has tests/helpers.py, which is no part of the package",
    ]


@pytest.mark.parametrize(
    "unwanted",
    [".ci/run", ".github/dependabot.yml", "runs/a.ckpt", "benchmarks/results/a.json", "x/y.py"],
)
def test_build_check_knows_what_users_get(unwanted: str) -> None:
    check = runpy.run_path(str(REPOSITORY / ".ci" / "check_build.py"))
    package = {"lightning_mnp/py.typed"}
    complete = {*package, *check["NEEDED"], "", "PKG-INFO", "tests", "tests/helpers.py"}
    assert list(check["sdist_faults"](complete, package)) == []
    changed = {*complete, unwanted} - {"docs/index.md"}
    assert list(check["sdist_faults"](changed, package)) == [
        "the source distribution lacks docs/index.md",
        f"the source distribution has {unwanted}, which is not for users",
    ]


def test_project_has_its_addresses() -> None:
    [urls] = re.findall(r"^\[project\.urls\]\n(.*?)\n\n", PROJECT, re.MULTILINE | re.DOTALL)
    found = dict(re.findall(r'^(\w+) = "(https://.+)"$', urls, re.MULTILINE))
    assert set(found) == {"Homepage", "Documentation", "Source", "Issues", "Changelog"}
    assert all(url.startswith(found["Source"]) for url in found.values())

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmark_site import make_site, quick_fit, tiny_network
from cell_results import result, write

from lightning_mnp.benchmark import networks
from lightning_mnp.benchmark.records import read_cells
from lightning_mnp.checkpoints.atomic_write import OutputError
from lightning_mnp.cli import benchmark as module
from lightning_mnp.cli.benchmark import parse_seconds
from lightning_mnp.cli.command_line import main

CONFIG = """
base: site/base.yaml
grids:
  - attacks: [clean, badnets]
    defenses: [{name: clp, options: {rule: number, amount: 1}}]
    defense_sizes: [8]
"""

Write = Callable[[str], Path]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setattr(sys, "argv", ["lightning-mnp"])


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a configuration to another folder than that of the command."""
    monkeypatch.setattr(networks, "build_network", tiny_network)
    monkeypatch.setattr(networks, "training_version", lambda recipe: "0123456789ab")
    monkeypatch.setattr("lightning_mnp.benchmark.run.cell_version", lambda cell: "version")
    make_site(tmp_path / "elsewhere" / "site")

    def write(text: str) -> Path:
        path = tmp_path / "elsewhere" / "config.yaml"
        path.write_text(text)
        return path

    return write


def run(*words: str) -> int:
    return module.main(["run", *words], quick_fit)


def test_cells_are_measured_and_kept(
    config: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(CONFIG)
    assert run("--config", str(path)) == 0
    told = capsys.readouterr().out
    assert "2 cells measured, 0 kept; results are in benchmarks/results/cells" in told
    assert "trained, CA " in told
    assert (tmp_path / "runs" / "benchmark").is_dir()
    assert len(read_cells(Path("benchmarks/results/cells"))) == 2
    assert run(f"--config={path}", "--progress=false") == 0
    assert "0 cells measured, 2 kept" in capsys.readouterr().out


def test_another_folder_of_images_makes_other_cells(config: Write) -> None:
    path = config(CONFIG)
    for folder in ("cats", "dogs"):
        assert run("--config", str(path), "--data", folder) == 0
    roots = {
        each["cell"]["network"]["root"]
        for each in read_cells(Path("benchmarks/results/cells")).values()
    }
    assert roots == {str(Path("cats").absolute()), str(Path("dogs").absolute())}


def test_the_exit_code_tells_of_a_failed_cell(
    config: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(CONFIG.replace("amount: 1", "amount: 400"))
    assert run("--config", str(path), "--out", "other") == 1
    assert "0 cells measured, 0 kept, 2 failed; results are in other" in capsys.readouterr().out
    [content, _] = read_cells(Path("other")).values()
    assert "Lower `amount`" in content["error"]["message"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("badnets]", "badnet]", r"Expected an attack out of clean, .*Did you mean 'badnets'\?"),
        ("name: clp", "name: clpp", r"Expected a defense out of .*Did you mean 'clp'\?"),
        ("amount: 1", "amuont: 1", r"Expected an option of 'clp'.*Did you mean 'amount'\?"),
        (
            "defenses:",
            "defences:",
            r"Expected a key of a grid in .*'defences'. Did you mean 'defens",
        ),
        ("grids:", "options: {model.widths: 3}\ngrids:", r"Classifier takes.*Did you mean 'width"),
        (
            "grids:",
            "test_image: 3\ngrids:",
            r"Expected an option in .*Did you mean 'test_images'\?",
        ),
        ("grids:", "test_images: 0\ngrids:", "`test_images` to be at least 1, but got 0"),
        ("grids:", "budget: soon\ngrids:", "`budget` to be a time above 0, .* but got 'soon'"),
        ("grids:", "budget: 0\ngrids:", "`budget` to be a time above 0, .* but got 0"),
        ("grids:", "out: site/base.yaml/x\ngrids:", "`out` to be where files can be written"),
        ("grids:", "networks: full\ngrids:", "`networks` to be where files can be written"),
        ("grids:", "jobs: 0\ngrids:", "`jobs` to be at least 1, but got 0"),
        ("[8]", "[1]", "`defense_sizes` of a grid to be at least 2"),
    ],
)
def test_mistakes_are_told_before_any_training(
    config: Write, tmp_path: Path, old: str, new: str, message: str
) -> None:
    path = config(CONFIG.replace(old, new))
    for name in ("full", "site/base.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()  # a file where a folder is wanted
    with pytest.raises((ValueError, OutputError), match=message):
        run("--config", str(path))
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "benchmarks").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["run", "--budgt", "3s"],
            r"option of the command .* got 'budgt'. Did you mean 'budget'\?",
        ),
        (["report", "--jobs=2"], "an option of the command to be one of config, help, out, plots"),
    ],
)
def test_unknown_options_of_the_command(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module.main(words, quick_fit)


def test_missing_options_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", "run"])
    assert stop.value.code == 2
    error, usage = capsys.readouterr().err.splitlines()
    assert error == "error: Expected arguments `--base` and `--grids`, but got none of them."
    assert usage.startswith("usage: lightning-mnp benchmark run --config FILE [options]; ")
    with pytest.raises(SystemExit):
        main(["benchmark", "nope"])
    error, usage = capsys.readouterr().err.splitlines()
    assert "invalid choice: 'nope'" in error
    assert usage.startswith("usage: lightning-mnp benchmark {run,report} [options]; ")


def test_a_mistake_is_an_error_of_the_command(
    config: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(CONFIG.replace("badnets]", "badnet]"))
    assert main(["benchmark", "run", "--config", str(path)]) == 2
    told = capsys.readouterr().err
    assert "error: Expected an attack out of clean, badnets" in told
    assert "LIGHTNING_MNP_DEBUG" in told


@pytest.mark.parametrize("word", ["--config={}", "--base={}"])
def test_a_file_that_is_no_yaml_is_an_error_of_the_command(
    word: str, config: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(CONFIG)
    bad = path.with_name("bad.yaml")
    bad.write_text("grids: [\n  a: b")
    assert main(["benchmark", "run", "--config", str(path), word.format(bad)]) == 2
    assert "bad.yaml to hold YAML, but in line 2 it does not:" in capsys.readouterr().err


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write([result()], tmp_path / "cells")
    command = ["benchmark", "report", "--results", "cells", "--out", "page", "--plots", "false"]
    assert main(command) == 0
    assert "files written: page/report.md and others beside it" in capsys.readouterr().out
    assert "| BadNets | ours | 95.00 / 100.00 |" in (tmp_path / "page" / "report.md").read_text()


@pytest.mark.parametrize(("given", "budget"), [("500", 500.0), ("500s", "500s"), ("'8m'", "8m")])
def test_a_budget_may_be_a_number(
    given: str, budget: float | str, config: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    monkeypatch.setattr(module, "_run", lambda fit, **values: found.append(values["budget"]) or 0)
    path = config(CONFIG)
    run("--config", str(path), "--budget", given.strip("'"))
    path = config(f"{CONFIG}budget: {given}\n")
    run("--config", str(path))
    assert found == [budget, budget]


def test_paths_may_begin_with_a_tilde(
    config: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    found: dict[str, Any] = {}
    monkeypatch.setattr(module, "_run", lambda fit, **values: found.update(values) or 0)
    monkeypatch.setattr(module, "_report", lambda **values: found.update(values) or 0)
    path = config(f"{CONFIG}networks: ~/networks\n")
    assert run("--config", str(path), "--out=~/cells", "--data=~/data") == 0
    assert module.main(["report", "--results=~/cells", "--out=~/tables"], quick_fit) == 0
    home = tmp_path / "home"
    assert [found[name] for name in ("networks", "data")] == [home / "networks", home / "data"]
    assert [found[name] for name in ("results", "out")] == [home / "cells", home / "tables"]


def test_a_report_without_matplotlib_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write([result()], tmp_path / "cells")
    for place in ("benchmark.report", "cli.benchmark"):
        monkeypatch.setattr(f"lightning_mnp.{place}.find_spec", lambda name: None)
    assert main(["benchmark", "report", "--results", "cells"]) == 0
    assert 'No plots: `pip install "lightning-mnp[plots]"`' in capsys.readouterr().out


def test_a_report_with_nothing_to_draw_does_not_ask_for_matplotlib(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    write([result("nc", None, task="detector", verdict="clean")], tmp_path / "cells")
    assert main(["benchmark", "report", "--results", "cells"]) == 0
    out = capsys.readouterr().out
    assert "files written" in out
    assert "matplotlib" not in out
    assert not list((tmp_path / "runs").rglob("*.png"))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500s", 500.0), ("8m", 480.0), ("1.5h", 5400.0), ("7", 7.0), (7, 7.0), (None, None)],
)
def test_times(text: float | str | None, seconds: float | None) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "-3s", "0", "nan", "inf", "3 days"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ValueError, match="`budget` to be a time above 0"):
        parse_seconds(text)

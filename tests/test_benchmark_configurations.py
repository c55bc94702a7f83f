"""The ready configurations of the benchmark are understood, down to every network and method."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from benchmark_site import make_site
from helpers import REPOSITORY

from lightning_mnp.benchmark.grid import Cell, Grid, cells_of
from lightning_mnp.benchmark.methods import Method
from lightning_mnp.benchmark.networks import NetworkFolder
from lightning_mnp.benchmark.results import paper_figures
from lightning_mnp.cli.command_line import main

FOLDER = REPOSITORY / "benchmarks" / "configs"
SCRIPT = REPOSITORY / "benchmarks" / "gpu.sh"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


@functools.cache
def cells(name: str) -> list[Cell]:
    content = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    grids = [
        Grid(
            **{
                key: [Method(**each) if isinstance(each, dict) else each for each in values]
                if isinstance(values, list)
                else values
                for key, values in grid.items()
            }
        )
        for grid in content["grids"]
    ]
    return cells_of(grids, (FOLDER / content["base"]).resolve(), options=content["options"])


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_has_cells(name: str) -> None:
    found = cells(name)
    assert found
    assert all(cell.network.digest and cell.name for cell in found)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "figure3" else pytest.mark.slow) for name in NAMES],
)
def test_the_command_understands_a_configuration(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-mnp"])
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", "run", "--config", str(FOLDER / f"{name}.yaml"), "--print_config"])
    assert stop.value.code == 0, capsys.readouterr().err


def attacks(name: str) -> set[str]:
    names = {"InputAware": "IAB", "FeatureCollision": "FC"}
    found = {cell.network.attack_name for cell in cells(name)}
    return {names.get(each, each) for each in found}


def test_the_tables_have_the_attacks_and_methods_of_the_paper() -> None:
    rows = {number: set(paper_figures()[number]["rows"]) - {"Average"} for number in ("1", "2")}
    assert attacks("table1") == rows["1"] | {"clean"}
    assert attacks("gpu") == attacks("table1")
    assert attacks("table2") | attacks("table2-rest") == rows["2"] | {"clean"}
    assert len(attacks("table2") - {"clean"}) == 3
    methods = set(paper_figures()["1"]["rows"]["BadNets"]) - {"none"}
    for name in ("table1", "table2", "table2-rest"):
        assert methods <= {cell.method.name for cell in cells(name)}


def test_table_3_has_the_rates_and_modes_of_the_paper() -> None:
    told = [cell.network.described() for cell in cells("table3")]
    found = {(each["rate"], each["mode"]) for each in told}
    rows = paper_figures()["3"]["rows"]
    assert found == {(float(rate), mode) for mode, rates in rows.items() for rate in rates}


def test_table_4_has_networks_enough() -> None:
    rows = paper_figures()["4"]["rows"]
    found = {(cell.network.attack_name, cell.network.seed) for cell in cells("table4")}
    seeds = {name: sum(attack == name for attack, _ in found) for name, _ in found}
    assert seeds.pop("clean") >= 10
    assert len(seeds) == len(rows["mnp"]) - 1
    assert min(seeds.values()) >= 3
    assert set(rows) <= {cell.method.name for cell in cells("table4")}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_fit_understands_every_network(name: str, tmp_path: Path) -> None:
    for recipe in {cell.network.attack: cell.network for cell in cells(name)}.values():
        NetworkFolder(tmp_path, recipe).check(main, tmp_path)


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    search = os.pathsep.join([str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH", "")])
    everything = {**os.environ, "PYTHONPATH": search, **environment}
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        env=everything,
        check=False,
    )


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
@pytest.mark.parametrize("arguments", [(), ("run", "one"), ("pack",), ("other", "a", "b")])
def test_the_script_for_a_gpu_says_how_it_is_used(arguments: tuple[str, ...]) -> None:
    done = script(*arguments)
    assert done.returncode == 2
    assert "gpu.sh pack BUNDLE" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_the_script_for_a_gpu_runs_on_a_cpu(tmp_path: Path) -> None:
    base = make_site(tmp_path / "site")
    grids = [{"attacks": ["badnets"], "defenses": ["clp"], "defense_sizes": [8]}]
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"base": str(base), "grids": grids}))
    bundle = tmp_path / "bundle"
    (bundle / "images").mkdir(parents=True)
    subprocess.run(
        ["tar", "-cJf", bundle / "data.tar.xz", "-C", bundle / "images", "."], check=True
    )
    small = {"CONFIG": str(config), "DEVICE": "cpu", "JOBS": "1", "TESTS": "", "LIMIT": "400"}
    done = script("run", str(bundle), str(tmp_path / "out"), **small)
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "out" / "run.log").read_text()
    assert "1 cells measured, 0 kept" in log, log
    assert done.stdout.splitlines()[-1] == "1"
    # Earlier cells are kept: the archive of a run is where the next one goes on.
    cells = tmp_path / "earlier"
    cells.mkdir()
    archive = tmp_path / "out" / "cells.tar.gz"
    subprocess.run(["tar", "-xzf", archive, "-C", cells, "--strip-components", "1"], check=True)
    again = script("run", str(bundle), str(tmp_path / "out"), RESULTS=str(cells), **small)
    assert again.returncode == 0, again.stderr
    assert "0 cells measured, 1 kept" in (tmp_path / "out" / "run.log").read_text()

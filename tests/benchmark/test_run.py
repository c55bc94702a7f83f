from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from benchmark_site import make_site, quick_fit, tiny_network
from torch import nn

from lightning_mnp import baselines
from lightning_mnp.baselines import BaselineResult, DetectionResult
from lightning_mnp.benchmark import networks
from lightning_mnp.benchmark import run as module
from lightning_mnp.benchmark.executors import Executor, HereExecutor, open_executor
from lightning_mnp.benchmark.grid import Cell, Grid, cells_of
from lightning_mnp.benchmark.networks import Fit
from lightning_mnp.benchmark.records import read_cells
from lightning_mnp.benchmark.run import Places, Summary, cell_version, run_benchmark, run_cell

calls: list[str] = []


def nothing(network: nn.Module, images: Any, seed: int) -> BaselineResult:
    calls.append(f"nothing {seed}")
    return BaselineResult(network, [("conv1", 0)], [0.5], 1.0, 1.0, {"seed": seed})


def broken(network: nn.Module, images: Any, seed: int) -> BaselineResult:
    calls.append("broken")
    raise ArithmeticError("Expected the loss to be finite.")


def suspicious(network: nn.Module, images: Any, seed: int, suspects: Any = None) -> DetectionResult:
    return DetectionResult(float(len(suspects)), 1.0, 2, {})


@pytest.fixture(autouse=True)
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Build the smallest networks; other processes do not get them."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(networks, "build_network", tiny_network)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    calls.clear()
    baselines.register("nothing", nothing)
    baselines.register("broken", broken)
    baselines.register_detector("suspicious", suspicious)
    yield
    baselines.unregister("nothing")
    baselines.unregister("broken")
    baselines.unregister_detector("suspicious")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_site(tmp_path / "site")


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(tmp_path / "results", tmp_path / "networks")


def grid(*defenses: str, **options: Any) -> Grid:
    return Grid(["badnets"], list(defenses), **{"defense_sizes": [8], **options})


def run(cells: list[Cell], places: Places, fit: Fit = quick_fit, **options: Any) -> Summary:
    return run_benchmark(cells, places, HereExecutor(), fit, **options)


def test_a_cell_has_figures_costs_and_origin(base: Path, places: Places) -> None:
    [cell] = cells_of([grid("nothing")], base)
    assert run([cell], places) == Summary(done=1)
    [(name, content)] = read_cells(places.results).items()
    assert name == cell.name
    assert content["status"] == "done"
    assert content["cell"] == json.loads(json.dumps(cell.described()))
    assert content["before"] == content["after"]
    assert content["pruned_filters"] == [["conv1", 0]]
    assert (content["pruned"], content["details"]) == (1, {"seed": 0})
    assert content["code"] == cell_version(cell)
    assert content["machine"]["versions"]["torch"]
    assert content["training"]["seconds"] >= 0
    assert content["at_a_time"] == 1
    assert {"seconds", "passes", "peak_mib", "date", "verdict"} <= content.keys()


def test_a_detector_has_a_verdict(base: Path, places: Places) -> None:
    [cell] = cells_of(
        [Grid(["badnets"], detectors=["suspicious"], defense_sizes=[8])], base, suspects=12
    )
    run([cell], places)
    [content] = read_cells(places.results).values()
    assert (content["verdict"], content["target_class"], content["score"]) == (
        "backdoored",
        2,
        12.0,
    )
    assert content["suspects"] == 12
    assert content["after"] is None


def test_a_network_is_trained_once_for_its_cells(base: Path, places: Places) -> None:
    trained: list[str] = []

    def fit(arguments: list[str]) -> int:
        trained.append(Path(arguments[2]).parent.name.partition("-seed")[0])
        return quick_fit(arguments)

    grids = [grid("nothing", "clp"), Grid(["cl"], ["nothing"], defense_sizes=[8])]
    assert run(cells_of(grids, base), places, fit).done == 3
    assert trained == ["badnets", "clean", "cl"]  # CL needs a clean network


def test_fine_tuned_networks_start_from_one_clean_network(base: Path, places: Places) -> None:
    started: dict[str, str | None] = {}

    def fit(arguments: list[str]) -> int:
        path = Path(arguments[2])
        model = yaml.safe_load(path.read_text())["model"]["init_args"]
        started[path.parent.name.partition("-seed")[0]] = model.get("checkpoint")
        return quick_fit(arguments)

    tuned = {"trainer.max_epochs": 3}
    grids = [Grid(["badnets", "wanet"], ["nothing"], defense_sizes=[8], fine_tuning=tuned)]
    assert run(cells_of(grids, base), places, fit).done == 2
    assert list(started) == ["clean", "badnets", "wanet"]
    assert started["clean"] is None
    [clean] = places.networks.glob("clean-*/checkpoints/last.ckpt")
    assert started["badnets"] == started["wanet"] == str(clean)


def test_what_is_there_is_kept_and_a_changed_cell_alone_runs_again(
    base: Path, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = cells_of([grid("nothing", seeds=[0, 1])], base)
    assert run(cells, places) == Summary(done=2)
    assert run(cells, places) == Summary(kept=2)
    other = cells_of([grid("nothing", seeds=[0, 1], defense_seeds=[0, 5])], base)
    assert run(other, places) == Summary(kept=2, done=2)
    assert calls == ["nothing 0", "nothing 0", "nothing 5", "nothing 5"]
    # Another version of the code of one cell.
    versions = cell_version
    monkeypatch.setattr(
        module, "cell_version", lambda cell: versions(cell) + "x" * (cell.network.seed == 1)
    )
    assert run(cells, places, any_code=True) == Summary(kept=2)
    assert run(cells, places) == Summary(kept=1, done=1)
    assert run(cells, places) == Summary(kept=2)


def test_an_interrupted_run_goes_on(base: Path, places: Places) -> None:
    cells = cells_of([grid("nothing", defense_seeds=[0, 1, 2])], base)

    def interrupted(network: nn.Module, images: Any, seed: int) -> BaselineResult:
        if seed == 1:
            raise KeyboardInterrupt
        return nothing(network, images, seed)

    baselines.unregister("nothing")
    baselines.register("nothing", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(cells, places)
    assert calls == ["nothing 0"]
    baselines.unregister("nothing")
    baselines.register("nothing", nothing)
    assert run(cells, places) == Summary(kept=1, done=2)
    assert calls == ["nothing 0", "nothing 1", "nothing 2"]


def test_a_failing_cell_is_a_row_with_its_error_and_is_tried_again(
    base: Path, places: Places
) -> None:
    cells = cells_of([grid("broken", "nothing")], base)
    assert run(cells, places) == Summary(done=1, failed=1)
    content = read_cells(places.results)[cells[0].name]
    assert content["status"] == "failed"
    assert content["error"]["type"] == "ArithmeticError"
    assert content["error"]["message"] == "Expected the loss to be finite."
    assert "raise ArithmeticError" in " ".join(content["error"]["trace"])
    assert run(cells, places) == Summary(kept=1, failed=1)
    assert calls == ["broken", "nothing 0", "broken"]


def test_a_failure_replaces_no_result(
    base: Path, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = cells_of([grid("nothing")], base)
    run(cells, places)
    [before] = read_cells(places.results).values()
    monkeypatch.setattr(module, "cell_version", lambda cell: "other")
    monkeypatch.setattr(module, "_measured", None)  # would fail
    assert run(cells, places) == Summary(failed=1)
    assert list(read_cells(places.results).values()) == [before]


def test_a_training_that_fails_is_the_error_of_its_cells(base: Path, places: Places) -> None:
    cells = cells_of([Grid(["cl", "badnets"], ["nothing"], defense_sizes=[8])], base)

    def fit(arguments: list[str]) -> int:
        return 1 if Path(arguments[2]).parent.name.startswith("clean") else quick_fit(arguments)

    assert run(cells, places, fit) == Summary(done=1, failed=1)
    content = read_cells(places.results)[cells[0].name]
    assert content["error"]["type"] == "RuntimeError"
    assert "Training clean-seed0" in content["error"]["message"]


def test_memory_that_runs_out_is_named(
    base: Path, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    [cell] = cells_of([grid("nothing")], base)
    run([cell], places)

    def full(*arguments: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: not enough memory")

    monkeypatch.setattr(module, "_measured", full)
    assert run_cell(cell, places)["error"]["type"] == "OutOfMemoryError"


def test_a_budget_leaves_what_does_not_fit(
    base: Path, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("lightning_mnp.benchmark.jobs.time.monotonic", lambda: now[0])

    def slow(network: nn.Module, images: Any, seed: int) -> BaselineResult:
        now[0] += 40.0
        return nothing(network, images, seed)

    baselines.unregister("nothing")
    baselines.register("nothing", slow)
    cells = cells_of([grid("nothing", defense_seeds=[0, 1, 2, 3])], base)
    summary = run(cells, places, budget=100.0)
    assert summary == Summary(done=2, left=2)
    assert "2 left, which did not fit into the budget" in str(summary)
    assert run(cells, places) == Summary(kept=2, done=2)


def test_times_of_earlier_cells_count(base: Path, places: Places) -> None:
    cells = cells_of([grid("nothing", defense_seeds=[0, 1])], base)
    run(cells[:1], places)
    [path] = places.results.iterdir()
    content = json.loads(path.read_text())
    content["seconds"] = 500.0
    path.write_text(json.dumps(content))
    assert run(cells, places, budget=400.0) == Summary(kept=1, left=1)


@pytest.mark.parametrize(
    ("change", "alike"),
    [
        ({}, True),
        ({"width": 64}, False),
        ({"architecture": "cifar_resnet34"}, False),
        ({"device": "cuda"}, False),
        ({"data": "ImageNetSubsetDataModule"}, False),
        ({"label": "anp"}, False),
        ({"task": "detector"}, False),
        ({"status": "failed"}, False),
    ],
)
def test_only_times_of_the_same_method_on_networks_of_the_same_shape_count(
    change: dict[str, Any], alike: bool, base: Path, places: Places
) -> None:
    cells = cells_of([grid("nothing", defense_seeds=[0, 1, 2])], base)
    run(cells[:2], places)
    for path, seconds in zip(sorted(places.results.iterdir()), (500.0, 1.0), strict=True):
        content = json.loads(path.read_text())
        content["seconds"] = seconds  # of several, the longest counts
        for name, value in change.items():
            where = {"label": content["cell"], "task": content["cell"], "status": content}
            where.get(name, content["cell"]["network"])[name] = value
        path.write_text(json.dumps(content))
    # Failed cells are tried again.
    done = 3 if "status" in change else 1
    expected = Summary(kept=2, left=1) if alike else Summary(kept=3 - done, done=done)
    assert run(cells, places, budget=400.0) == expected


def test_the_time_of_a_failed_cell_is_not_learned(base: Path, places: Places) -> None:
    cells = cells_of([grid("broken", "nothing")], base)
    jobs = module._jobs(cells, places, quick_fit, 1, False, [])
    results = [run_cell(cell, places) for cell in cells]  # there is no network
    assert [job.failed(each) for job, each in zip(jobs[1:], results, strict=True)] == [True, True]
    run(cells, places)
    told = read_cells(places.results)
    assert [job.failed(told[job.name]) for job in jobs[1:]] == [True, False]


def test_it_is_kept_how_many_cells_were_measured_at_a_time(base: Path, places: Places) -> None:
    class Two(HereExecutor):
        slots = 2

    [cell] = cells_of([grid("nothing")], base)
    run_benchmark([cell], places, Two(), quick_fit)
    [content] = read_cells(places.results).values()
    assert content["at_a_time"] == 2


def test_a_clean_training_takes_as_long_as_clean_trainings_did(base: Path, places: Places) -> None:
    def tuned(*attacks: str, seed: int) -> list[Cell]:
        tuning = {"trainer.max_epochs": 3}
        sizes = {"defense_sizes": [8], "seeds": [seed]}
        return cells_of([Grid([*attacks], ["nothing"], fine_tuning=tuning, **sizes)], base)

    run(tuned("clean", "badnets", seed=0), places)
    for path in places.results.iterdir():
        content = json.loads(path.read_text())
        content["seconds"] = 0.1
        content["training"]["seconds"] = 500.0 if path.name.startswith("clean") else 0.1
        path.write_text(json.dumps(content))
    assert run(tuned("badnets", seed=1), places, budget=400.0) == Summary(left=1)
    assert run(tuned("badnets", seed=1), places, budget=600.0) == Summary(done=1)


def test_other_test_images_are_measured_anew(base: Path, places: Places) -> None:
    run(cells_of([grid("nothing")], base), places)
    [cell] = cells_of([grid("nothing")], base, test_images=7)
    run([cell], places)
    content = read_cells(places.results)[cell.name]
    assert content["before"] == content["after"]
    assert round(7 * content["before"]["CA"], 3) % 1 == 0


def test_progress_is_told(base: Path, places: Places) -> None:
    told: list[tuple[str, int, int]] = []
    cells = cells_of([grid("nothing", "broken")], base)
    run(cells, places, say=lambda line, done, total: told.append((line, done, total)))
    assert [(done, total) for _, done, total in told] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert "0 of 2 cells are there" in told[0][0]
    assert "trained, CA " in told[1][0]
    assert ", ASR " in told[2][0]
    assert "ArithmeticError: Expected the loss to be finite." in told[3][0]


def figures(places: Places) -> dict[str, Any]:
    """What does not depend on time and memory."""
    names = ("before", "after", "pruned_filters", "details", "verdict", "score", "code")
    return {
        name: {key: content[key] for key in names}
        for name, content in read_cells(places.results).items()
    }


def several(base: Path) -> list[Cell]:
    grids = [
        Grid(
            ["clean", "badnets"],
            ["clp", "ft"],
            detectors=["sc"],
            defense_sizes=[16],
        )
    ]
    return cells_of(grids, base, suspects=16)


@pytest.fixture
def in_one_process(base: Path, places: Places) -> dict[str, Any]:
    here = replace(places, results=places.results.with_name("here"))
    assert run(several(base), here) == Summary(done=6)
    return figures(here)


def elsewhere(base: Path, places: Places, executor: Executor) -> dict[str, Any]:
    fresh = replace(places, networks=places.networks.with_name("other-networks"))
    assert run_benchmark(several(base), fresh, executor, quick_fit) == Summary(done=6)
    return figures(fresh)


@pytest.mark.slow  # two processes have to import torch
def test_two_processes_give_the_same_cells(
    base: Path, places: Places, in_one_process: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", search_path())
    with open_executor(jobs=2) as executor:
        assert elsewhere(base, places, executor) == in_one_process


@pytest.mark.slow  # starts a Ray cluster
def test_two_workers_of_ray_give_the_same_cells(
    base: Path, places: Places, in_one_process: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", search_path())
    with open_executor("ray", 2) as executor:
        assert elsewhere(base, places, executor) == in_one_process


def search_path() -> str:
    """Where other processes find the helpers of the tests."""
    return os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])

"""Several processes come to what one comes to, and one that dies ends the run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import distributed_script as script
import pytest
import torch
from helpers import REPOSITORY, TinyDataModule, sorted_rows
from lightning.fabric.utilities.exceptions import MisconfigurationException
from loader_script import figures
from metric_cases import METRICS, samples
from torch import nn

import lightning_mnp
from lightning_mnp import MNPModule
from lightning_mnp.cli.command_line import main
from lightning_mnp.hosting import processes
from lightning_mnp.models import Classifier

DOORS = ("callback", "module", "sampler", "gathered", "synchronized")
# For a machine that is busy; the processes themselves need a few seconds.
PATIENCE = 300

several_processes = pytest.mark.distributed


def start(count: int, what: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the script, which starts the other processes itself, as Lightning does it."""
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "tests/distributed_script.py"), str(count), what, folder],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def store_weights(folder: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(Classifier(width=2, in_channels=1).state_dict(), folder / "suspicious.pt")


class Run(NamedTuple):
    """What several processes have left; starting them takes long, so all tests look at one run."""

    count: int
    folder: Path
    outcomes: list[dict[str, Any]]
    errors: list[dict[str, str]]
    metrics: list[dict[str, float]]
    returncode: int


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    count = request.param
    folder = tmp_path_factory.mktemp(f"processes-{count}")
    store_weights(folder)
    result = start(count, "all_doors", folder)
    paths = [folder / f"outcomes-{rank}.pt" for rank in range(count)]
    assert all(path.exists() for path in paths), result.stderr
    stored = zip(*(torch.load(path, weights_only=True) for path in paths), strict=True)
    outcomes, errors, metrics = map(list, stored)
    return Run(count, folder, outcomes, errors, metrics, result.returncode)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("alone")
    return script.through_function(folder, script.small_network(), loader=script.data())


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in ("verdict", "pruned", "images"):
        assert found[name] == expected[name]
    assert found["ratio"] == pytest.approx(expected["ratio"], abs=1e-5)
    assert len(expected["masks"]) == 20
    for name in ("scores", "masks"):
        assert torch.allclose(found[name], expected[name], rtol=0, atol=1e-5)
    assert found["weights"].keys() == expected["weights"].keys()
    for name, tensor in expected["weights"].items():
        assert torch.allclose(found["weights"][name], tensor, rtol=0, atol=1e-5), name


@several_processes
@pytest.mark.parametrize("door", DOORS)
def test_every_process_comes_to_what_one_comes_to(
    door: str, run: Run, alone: dict[str, Any]
) -> None:
    assert len(alone["pruned"]) == 3
    for outcome in run.outcomes:
        assert_same(outcome[door], alone)


@several_processes
def test_one_process_of_several_may_work_alone(run: Run, alone: dict[str, Any]) -> None:
    assert_same(run.outcomes[0]["one alone"], alone)


@several_processes
def test_one_report_and_one_output(run: Run) -> None:
    count, folder = run.count, run.folder
    for door in ("callback", "module"):
        written = sorted(path.name for path in (folder / door).iterdir())
        assert written == ["mnp-report.html", "mnp-report.json", "mnp.ckpt"]
        report = json.loads((folder / door / "mnp-report.json").read_text())
        assert report["verdict"] == run.outcomes[0][door]["verdict"]
    expected = {f"outcomes-{rank}.pt" for rank in range(count)}
    expected |= {"callback", "module", f"purified-{count}.pt", f"report-{count}.json"}
    expected |= {"loader"} if count == 2 else set()
    assert {path.name for path in folder.iterdir()} == {*expected, "suspicious.pt"}


@several_processes
@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
def test_command_line_in_several_processes_equals_one(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, folder = run.count, run.folder
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setattr(sys, "argv", ["lightning-mnp"])
    store_weights(tmp_path)
    # Not started from outside, one process does the work, also with `--trainer.devices 2`.
    assert main(script.command(count, tmp_path)) in (0, 3, 4)
    reports = [json.loads((f / f"report-{count}.json").read_text()) for f in (folder, tmp_path)]
    assert reports[0]["verdict"] == reports[1]["verdict"]
    assert reports[0]["pruned"] == reports[1]["pruned"]
    assert reports[0]["pruning"]["scores"] == pytest.approx(
        reports[1]["pruning"]["scores"], abs=1e-5
    )
    weights = [
        lightning_mnp.read_state_dict(f / f"purified-{count}.pt") for f in (folder, tmp_path)
    ]
    for name, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][name], rtol=0, atol=1e-5), name


@several_processes
def test_an_error_in_one_process_is_an_error_in_all(run: Run) -> None:
    assert "it raised OSError after 0: no such disk" in run.errors[-1]["broken"]
    for error in run.errors[:-1]:
        expected = (
            f"Process {run.count - 1} of {run.count} could not read its part of the defense set"
        )
        assert expected in error["broken"]


@several_processes
def test_processes_that_part_stop_before_they_wait_for_each_other(run: Run) -> None:
    for error in run.errors:
        assert "they have come to different places" in error["parted"]
    assert not (run.folder / "parted").exists()


@several_processes
def test_metrics_of_several_processes_equal_those_of_one(run: Run) -> None:
    for name, (_, function) in METRICS.items():
        expected = float(function(*samples(name)))
        for found in run.metrics:
            assert found[name] == pytest.approx(expected), name


@several_processes
def test_processes_share_the_images_and_resume(run: Run) -> None:
    if run.count != 2:
        pytest.skip("the images are shared between two")
    outcomes = [torch.load(run.folder / f"loader/{rank}.pt", weights_only=True) for rank in (0, 1)]
    images = TinyDataModule().clean_train_set.to_memory()
    for epoch in range(2):
        parts = [batch for each in outcomes for batch in each["seen"] if batch[0] == epoch]
        assert [len(batch[3]) for batch in parts] == [16, 8, 16, 8]
        found = sorted_rows(*(torch.cat([batch[column] for batch in parts]) for column in (2, 3)))
        stored = (images.images.float() / 255.0 - 0.5) / 0.25
        assert torch.tensor(found).allclose(torch.tensor(sorted_rows(stored, images.labels)))
    for outcome in outcomes:
        assert len(outcome["resumed"]) == 1
        for one, other in zip(outcome["resumed"][0], outcome["seen"][3], strict=True):
            assert torch.as_tensor(one).equal(torch.as_tensor(other))
        # An image that fills up the last batch of a process counts once.
        assert outcome["figures"] == pytest.approx(figures())


# `start` comes back when all processes have closed their output: none of them hangs.
@several_processes
def test_a_first_process_that_dies_ends_the_run(run: Run) -> None:
    assert run.returncode == 7
    assert not (run.folder / "dying").exists()


@several_processes
@pytest.mark.slow
def test_a_last_process_that_dies_ends_the_run(tmp_path: Path) -> None:
    result = start(2, "last_dies", tmp_path)
    assert result.returncode != 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
def test_the_demo_takes_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setattr(sys, "argv", ["lightning-mnp"])
    assert main(["demo", "--trainer.strategy=ddp", "--trainer.devices=2"]) == 2
    assert "Expected one process for the demo, but got 2" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def pretend(monkeypatch: pytest.MonkeyPatch, *others: Any) -> None:
    """Let there be other processes that give these values whenever they are asked."""
    for module in (
        "module",
        "hosting.processes",
        "hosting.lightning_host",
    ):
        monkeypatch.setattr(f"lightning_mnp.{module}.process_count", lambda: 1 + len(others))
        monkeypatch.setattr(
            f"lightning_mnp.{module}.gather_objects", lambda value: [value, *others]
        )


def test_epochs_of_different_length_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 3)
    monkeypatch.setattr("lightning_mnp.module.refuse_other_processes", lambda trainer: None)
    module = MNPModule(script.small_network(), script.CONFIG)
    with pytest.raises(MisconfigurationException, match=r"same number of batches .* got \[4, 3\]"):
        script.quiet_trainer(max_epochs=-1).fit(module, script.data())


def test_a_trainer_of_one_process_in_a_group_of_several_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, None)
    module = MNPModule(script.small_network(), script.CONFIG)
    with pytest.raises(MisconfigurationException, match="has 1 and the group has 2"):
        script.quiet_trainer(max_epochs=-1).fit(module, script.data())


def test_parts_of_different_shape_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = [torch.zeros(2, 1, 9, 9)], [torch.arange(2)]
    answers = iter([[None, None], ["one", "another"]])
    pretend(monkeypatch)
    monkeypatch.setattr("lightning_mnp.defense_data.defense_set.process_count", lambda: 2)
    monkeypatch.setattr(processes, "gather_objects", lambda value: next(answers, [value, other]))
    with pytest.raises(ValueError, match="to have one shape"):
        lightning_mnp.DefenseSet.from_loader(script.data(), gather=True)


@pytest.mark.parametrize("inside", [False, True])
def test_parallel_wrappers_are_refused(inside: bool) -> None:
    network: nn.Module = nn.DataParallel(script.small_network())
    if inside:
        network = nn.Sequential(network)
    match = "but '0' in it is a DataParallel" if inside else "but it is a DataParallel. Pass its"
    with pytest.raises(ValueError, match=match):
        lightning_mnp.audit(network, script.data())

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger
from pytorch_lightning.loggers import CSVLogger as OtherCSVLogger
from reports import full_report

from lightning_mnp.hosting.loggers import is_a, log_files, log_outcome, run_name
from lightning_mnp.report import DefenseReport


class Recorder:
    """An experiment that keeps all calls."""

    id = "run7"

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.summary: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **options: self.calls.append((name, args))

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [args for called, args in self.calls if called == name]


class FakeLogger:
    """What loggers have in common."""

    run_id = version = "run7"

    def __init__(self) -> None:
        self.experiment = Recorder()
        self.metrics: dict[str, float] = {}

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.metrics.update(metrics, step=step)


class TensorBoardLogger(FakeLogger):
    pass


class WandbLogger(FakeLogger):
    pass


class MLFlowLogger(FakeLogger):
    pass


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package, of which only these are used."""

    class Artifact:
        def __init__(self, name: str, type: str) -> None:
            self.name, self.type = name, type
            self.files: list[str] = []

        def add_file(self, path: str) -> None:
            self.files.append(path)

    module = ModuleType("wandb")
    vars(module).update(
        Image=lambda picture: ("image", picture.size),
        Html=lambda page: ("page", page[:15]),
        Artifact=Artifact,
    )
    monkeypatch.setitem(sys.modules, "wandb", module)


def test_every_logger_gets_the_numbers() -> None:
    logger = FakeLogger()
    log_outcome([logger], full_report(), 12)
    assert logger.metrics == {**full_report().metrics(), "step": 12}
    assert logger.metrics["mnp/strength/patch"] == 4.6
    assert logger.experiment.calls == []
    log_outcome([], full_report(), 12)


def test_undecided_is_not_logged_as_clean() -> None:
    logger = MLFlowLogger()
    log_outcome([logger], DefenseReport("undecided", judged=False), 0)
    numbers = logger.metrics
    assert (numbers["mnp/undecided"], numbers["mnp/judged"]) == (1.0, 0.0)
    assert logger.experiment.named("set_tag") == [("run7", "mnp.verdict", "undecided")]


def test_tensorboard_gets_images_and_text() -> None:
    logger = TensorBoardLogger()
    log_outcome([logger], full_report(), 12)
    [(tag, text, step)] = logger.experiment.named("add_text")
    assert (tag, step) == ("mnp/report", 12)
    assert "BACKDOORED" in text
    images = {args[0]: args[1] for args in logger.experiment.named("add_image")}
    assert sorted(images) == ["mnp/signals", "mnp/trigger-patch"]
    assert all(image.shape[2] == 3 for image in images.values())
    assert all(image.dtype == np.uint8 for image in images.values())


@pytest.mark.usefixtures("wandb")
def test_wandb_gets_images_the_page_and_an_artifact() -> None:
    logger = WandbLogger()
    log_outcome([logger], full_report(), 12)
    log_files([logger], [Path("a.html"), Path("a.json")])
    [(logged,)] = logger.experiment.named("log")
    assert sorted(logged) == ["mnp/report", "mnp/signals", "mnp/trigger-patch"]
    assert logged["mnp/report"] == ("page", "<!DOCTYPE html>")
    assert logger.experiment.summary == {"mnp/verdict": "backdoored"}
    [(artifact,)] = logger.experiment.named("log_artifact")
    assert (artifact.name, artifact.type) == ("mnp-report-run7", "report")
    assert artifact.files == ["a.html", "a.json"]


def test_mlflow_gets_images_a_tag_and_artifacts() -> None:
    logger = MLFlowLogger()
    log_outcome([logger], full_report(), 12)
    log_files([logger, FakeLogger()], [Path("a.html")])
    images = logger.experiment.named("log_image")
    assert [(run, name) for run, _, name in images] == [
        ("run7", "mnp/signals.png"),
        ("run7", "mnp/trigger-patch.png"),
    ]
    assert logger.experiment.named("log_artifact") == [("run7", "a.html", "mnp")]


@pytest.mark.parametrize("kind", [CSVLogger, OtherCSVLogger])
def test_a_csv_logger_gets_files(kind: Any, tmp_path: Path) -> None:
    logger = kind(str(tmp_path))
    log_outcome([logger], full_report(), 12)
    names = {path.name for path in Path(logger.log_dir).iterdir()}
    assert {"mnp-signals.png", "mnp-trigger-patch.png"} <= names


@pytest.mark.parametrize(
    ("loggers", "folder", "name"),
    [
        ([], "runs", "mnp"),
        ([FakeLogger()], "runs", "mnp"),
        ([WandbLogger()], "runs", "mnp-run7"),
        ([FakeLogger(), MLFlowLogger()], "runs", "mnp-run7"),
        ([MLFlowLogger()], "runs/run7/files", "mnp"),
    ],
)
def test_files_are_named_by_the_run(loggers: list[Any], folder: str, name: str) -> None:
    assert run_name(loggers, Path(folder)) == name


def test_a_runs_name_cannot_leave_the_folder() -> None:
    logger = MLFlowLogger()
    logger.version = "../../etc/x y"  # type: ignore[misc]
    assert run_name([logger], Path("runs")) == "mnp-..-..-etc-x-y"


def test_classes_are_known_by_their_names() -> None:
    assert is_a(WandbLogger(), "WandbLogger", "MLFlowLogger")
    assert is_a(WandbLogger(), "FakeLogger")
    assert not is_a(SimpleNamespace(), "WandbLogger")

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger
from pytorch_lightning.loggers import CSVLogger as OtherCSVLogger
from reports import full_report

from lightning_mnp.hosting.loggers import is_a, log_outcome, run_name
from lightning_mnp.report import DefenseReport, PruningReport, RunResult, Signal


class Recorder:
    """An experiment that keeps all calls."""

    id = "run7"

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.summary: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, metrics: Any = None, dataformats: str = "HWC") -> None:
            self.calls.append((name, args if metrics is None else (*args, metrics)))

        return call

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [args for called, args in self.calls if called == name]


class FakeLogger:
    """What loggers have in common."""

    run_id = version = "run7"

    def __init__(self) -> None:
        self.experiment = Recorder()
        self.steps: dict[int, dict[str, float]] = defaultdict(dict)
        self.is_saved = False

    @property
    def metrics(self) -> dict[str, float]:
        """What was logged last, at the step of the outcome."""
        step, last = list(self.steps.items())[-1]
        return {**last, "step": step}

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        assert all(math.isfinite(value) for value in metrics.values())
        self.steps[step].update(metrics)
        self.is_saved = False

    def save(self) -> None:
        self.is_saved = True


class TensorBoardLogger(FakeLogger):
    pass


class WandbLogger(FakeLogger):
    pass


class MLFlowLogger(FakeLogger):
    pass


# Three passes of one run; no filter pruned, and one.
CURVES = {
    ("mnp/curve/accuracy-run-1", 1): 0.9,
    ("mnp/curve/accuracy-run-1", 2): 0.5,
    ("mnp/curve/accuracy-run-1", 3): 0.2,
    ("mnp/curve/left-patch", 0): 1.0,
    ("mnp/curve/left-patch", 1): 0.2,
    ("mnp/curve/harm", 0): 0.0,
    ("mnp/curve/harm", 1): 0.01,
}
MASKS = [1.0, 1.0, 0.5, 0.0, 1.0]


def curves_of(logger: FakeLogger) -> dict[tuple[str, int], float]:
    return {
        (name, step): value
        for step, values in logger.steps.items()
        for name, value in values.items()
        if name.startswith("mnp/curve/")
    }


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package, of which only these are used."""

    class File(io.StringIO):
        """A file whose content is still there when it is closed."""

        def close(self) -> None:
            pass

    class Artifact:
        def __init__(self, name: str, type: str) -> None:
            self.name, self.type = name, type
            self.files: dict[str, File] = {}

        def new_file(self, name: str, mode: str = "x", encoding: str | None = None) -> File:
            assert (mode, encoding) == ("w", "utf-8")
            return self.files.setdefault(name, File())

    module = ModuleType("wandb")
    vars(module).update(
        Image=lambda picture: ("image", picture.size),
        Html=lambda page: ("page", page[:15]),
        Histogram=lambda values: ("histogram", values),
        Artifact=Artifact,
    )
    monkeypatch.setitem(sys.modules, "wandb", module)


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package, of which only this is used."""
    entities = ModuleType("mlflow.entities")
    vars(entities).update(Metric=lambda key, value, timestamp, step: ((key, step), value))
    monkeypatch.setitem(sys.modules, "mlflow", ModuleType("mlflow"))
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)


def test_every_logger_gets_the_numbers() -> None:
    logger = FakeLogger()
    log_outcome([logger], full_report(), 12, {"mnp/ASR_before": 0.5})
    assert logger.metrics == {**full_report().metrics(), "mnp/ASR_before": 0.5, "step": 12}
    assert logger.metrics["mnp/strength/patch"] == 4.6
    assert logger.experiment.calls == []
    assert list(logger.steps) == [12]
    assert logger.is_saved
    log_outcome([], full_report(), 12)


def test_a_logger_that_fails_takes_nothing_from_the_others() -> None:
    class Gone(FakeLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            raise OSError(f"server {id(self)} is gone")

    first, good, second = Gone(), FakeLogger(), Gone()
    with pytest.raises(OSError, match=f"server {id(first)} is gone"):
        log_outcome([first, good, second], full_report(), 12)
    assert good.metrics.keys() >= full_report().metrics().keys()
    assert good.is_saved


@pytest.mark.usefixtures("wandb", "mlflow")
@pytest.mark.parametrize("kind", [FakeLogger, TensorBoardLogger, WandbLogger, MLFlowLogger])
def test_no_logger_gets_numbers_that_are_not_finite(kind: type[FakeLogger]) -> None:
    holes = full_report(
        score=math.inf,
        accuracy_before=math.nan,
        signals=[Signal("patch", math.nan, 1, math.nan, 1.5, ""), Signal("x", 1e9, 1, 1, 1, "")],
        runs=[RunResult(math.nan, 0.1, (2, 5), 12, 0.2, "", (0.9, math.nan))],
        pruning=PruningReport(
            counts=[0, 1],
            curve=[[0.0, 1.0], [math.inf, math.nan]],
            traces=["patch"],
            sums={"conv": [1.0, math.nan, 3.0]},
        ),
    )
    logger = kind()
    log_outcome([logger], holes, 12, {"mnp/ASR_before": math.nan, "mnp/CA_before": 0.5})
    assert {"mnp/CA_before", "mnp/strength/x"} <= logger.metrics.keys()
    absent = {"mnp/ASR_before", "mnp/score", "mnp/strength/patch", "mnp/defense_accuracy_before"}
    assert not absent & logger.metrics.keys()
    for _, values, _ in logger.experiment.named("add_histogram"):
        assert values.tolist() == [1.0, 3.0]


@pytest.mark.usefixtures("wandb", "mlflow")
@pytest.mark.parametrize("kind", [FakeLogger, TensorBoardLogger, WandbLogger, MLFlowLogger])
def test_undecided_is_not_logged_as_clean(kind: type[FakeLogger]) -> None:
    logger = kind()
    log_outcome([logger], DefenseReport("undecided", judged=False), 0)
    numbers, experiment = logger.metrics, logger.experiment
    assert (numbers["mnp/undecided"], numbers["mnp/judged"]) == (1.0, 0.0)
    words = [
        *(text for _, text, _ in experiment.named("add_text")),
        *(verdict for _, _, verdict in experiment.named("set_tag")),
        *experiment.summary.values(),
    ]
    assert len(words) == (kind is not FakeLogger)
    assert all("undecided" in word.lower() for word in words)


def test_tensorboard_gets_images_curves_a_histogram_and_text() -> None:
    logger = TensorBoardLogger()
    log_outcome([logger], full_report(), 12)
    [(tag, text, step)] = logger.experiment.named("add_text")
    assert (tag, step) == ("mnp/report", 12)
    assert "BACKDOORED" in text
    images = {args[0]: args[1] for args in logger.experiment.named("add_image")}
    assert sorted(images) == ["mnp/signals", "mnp/trigger-patch"]
    assert all(image.shape[2] == 3 for image in images.values())
    assert all(image.dtype == np.uint8 for image in images.values())
    [(tag, values, step)] = logger.experiment.named("add_histogram")
    assert (tag, values.tolist(), step) == ("mnp/masks", MASKS, 12)
    assert curves_of(logger) == CURVES


@pytest.mark.usefixtures("wandb")
def test_wandb_gets_images_curves_a_histogram_the_page_and_an_artifact() -> None:
    logger = WandbLogger()
    log_outcome([logger], full_report(), 12)
    [(logged,)] = logger.experiment.named("log")
    assert sorted(logged) == ["mnp/masks", "mnp/report", "mnp/signals", "mnp/trigger-patch"]
    assert logged["mnp/report"] == ("page", "<!DOCTYPE html>")
    assert logged["mnp/masks"] == ("histogram", MASKS)
    assert curves_of(logger) == CURVES
    assert list(logger.steps) == [0, 1, 2, 3, 12]  # W&B keeps the order, and shows the last one
    assert logger.experiment.summary == {"mnp/verdict": "backdoored"}
    [(artifact,)] = logger.experiment.named("log_artifact")
    assert (artifact.name, artifact.type) == ("mnp-report-run7", "report")
    assert list(artifact.files) == ["report.html", "report.json"]
    assert json.loads(artifact.files["report.json"].getvalue())["verdict"] == "backdoored"


@pytest.mark.usefixtures("mlflow")
def test_mlflow_gets_images_curves_a_tag_and_artifacts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_mnp.hosting.loggers._MOST_AT_ONCE", 5)
    logger = MLFlowLogger()
    log_outcome([logger], full_report(), 12)
    experiment = logger.experiment
    assert experiment.named("set_tag") == [("run7", "mnp.verdict", "backdoored")]
    assert [(run, name) for run, _, name in experiment.named("log_image")] == [
        ("run7", "mnp/signals.png"),
        ("run7", "mnp/masks.png"),
        ("run7", "mnp/trigger-patch.png"),
    ]
    parts = [metrics for called, metrics in experiment.calls if called == "log_batch"]
    assert [len(metrics[1]) for metrics in parts] == [5, 2]
    assert dict(point for metrics in parts for point in metrics[1]) == CURVES
    texts = {name: text for _, text, name in experiment.named("log_text")}
    assert texts["mnp/report.html"].startswith("<!DOCTYPE html>")
    assert json.loads(texts["mnp/report.json"])["verdict"] == "backdoored"


@pytest.mark.parametrize("kind", [CSVLogger, OtherCSVLogger])
def test_a_csv_logger_gets_files(kind: Any, tmp_path: Path) -> None:
    logger = kind(str(tmp_path))
    log_outcome([logger], full_report(), 12)
    folder = Path(logger.log_dir)
    names = {path.name for path in folder.iterdir()}
    assert {"mnp-signals.png", "mnp-masks.png", "mnp-trigger-patch.png"} <= names
    head, *rows = csv.reader((folder / "mnp-curves.csv").read_text("utf-8").splitlines())
    assert head == ["curve", "number", "value"]
    assert {(name, int(number)): float(value) for name, number, value in rows} == CURVES
    assert "mnp/backdoored" in (folder / "metrics.csv").read_text()


def test_a_csv_logger_of_another_place_gets_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    logger = type("CSVLogger", (FakeLogger,), {"log_dir": "s3://bucket/run7"})()
    log_outcome([logger], full_report(), 12)
    assert logger.metrics["mnp/backdoored"] == 1.0
    assert list(tmp_path.iterdir()) == []


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

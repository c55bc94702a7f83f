from __future__ import annotations

import io
import json
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import rich
import torch
from distributed_script import small_network
from helpers import (
    UserModule,
    images_and_labels,
    loader,
    quick_config,
    quiet_trainer,
    same,
    snapshot,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import TensorDataset

from lightning_mnp import (
    DefenseReport,
    MNPCallback,
    MNPDefense,
    MNPModule,
    load_into,
    read_state_dict,
)
from lightning_mnp.checkpoints.atomic_write import OutputError
from lightning_mnp.signals.verdict import Judgement

pytestmark = [
    pytest.mark.usefixtures("short_searches"),
    # What a network of thirty steps is called is of no account here; tests of verdicts set it.
    pytest.mark.filterwarnings("ignore:MNPCallback. verdict"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

CONFIG = quick_config(verdict="ratio")


class WithHook(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()

    def defense_dataloader(self) -> Any:
        return loader(10)


def fit(
    callback: MNPCallback, others: Sequence[L.Callback] = (), **options: Any
) -> tuple[UserModule, L.Trainer]:
    module = UserModule(small_network().train())
    trainer = quiet_trainer(callbacks=[callback, *others], **options)
    trainer.fit(module, loader())
    return module, trainer


@pytest.fixture(params=["backdoored"])
def verdict(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let every audit come to this verdict, with class 3 for the target."""
    found = Judgement(request.param, 0.1, 2.0, 3, ("a test says so",))
    monkeypatch.setattr("lightning_mnp.engine.case.judge", lambda *args, **kwargs: found)
    return found.verdict


def texts(told: pytest.WarningsRecorder) -> list[str]:
    """What users are told, without what Lightning and PyTorch say to each other."""
    return [str(each.message) for each in told if each.category is UserWarning]


def weights(path: Path | str) -> dict[str, Any]:
    return torch.load(path, weights_only=True)["state_dict"]  # type: ignore[no-any-return]


def equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def is_pruned(state: dict[str, Any], report: DefenseReport) -> bool:
    return not any(state[f"{name}.weight"][index].any() for name, index in report.pruned)


def test_by_default_a_flagged_network_stays_as_it_was_trained(
    tmp_path: Path, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever Lightning's logger hides, and if the rank-zero helpers say nothing."""
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)
    monkeypatch.setattr("lightning_mnp.callback.rank_zero_info", lambda text: None)
    plain = UserModule(small_network().train())
    quiet_trainer().fit(plain, loader())
    callback = MNPCallback(defense_loader=loader(), config=CONFIG, output_dir=tmp_path)
    saver = ModelCheckpoint(tmp_path / "saved", save_last=True, every_n_epochs=100)
    with pytest.warns(UserWarning, match="MNPCallback: verdict") as told:
        module, trainer = fit(callback, [saver], enable_checkpointing=True)
    assert equal(module.state_dict(), plain.state_dict())
    assert equal(weights(saver.last_model_path), plain.state_dict())
    trainer.save_checkpoint(tmp_path / "later.ckpt")
    assert equal(weights(tmp_path / "later.ckpt"), plain.state_dict())
    stored = torch.load(saver.last_model_path, weights_only=True)["callbacks"]["MNPCallback"]
    assert stored["purified"] is False

    report, path = callback.report, callback.purified_path
    assert report is not None
    assert path == tmp_path / "mnp.ckpt"
    assert len(report.pruned) == 5
    assert not is_pruned(module.state_dict(), report)
    assert is_pruned(weights(path), report)
    assert torch.load(path, weights_only=True)["callbacks"]["MNPCallback"]["purified"] is True
    fresh = UserModule(small_network())
    load_into(fresh, read_state_dict(path))
    assert equal(fresh.state_dict(), weights(path))

    [text] = texts(told)
    for part in (
        "verdict BACKDOORED, target class 3\n",
        "- NOT changed: the network in memory and the checkpoints of this training.\n",
        f"- Purified network (filters pruned: 5, turned down: 0): {path}\n",
        f"- Report: {tmp_path / 'mnp-report.html'}\n",
        f"load_into(module, lightning_mnp.read_state_dict({str(path)!r}))",
        "MNPCallback(in_place=True)",
    ):
        assert part in text


def test_in_place_prunes_the_network_and_says_so(tmp_path: Path, verdict: str) -> None:
    callback = MNPCallback(
        defense_loader=loader(), config=CONFIG, output_dir=tmp_path, in_place=True
    )
    before = ModelCheckpoint(tmp_path / "before")
    at_the_end = ModelCheckpoint(tmp_path / "end", save_last=True, every_n_epochs=100)
    with pytest.warns(UserWarning, match="verdict BACKDOORED, target class 3") as told:
        module, _ = fit(callback, [before, at_the_end], enable_checkpointing=True)
    assert callback.report is not None
    assert is_pruned(module.state_dict(), callback.report)
    assert equal(weights(tmp_path / "mnp.ckpt"), module.state_dict())
    assert equal(weights(at_the_end.last_model_path), module.state_dict())
    assert not is_pruned(weights(before.best_model_path), callback.report)
    [text] = texts(told)
    assert "- CHANGED: the network in memory (filters pruned: 5, turned down: 0).\n" in text
    assert f"saved before that: {before.best_model_path}.\n" in text
    assert (
        f"- Purified network (filters pruned: 5, turned down: 0): {tmp_path / 'mnp.ckpt'}" in text
    )


def test_never_audits_only_also_in_place(tmp_path: Path, verdict: str) -> None:
    callback = MNPCallback("never", loader(), CONFIG, output_dir=tmp_path, in_place=True)
    with pytest.warns(UserWarning, match=r"verdict BACKDOORED[^$]*call `lightning_mnp.defend`"):
        module, _ = fit(callback)
    plain = UserModule(small_network().train())
    quiet_trainer().fit(plain, loader())
    assert equal(module.state_dict(), plain.state_dict())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "mnp-report.html",
        "mnp-report.json",
    ]
    assert callback.purified_path is None


@pytest.mark.filterwarnings("error:MNPCallback")
@pytest.mark.parametrize("verdict", ["clean"], indirect=True)
def test_always_writes_a_purified_network_of_a_clean_one(
    tmp_path: Path, verdict: str, caplog: pytest.LogCaptureFixture
) -> None:
    callback = MNPCallback("always", loader(), CONFIG, output_dir=tmp_path)
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        module, _ = fit(callback)
    assert callback.report is not None
    assert is_pruned(weights(tmp_path / "mnp.ckpt"), callback.report)
    assert not is_pruned(module.state_dict(), callback.report)
    assert "- NOT changed: the network in memory" in caplog.text


@pytest.mark.parametrize("verdict", ["clean", "backdoored", "undecided"], indirect=True)
def test_loggers_tell_the_verdicts_apart(tmp_path: Path, verdict: str) -> None:
    logger = CSVLogger(str(tmp_path / "logs"))
    fit(MNPCallback("never", loader(), CONFIG, output_dir=tmp_path), logger=logger)
    header, row = Path(logger.log_dir, "metrics.csv").read_text().splitlines()[:2]
    logged = dict(zip(header.split(","), row.split(","), strict=True))
    assert float(logged["mnp/backdoored"]) == (verdict == "backdoored")
    assert float(logged["mnp/undecided"]) == (verdict == "undecided")


def test_ca_and_asr_are_measured_before_and_after(tmp_path: Path, verdict: str) -> None:
    images, labels = next(iter(loader()))
    triggered = [(images, 0 * labels, labels)]
    logger = CSVLogger(str(tmp_path / "logs"))
    callback = MNPCallback("always", loader(), CONFIG, triggered_loader=triggered)
    module, _ = fit(callback, logger=logger)
    assert set(callback.rates) == {"mnp/ASR_before", "mnp/ASR_after"}
    module.eval()
    others = labels != 0
    hits = (module.net(images[others]).argmax(1) == 0).float().mean()
    assert callback.rates["mnp/ASR_before"] == pytest.approx(float(hits))
    assert "mnp/ASR_after" in Path(logger.log_dir, "metrics.csv").read_text()


def test_triggered_images_are_looked_at_before_training(tmp_path: Path) -> None:
    callback = MNPCallback(
        "never", loader(), CONFIG, output_dir=tmp_path, triggered_loader=loader()
    )
    with pytest.raises(ValueError, match="true labels"):
        fit(callback)


@pytest.mark.parametrize("verdict", ["undecided"], indirect=True)
def test_undecided_is_told_with_its_reason(tmp_path: Path, verdict: str) -> None:
    callback = MNPCallback(defense_loader=loader(), config=CONFIG, output_dir=tmp_path)
    with pytest.warns(UserWarning, match="verdict UNDECIDED, .*: a test says so$") as told:
        fit(callback)
    [text] = texts(told)
    assert str(tmp_path / "mnp-report.html") in text


@pytest.mark.parametrize("error", [OutputError("the disk is full"), KeyboardInterrupt()])
def test_what_goes_wrong_in_writing_leaves_the_network_as_it_was(
    tmp_path: Path, verdict: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr("lightning_mnp.callback.write_outcome", fail)
    callback = MNPCallback(defense_loader=loader(), config=CONFIG, output_dir=tmp_path)
    module, plain = (UserModule(small_network().train()) for _ in range(2))
    # Lightning ends the program after a KeyboardInterrupt.
    with (
        pytest.warns(UserWarning, match="- Writing the outcome failed, as"),
        pytest.raises((OutputError, SystemExit, KeyboardInterrupt)),
    ):
        quiet_trainer(callbacks=[callback]).fit(module, loader())
    quiet_trainer().fit(plain, loader())
    assert equal(module.state_dict(), plain.state_dict())


class FailingLogger(CSVLogger):
    """A logger whose server is gone when the outcome comes."""

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        if any(name.startswith("mnp/") for name in metrics):
            raise OSError("the server is gone")
        super().log_metrics(metrics, step)


def test_a_logger_that_fails_costs_no_file(tmp_path: Path, verdict: str) -> None:
    out = tmp_path / "out"
    callback = MNPCallback(defense_loader=loader(), config=CONFIG, output_dir=out)
    module = UserModule(small_network().train())
    trainer = quiet_trainer(callbacks=[callback], logger=FailingLogger(str(tmp_path)))
    with (
        pytest.warns(UserWarning, match="- Purified network .*mnp.ckpt\n") as told,
        pytest.raises(OSError, match="the server is gone"),
    ):
        trainer.fit(module, loader())
    assert "Writing the outcome failed" not in "".join(texts(told))
    assert callback.report is not None
    assert callback.purified_path == out / "mnp.ckpt"
    assert is_pruned(weights(out / "mnp.ckpt"), callback.report)
    assert not is_pruned(module.state_dict(), callback.report)
    assert json.loads((out / "mnp-report.json").read_text())["verdict"] == verdict


def test_the_bar_moves_under_lightnings_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    seen = io.StringIO()
    terminal = {"file": seen, "force_terminal": True, "color_system": None, "width": 120}
    try:
        bar = RichProgressBar(console_kwargs=terminal)
        callback = MNPCallback("never", loader(), CONFIG, output_dir=tmp_path)
        fit(callback, [bar], enable_progress_bar=True)
        if not hasattr(rich.get_console(), "_live_stack"):
            pytest.skip("rich shows one live display at a time before 14.1")
    finally:
        rich.reconfigure()
    shown = re.findall(r"(\w+), run \d .*? (\d+)/\d+", seen.getvalue())
    assert {"suppression", "saliency", "verdict"} <= {phase for phase, _ in shown}
    assert len({done for _, done in shown}) > 2


def test_the_bar_moves_after_lightnings_tqdm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    seen = io.StringIO()
    rich.reconfigure(file=seen, force_terminal=True, color_system=None, width=120)
    monkeypatch.setattr(sys, "stdout", seen)
    try:
        callback = MNPCallback("never", loader(), CONFIG, output_dir=tmp_path)
        fit(callback, [TQDMProgressBar()], enable_progress_bar=True)
    finally:
        rich.reconfigure()
    training, audit = seen.getvalue().split("reference, run 1", 1)
    assert "3/3" in training
    assert "Epoch" not in audit  # the training's bar is left alone
    shown = re.findall(r"([a-z]+), run \d .*? (\d+)/\d+", audit)
    assert {"suppression", "saliency", "verdict"} <= {phase for phase, _ in shown}
    assert len({done for _, done in shown}) > 2


def test_audit_only_changes_nothing_of_the_training(tmp_path: Path) -> None:
    module, _ = fit(MNPCallback("never", loader(), CONFIG, output_dir=tmp_path))
    plain = UserModule(small_network().train())
    quiet_trainer().fit(plain, loader())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, module.state_dict()[name])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "mnp-report.html",
        "mnp-report.json",
    ]


def test_always_prunes_in_place_logs_and_writes(tmp_path: Path) -> None:
    logger = CSVLogger(str(tmp_path / "logs"))
    callback = MNPCallback("always", loader(), CONFIG, output_dir=tmp_path, in_place=True)
    module, trainer = fit(callback, logger=logger)
    report = callback.report
    assert report is not None
    assert len(report.pruned) == 5
    for name, index in report.pruned:
        assert not module.get_submodule(name).weight[index].any()
    logger.save()
    logged = Path(logger.log_dir, "metrics.csv").read_text()
    assert "mnp/detection_ratio" in logged
    assert "mnp/pruned_filters" in logged
    written = json.loads((tmp_path / "mnp-report.json").read_text())
    assert written["pruned"] == [list(entry) for entry in report.pruned]
    stored = torch.load(tmp_path / "mnp.ckpt", weights_only=True)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, stored["state_dict"][name])
    assert stored["callbacks"]
    assert trainer.state.finished
    assert "<!DOCTYPE html>" in (tmp_path / "mnp-report.html").read_text("utf-8")


def test_a_second_run_overwrites_nothing(tmp_path: Path) -> None:
    for _ in range(2):
        fit(MNPCallback("always", loader(), CONFIG, output_dir=tmp_path))
    names = sorted(path.name for path in tmp_path.iterdir())
    endings = ("-report.html", "-report.json", ".ckpt")
    assert names == sorted(f"{name}{end}" for name in ("mnp", "mnp-v1") for end in endings)


def test_defense_set_from_the_datamodule_hook(tmp_path: Path) -> None:
    callback = MNPCallback("never", config=CONFIG, output_dir=tmp_path)
    quiet_trainer(callbacks=[callback]).fit(
        UserModule(small_network().train()), datamodule=WithHook()
    )
    assert callback.report is not None
    assert callback.report.defense_set is not None
    assert callback.report.defense_set.images == 40


def test_defense_set_from_a_data_set(tmp_path: Path) -> None:
    data = TensorDataset(*images_and_labels(24))
    callback = MNPCallback("never", data, CONFIG, output_dir=tmp_path)
    fit(callback)
    assert callback.report is not None
    assert callback.report.defense_set is not None
    assert callback.report.defense_set.images == 24


def test_training_set_is_never_taken_for_the_defense_set() -> None:
    with pytest.raises(MisconfigurationException, match="The training set is not used"):
        fit(MNPCallback("never", config=CONFIG))


def test_bad_defense_set_shows_before_training() -> None:
    module = UserModule(small_network().train())
    before = snapshot(module)
    images, labels = images_and_labels(8)
    callback = MNPCallback("always", [(images, torch.zeros_like(labels))], CONFIG)
    with pytest.raises(ValueError, match="at least two classes"):
        quiet_trainer(callbacks=[callback]).fit(module, loader())
    assert same(before, snapshot(module))


@pytest.mark.parametrize("in_place", [False, True])
def test_fast_dev_run_is_short_and_writes_nothing(
    tmp_path: Path, verdict: str, in_place: bool
) -> None:
    callback = MNPCallback(
        "always",
        loader(),
        quick_config(runs=5, verdict="ratio"),
        output_dir=tmp_path,
        in_place=in_place,
    )
    with pytest.warns(UserWarning, match="Nothing was written: `fast_dev_run` only tries"):
        module, _ = fit(callback, fast_dev_run=True)
    assert callback.report is not None
    assert len(callback.report.runs) == 1
    assert list(tmp_path.iterdir()) == []
    assert is_pruned(module.state_dict(), callback.report) is in_place


def test_fast_dev_run_after_a_training_writes_nothing_either(tmp_path: Path) -> None:
    callback = MNPCallback("always", loader(), CONFIG, output_dir=tmp_path)
    fit(callback)
    written = sorted(tmp_path.iterdir())
    assert len(written) == 3
    with pytest.warns(UserWarning, match="Nothing was written: `fast_dev_run` only tries"):
        fit(callback, fast_dev_run=True)
    assert sorted(tmp_path.iterdir()) == written


def test_report_is_kept_in_checkpoints_as_primitives(tmp_path: Path) -> None:
    callback = MNPCallback("never", loader(), CONFIG, output_dir=tmp_path)
    assert callback.state_dict() == {}
    _, trainer = fit(callback)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert stored["callbacks"]["MNPCallback"]["report"]["verdict"]


def test_unknown_occasion() -> None:
    with pytest.raises(ValueError, match="Expected argument `when` to be one of"):
        MNPCallback("sometimes")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"])
@pytest.mark.parametrize("door", ["callback", "module"])
def test_sharded_strategies_are_refused(
    name: str, door: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lightning.pytorch.strategies as strategies

    sharded = getattr(strategies, name)
    trainer = quiet_trainer()
    monkeypatch.setattr(trainer.strategy, "__class__", sharded)
    module: L.LightningModule = UserModule(small_network())
    setup: Any = MNPCallback(defense_loader=loader()).setup
    arguments: tuple[Any, ...] = trainer, module, "fit"
    if door == "module":
        module = MNPModule(small_network())
        module.trainer = trainer
        setup, arguments = module.setup, ("fit",)
    with pytest.raises(MisconfigurationException, match=f"but got {name}. Train with it, save"):
        setup(*arguments)


def test_a_failed_audit_loses_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("the audit failed")

    monkeypatch.setattr("lightning_mnp.callback.run_defense", fail)
    saver = ModelCheckpoint(tmp_path, save_last=True, every_n_epochs=100)
    callback = MNPCallback("always", loader(), CONFIG)
    module = UserModule(small_network().train())
    trainer = quiet_trainer(callbacks=[callback, saver], enable_checkpointing=True)
    with pytest.raises(RuntimeError, match="the audit failed"):
        trainer.fit(module, loader())
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert callback.report is None


class WithAverage(UserModule):
    """Keeps an average of its weights by hand, and saves that."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        weights = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value + 1 for name, value in weights.items()}


class WithWrapper(UserModule):
    """Saves an average under other names."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        weights = checkpoint["state_dict"]
        checkpoint["state_dict"] = {f"module.{name}": value for name, value in weights.items()}


class WithHeadOnly(UserModule):
    """Saves the last layer, since its user has the rest from elsewhere."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        weights = checkpoint["state_dict"]
        *_, head = (name for name, value in weights.items() if value.dim() == 2)
        checkpoint["state_dict"] = {head: weights[head]}


@pytest.mark.parametrize("kind", [WithAverage, WithWrapper, WithHeadOnly])
def test_the_purified_checkpoint_has_the_weights_that_were_audited(
    kind: type[UserModule], tmp_path: Path
) -> None:
    callback = MNPCallback("always", loader(), CONFIG, output_dir=tmp_path, in_place=True)
    module = kind(small_network().train())
    with pytest.warns(UserWarning, match="Purified network"):
        quiet_trainer(callbacks=[callback]).fit(module, loader())
    assert callback.report is not None
    found, own = weights(tmp_path / "mnp.ckpt"), module.state_dict()
    assert is_pruned(found, callback.report)
    assert found.keys() <= own.keys()
    assert all(value.equal(own[name]) for name, value in found.items())
    assert (found.keys() == own.keys()) == (kind is not WithHeadOnly)
    assert {f"{layer}.weight" for layer, _ in callback.report.pruned} <= found.keys()


@pytest.mark.parametrize(
    ("given", "place"), [("~/out", Path("home", "out")), ("~no-user", Path("~no-user"))]
)
def test_folders_of_the_user_are_found(
    given: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning itself writes to the home folder for `~`, and to a folder `~name` of no user."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    callback = MNPCallback("always", loader(), CONFIG, output_dir=given)
    with pytest.warns(UserWarning, match="Purified network"):
        quiet_trainer(callbacks=[callback]).fit(UserModule(small_network().train()), loader())
    found = sorted(path.name for path in (tmp_path / place).iterdir())
    assert found == ["mnp-report.html", "mnp-report.json", "mnp.ckpt"]
    assert not (tmp_path / "~").exists()


def test_a_signal_to_end_ends_the_audit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster kills what has not ended soon after SIGTERM."""

    def step(self: MNPDefense, *updates: Any) -> dict[str, float]:
        steps.append(self.phase)
        trainer._signal_connector.received_sigterm = len(steps) == 3
        return take_step(self, *updates)

    steps: list[str] = []
    take_step = MNPDefense.step
    monkeypatch.setattr(MNPDefense, "step", step)
    callback = MNPCallback("always", loader(), CONFIG, output_dir=tmp_path)
    trainer = quiet_trainer(callbacks=[callback])
    with pytest.raises(SIGTERMException):
        trainer.fit(UserModule(small_network().train()), loader())
    assert len(steps) == 3
    assert callback.report is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("in_place", "done"), [(True, "pruned"), (False, "audited")])
def test_weights_put_in_place_afterwards_are_told(
    tmp_path: Path, in_place: bool, done: str
) -> None:
    class Averaging(UserModule):
        def on_train_end(self) -> None:
            self.net.load_state_dict(small_network().state_dict())

    config = quick_config(rule="count", amount=3, reaudit=False)
    callback = MNPCallback("always", loader(), config, output_dir=tmp_path, in_place=in_place)
    match = f"has {done} the network, but its weights were changed after that: .*`on_train_end`"
    with pytest.warns(UserWarning, match=match):
        quiet_trainer(callbacks=[callback]).fit(Averaging(small_network().train()), loader())


def test_an_error_in_one_of_several_processes_waits_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("the audit failed")

    callback = MNPCallback("always", loader())
    monkeypatch.setattr(callback, "_audit", fail)
    module = UserModule(small_network())
    callback.on_train_end(SimpleNamespace(world_size=1), module)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="the audit failed"):
        callback.on_fit_end(SimpleNamespace(world_size=1), module)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="the audit failed"):
        callback.on_train_end(SimpleNamespace(world_size=2), module)  # type: ignore[arg-type]

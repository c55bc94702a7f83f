from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import rich
import torch
from helpers import (
    TinyDataModule,
    images_and_labels,
    loader,
    quick_config,
    quiet_trainer,
    trained_network,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mnp import MNPModule
from lightning_mnp.attacks import BadNets

pytestmark = pytest.mark.usefixtures("short_searches")

# The engine draws its own batches, so it does not matter where the Trainer's loader stands.
mid_epoch = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")


SHORT = quick_config(verdict="ratio", runs=1, amount=1, suppression_epochs=1, mask_epochs=1)


def fitted(**options: Any) -> MNPModule:
    module = MNPModule(trained_network(), quick_config())
    quiet_trainer(max_epochs=-1, **options).fit(module, loader())
    return module


def test_network_is_pruned_and_trainer_stops() -> None:
    module = fitted()
    assert module.report is not None
    assert module.report.model is module.network
    for name, index in module.report.pruned:
        assert not module.network.get_submodule(name).weight[index].any()
    images, _ = images_and_labels(4)
    assert torch.equal(module(images), module.network(images))


def test_progress_and_outcome_are_logged(tmp_path: Path) -> None:
    logger = CSVLogger(str(tmp_path))
    fitted(logger=logger, log_every_n_steps=1)
    logger.save()
    header = Path(logger.log_dir, "metrics.csv").read_text().splitlines()[0]
    for name in ("mnp/suppression_loss", "mnp/masks_penalty_loss", "mnp/detection_ratio"):
        assert name in header


def test_ca_and_asr_are_measured_before_and_after(tmp_path: Path) -> None:
    images, labels = images_and_labels()
    triggered = [(images, 0 * labels, labels)]
    logger = CSVLogger(str(tmp_path))
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)).eval()
    config = quick_config(verdict="ratio", runs=1, amount=1)
    module = MNPModule(network, config, triggered_loader=triggered)
    others = labels != 0
    asr = float((network(images[others]).argmax(1) == 0).float().mean())
    trainer = quiet_trainer(max_epochs=-1, logger=logger)
    trainer.fit(module, loader())
    assert list(module.rates) == ["mnp/ASR_before", "mnp/ASR_after"]
    after = float((network(images[others]).argmax(1) == 0).float().mean())
    assert list(module.rates.values()) == pytest.approx([asr, after])
    assert {"mnp/ASR_before", "mnp/ASR_after"} <= trainer.callback_metrics.keys()
    assert "mnp/ASR_after" in Path(logger.log_dir, "metrics.csv").read_text()
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["lightning_mnp"]["rates"] == module.rates


class FailingLogger(CSVLogger):
    """A logger whose server is gone when the outcome comes."""

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        if "mnp/backdoored" in metrics:
            raise OSError("the server is gone")
        super().log_metrics(metrics, step)


def test_a_logger_that_fails_costs_no_file(tmp_path: Path) -> None:
    out = tmp_path / "out"
    module = MNPModule(trained_network(), SHORT, output_dir=out)
    trainer = quiet_trainer(max_epochs=-1, logger=FailingLogger(str(tmp_path)))
    with pytest.raises(OSError, match="the server is gone"):
        trainer.fit(module, loader())
    assert module.report is not None
    written = json.loads((out / "mnp-report.json").read_text())
    assert written["pruned"] == [list(each) for each in module.report.pruned]
    stored = torch.load(out / "mnp.ckpt", weights_only=True)["state_dict"]
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, stored[name])


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no")
def test_a_datamodule_under_attack_gives_the_test_images() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)).eval()
    module = MNPModule(network, quick_config(verdict="ratio", runs=1, amount=1), when="never")
    data = TinyDataModule(BadNets(patch_size=2), channels=1)
    quiet_trainer(max_epochs=-1).fit(module, datamodule=data)
    assert list(module.rates) == ["mnp/CA_before", "mnp/ASR_before"]


def test_triggered_images_are_looked_at_before_any_work() -> None:
    module = MNPModule(trained_network(), quick_config(), triggered_loader=loader())
    with pytest.raises(ValueError, match="true labels"):
        quiet_trainer(max_epochs=-1).fit(module, loader())
    assert module.defense is None


def test_a_look_at_triggered_images_draws_no_random_numbers() -> None:
    images, labels = images_and_labels()
    triggered = DataLoader(TensorDataset(images, 0 * labels, labels), shuffle=True)
    module = MNPModule(trained_network(), SHORT, triggered_loader=triggered)
    module.trainer = quiet_trainer()
    before = torch.get_rng_state()
    module.setup("fit")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", [RichProgressBar, TQDMProgressBar])
def test_the_bar_moves(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    seen = io.StringIO()
    if kind is RichProgressBar:
        terminal = {"file": seen, "force_terminal": True, "color_system": None, "width": 160}
        bar = RichProgressBar(console_kwargs=terminal)
    else:
        monkeypatch.setattr(sys, "stdout", seen)
        bar = TQDMProgressBar()
    module = MNPModule(trained_network(), quick_config(verdict="ratio", runs=1), when="never")
    try:
        quiet_trainer(max_epochs=-1, callbacks=[bar], enable_progress_bar=True).fit(
            module, loader()
        )
    finally:
        rich.reconfigure()
    shown = re.findall(r"Epoch (\d+).*? (\d)/3", seen.getvalue())
    assert len(set(shown)) > 3
    assert "mnp/suppression_loss" in seen.getvalue()


@mid_epoch
@pytest.mark.parametrize(
    "stop", [9, *(pytest.param(stop, marks=pytest.mark.slow) for stop in (3, 14, 22))]
)
def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, stop: int) -> None:
    class StopAt(L.Callback):
        seen = 0

        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            self.seen += 1
            if self.seen == stop:
                trainer.save_checkpoint(tmp_path / "stopped.ckpt")
                raise KeyboardInterrupt

    reference = fitted()
    first = MNPModule(trained_network(), quick_config())
    with pytest.raises(SystemExit):
        quiet_trainer(max_epochs=-1, callbacks=[StopAt()]).fit(first, loader())
    second = MNPModule(trained_network(steps=1), quick_config())
    quiet_trainer(max_epochs=-1).fit(
        second, loader(), ckpt_path=tmp_path / "stopped.ckpt", weights_only=True
    )
    assert reference.report is not None
    assert second.report is not None
    assert second.report.pruned == reference.report.pruned
    assert second.report.pruning.scores == reference.report.pruning.scores
    for name, tensor in reference.network.state_dict().items():
        assert torch.equal(tensor, second.network.state_dict()[name])


@mid_epoch
def test_finished_run_resumes_to_its_end(tmp_path: Path) -> None:
    module = MNPModule(trained_network(), quick_config())
    trainer = quiet_trainer(max_epochs=-1)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    again = MNPModule(trained_network(), quick_config())
    quiet_trainer(max_epochs=-1).fit(
        again, loader(), ckpt_path=tmp_path / "end.ckpt", weights_only=True
    )
    for name, tensor in module.network.state_dict().items():
        assert torch.equal(tensor, again.network.state_dict()[name])
    assert module.report is not None
    assert again.report is not None
    assert again.report.to_dict() == module.report.to_dict()
    assert again.report.model is again.network


@mid_epoch
@pytest.mark.filterwarnings("ignore:The Trainer ended while the defense was in phase")
def test_a_second_fit_that_stops_early_has_no_outcome(tmp_path: Path) -> None:
    images, labels = images_and_labels()
    module = MNPModule(
        trained_network(),
        SHORT,
        output_dir=tmp_path / "out",
        triggered_loader=[(images, 0 * labels, labels)],
    )
    quiet_trainer(max_epochs=-1).fit(module, loader())
    assert module.report is not None
    assert module.rates
    written = sorted((tmp_path / "out").iterdir())

    logger = CSVLogger(str(tmp_path / "logs"))
    trainer = quiet_trainer(max_epochs=-1, max_steps=2, logger=logger)
    trainer.fit(module, loader())
    assert module.report is None
    assert module.rates == {}
    assert sorted((tmp_path / "out").iterdir()) == written
    metrics = Path(logger.log_dir, "metrics.csv")
    assert not metrics.exists() or "mnp/backdoored" not in metrics.read_text()

    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    stored = torch.load(tmp_path / "stopped.ckpt", weights_only=True)["lightning_mnp"]
    assert module.defense is not None
    assert stored.keys() == module.defense.state_dict().keys()
    quiet_trainer(max_epochs=-1).fit(
        module, loader(), ckpt_path=tmp_path / "stopped.ckpt", weights_only=True
    )
    assert module.report is not None


@mid_epoch
def test_a_fit_after_a_resumed_end_audits_again(tmp_path: Path) -> None:
    module = MNPModule(trained_network(), SHORT)
    trainer = quiet_trainer(max_epochs=-1)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    again = MNPModule(trained_network(), SHORT)
    quiet_trainer(max_epochs=-1).fit(
        again, loader(), ckpt_path=tmp_path / "end.ckpt", weights_only=True
    )
    assert again.report is not None
    assert again.report.config["seed"] == 0
    again.config = again.config.changed({"seed": 7})
    quiet_trainer(max_epochs=-1).fit(again, loader())
    assert again.report is not None
    assert again.report.config["seed"] == 7


@mid_epoch
def test_a_fit_after_predictions_by_a_finished_run_audits_anew(tmp_path: Path) -> None:
    trainer = quiet_trainer(max_epochs=-1)
    trainer.fit(MNPModule(trained_network(), SHORT), loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    again = MNPModule(trained_network(), SHORT.changed({"seed": 7}))
    images = torch.utils.data.DataLoader(images_and_labels()[0], batch_size=8)
    quiet_trainer().predict(again, images, ckpt_path=tmp_path / "end.ckpt", weights_only=True)
    quiet_trainer(max_epochs=-1).fit(again, loader())
    assert again.report is not None
    assert again.report.config["seed"] == 7


def test_fast_dev_run_after_a_fit_writes_nothing(tmp_path: Path) -> None:
    module = MNPModule(trained_network(), SHORT, output_dir=tmp_path)
    quiet_trainer(max_epochs=-1).fit(module, loader())
    written = sorted(tmp_path.iterdir())
    assert len(written) == 3
    quiet_trainer(fast_dev_run=40).fit(module, loader(1))
    assert module.report is not None  # so many batches are enough for an outcome
    assert sorted(tmp_path.iterdir()) == written


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
def test_model_checkpoint_works(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1)
    fitted(callbacks=[saver], enable_checkpointing=True)
    assert len(list(tmp_path.glob("*.ckpt"))) >= 2


def test_trainer_that_ends_too_early_warns() -> None:
    module = MNPModule(trained_network(), quick_config())
    with pytest.warns(UserWarning, match="The Trainer ended while the defense was in phase"):
        quiet_trainer(max_epochs=1).fit(module, loader(20))
    assert module.report is None


def test_trainer_that_makes_no_step_warns(tmp_path: Path) -> None:
    module = MNPModule(trained_network(), quick_config(), output_dir=tmp_path)
    with pytest.warns(UserWarning, match="ended while the defense was in phase 'reference'"):
        quiet_trainer(max_epochs=0).fit(module, loader())
    assert module.report is None
    assert list(tmp_path.iterdir()) == []


def test_bf16_autocast_runs() -> None:
    assert fitted(precision="bf16-mixed").report is not None


def test_unknown_occasion() -> None:
    with pytest.raises(ValueError, match="Expected argument `when` to be one of"):
        MNPModule(trained_network(), when="sometimes")  # type: ignore[arg-type]


def test_datamodule_without_hook_is_refused() -> None:
    class Plain(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            return loader()

    module = MNPModule(trained_network(), quick_config())
    with pytest.raises(MisconfigurationException, match="The training set is not used"):
        quiet_trainer(max_epochs=-1).fit(module, datamodule=Plain())


@pytest.mark.parametrize("when", ["never", "always"])
def test_network_keeps_its_modes(when: Any) -> None:
    network = trained_network()
    network.get_submodule("conv1").train()
    before = [module.training for module in network.modules()]
    module = MNPModule(network, quick_config(verdict="ratio"), when=when)
    assert [part.training for part in network.modules()] == before
    quiet_trainer(max_epochs=-1).fit(module, loader())
    assert module.report is not None
    assert [part.training for part in network.modules()] == before


def test_config_of_another_kind_is_refused() -> None:
    with pytest.raises(TypeError, match=r"`config` to be an MNPConfig, but got dict\. Write MNPC"):
        MNPModule(trained_network(), {"runs": 1})  # type: ignore[arg-type]

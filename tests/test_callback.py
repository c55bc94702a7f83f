from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from helpers import (
    UserModule,
    images_and_labels,
    loader,
    quick_config,
    quiet_trainer,
    same,
    snapshot,
    trained_network,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import TensorDataset

from lightning_mnp import MNPCallback, MNPModule

pytestmark = pytest.mark.usefixtures("short_searches")


class WithHook(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()

    def defense_dataloader(self) -> Any:
        return loader(10)


def fit(callback: MNPCallback, **options: Any) -> tuple[UserModule, L.Trainer]:
    module = UserModule(trained_network().train())
    trainer = quiet_trainer(callbacks=[callback], **options)
    trainer.fit(module, loader())
    return module, trainer


def test_audit_only_changes_nothing_of_the_training(tmp_path: Path) -> None:
    module, _ = fit(MNPCallback("never", loader(), quick_config(), output_dir=tmp_path))
    plain = UserModule(trained_network().train())
    quiet_trainer().fit(plain, loader())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, module.state_dict()[name])
    assert [path.name for path in tmp_path.iterdir()] == ["mnp-report.json"]


def test_always_prunes_in_place_logs_and_writes(tmp_path: Path) -> None:
    logger = CSVLogger(str(tmp_path / "logs"))
    callback = MNPCallback("always", loader(), quick_config(), output_dir=tmp_path)
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


def test_a_second_run_overwrites_nothing(tmp_path: Path) -> None:
    for _ in range(2):
        fit(MNPCallback("always", loader(), quick_config(), output_dir=tmp_path))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["mnp-report.json", "mnp-v1-report.json", "mnp-v1.ckpt", "mnp.ckpt"]


def test_defense_set_from_the_datamodule_hook(tmp_path: Path) -> None:
    callback = MNPCallback("never", config=quick_config(), output_dir=tmp_path)
    quiet_trainer(callbacks=[callback]).fit(
        UserModule(trained_network().train()), datamodule=WithHook()
    )
    assert callback.report is not None
    assert callback.report.defense_set is not None
    assert callback.report.defense_set.images == 40


def test_defense_set_from_a_data_set(tmp_path: Path) -> None:
    data = TensorDataset(*images_and_labels(24))
    callback = MNPCallback("never", data, quick_config(), output_dir=tmp_path)
    fit(callback)
    assert callback.report is not None
    assert callback.report.defense_set is not None
    assert callback.report.defense_set.images == 24


def test_training_set_is_never_taken_for_the_defense_set() -> None:
    with pytest.raises(MisconfigurationException, match="The training set is not used"):
        fit(MNPCallback("never", config=quick_config()))


def test_bad_defense_set_shows_before_training() -> None:
    module = UserModule(trained_network().train())
    before = snapshot(module)
    images, labels = images_and_labels(8)
    callback = MNPCallback("always", [(images, torch.zeros_like(labels))], quick_config())
    with pytest.raises(ValueError, match="at least two classes"):
        quiet_trainer(callbacks=[callback]).fit(module, loader())
    assert same(before, snapshot(module))


def test_fast_dev_run_is_short_and_writes_nothing(tmp_path: Path) -> None:
    callback = MNPCallback("always", loader(), quick_config(runs=5), output_dir=tmp_path)
    fit(callback, fast_dev_run=True)
    assert callback.report is not None
    assert len(callback.report.runs) == 1
    assert list(tmp_path.iterdir()) == []


def test_report_is_kept_in_checkpoints_as_primitives(tmp_path: Path) -> None:
    callback = MNPCallback("never", loader(), quick_config(), output_dir=tmp_path)
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
    module: L.LightningModule = UserModule(trained_network())
    setup: Any = MNPCallback(defense_loader=loader()).setup
    arguments: tuple[Any, ...] = trainer, module, "fit"
    if door == "module":
        module = MNPModule(trained_network())
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
    callback = MNPCallback("always", loader(), quick_config())
    module = UserModule(trained_network().train())
    trainer = quiet_trainer(callbacks=[callback, saver], enable_checkpointing=True)
    with pytest.raises(RuntimeError, match="the audit failed"):
        trainer.fit(module, loader())
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert callback.report is None


def test_weights_put_in_place_afterwards_are_told(tmp_path: Path) -> None:
    class Averaging(UserModule):
        def on_train_end(self) -> None:
            self.net.load_state_dict(trained_network().state_dict())

    config = quick_config(rule="count", amount=3, reaudit=False)
    callback = MNPCallback("always", loader(), config, output_dir=tmp_path)
    with pytest.warns(UserWarning, match="its weights were changed after that: .*`on_train_end`"):
        quiet_trainer(callbacks=[callback]).fit(Averaging(trained_network().train()), loader())


def test_an_error_in_one_of_several_processes_waits_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("the audit failed")

    callback = MNPCallback("always", loader())
    monkeypatch.setattr(callback, "_audit", fail)
    module = UserModule(trained_network())
    callback.on_train_end(SimpleNamespace(world_size=1), module)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="the audit failed"):
        callback.on_fit_end(SimpleNamespace(world_size=1), module)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="the audit failed"):
        callback.on_train_end(SimpleNamespace(world_size=2), module)  # type: ignore[arg-type]

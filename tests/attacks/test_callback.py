from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import TinyDataModule, quiet_trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mnp.attacks import (
    BadNets,
    TriggerCheckpoint,
    WaNet,
    WaNetModule,
    load_trigger,
)
from lightning_mnp.attacks.trigger import read_poisoned_indices
from lightning_mnp.models import Classifier


def classifier() -> Classifier:
    return Classifier(num_classes=4, width=4, lr=0.01)


def test_the_trigger_is_beside_the_checkpoints(tmp_path: Path) -> None:
    datamodule = TinyDataModule(BadNets(target_class=2))
    trainer = quiet_trainer(
        callbacks=[ModelCheckpoint(tmp_path / "kept"), TriggerCheckpoint()],
        enable_checkpointing=True,
        limit_train_batches=1,
    )
    trainer.fit(classifier(), datamodule)
    path = tmp_path / "kept" / "trigger.safetensors"
    assert load_trigger(path).options() == datamodule.attack.options()
    assert read_poisoned_indices(path).equal(datamodule.poisoned_indices)
    assert [each.name for each in path.parent.glob("*.safetensors")] == [path.name]


def test_without_checkpoints_it_is_in_the_root_folder_and_replaced(tmp_path: Path) -> None:
    for seed in (1, 2):
        trainer = quiet_trainer(
            callbacks=[TriggerCheckpoint()], default_root_dir=tmp_path, limit_train_batches=1
        )
        trainer.fit(WaNetModule(WaNet(seed=seed), num_classes=4, width=4), TinyDataModule())
        loaded = load_trigger(tmp_path / "trigger.safetensors")
        assert loaded.tensors()["points"].equal(WaNet(seed=seed).generator.points)
    assert read_poisoned_indices(tmp_path / "trigger.safetensors").equal(torch.zeros(0).long())


def test_a_path_of_the_users_own(tmp_path: Path) -> None:
    path = tmp_path / "new" / "mine.safetensors"
    trainer = quiet_trainer(callbacks=[TriggerCheckpoint(path)], limit_train_batches=1)
    trainer.fit(classifier(), TinyDataModule(BadNets()))
    assert load_trigger(path).target_class == 0


def test_a_trial_run_writes_nothing(tmp_path: Path) -> None:
    trainer = quiet_trainer(
        callbacks=[TriggerCheckpoint()], default_root_dir=tmp_path, fast_dev_run=True
    )
    trainer.fit(classifier(), TinyDataModule(BadNets()))
    assert list(tmp_path.iterdir()) == []


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"end in '.safetensors', but got 'x.pt'"):
        TriggerCheckpoint("x.pt")
    trainer = quiet_trainer(callbacks=[TriggerCheckpoint()])
    with pytest.raises(ValueError, match="find an attack as `attack` of the module or"):
        trainer.fit(classifier(), TinyDataModule())

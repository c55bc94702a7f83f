"""Training in two processes with whole batches from one tensor; run by distributed_script.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers import TinyDataModule, quiet_trainer
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mnp.attacks import BadNets
from lightning_mnp.data import MemoryDataset
from lightning_mnp.models import Classifier


class Recorder(LightningModule):
    """Keeps what it is trained on: (epoch, place, images, labels)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(192, 4)
        self.seen: list[tuple[int, int, Tensor, Tensor]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.seen.append((self.current_epoch, batch_idx, batch[0].clone(), batch[1].clone()))
        return F.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Nothing to measure."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


class OddDataModule(TinyDataModule):
    """Test images whose number two processes cannot share evenly."""

    def load(self, split: Any) -> MemoryDataset:
        stored = super().load(split)
        return stored if split == "train" else MemoryDataset(stored.images[:31], stored.labels[:31])


class Saver(Callback):
    """Writes a checkpoint in the middle of the second epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 3:
            trainer.save_checkpoint(self.path)


def figures(**options: Any) -> dict[str, float]:
    """CA and ASR of a network that is the same each time."""
    torch.manual_seed(0)
    classifier = Classifier(width=2, num_classes=4)
    datamodule = OddDataModule(BadNets(margin=0), on_device=True)
    found = quiet_trainer(**options).test(classifier, datamodule, verbose=False)
    return {key: float(value) for each in found for key, value in each.items()}


def main(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    both: dict[str, Any] = {"strategy": "ddp", "devices": 2}
    modules = Recorder(), Recorder()
    options: dict[str, Any] = {**both, "max_epochs": 2, "limit_val_batches": 0}
    trainer = quiet_trainer(**options, callbacks=[Saver(folder / "middle.ckpt")])
    trainer.fit(modules[0], TinyDataModule(on_device=True))
    quiet_trainer(**options).fit(
        modules[1],
        TinyDataModule(on_device=True),
        ckpt_path=folder / "middle.ckpt",
        weights_only=True,
    )
    outcome: dict[str, Any] = {"seen": modules[0].seen, "resumed": modules[1].seen}
    outcome["figures"] = figures(**both)
    torch.save(outcome, folder / f"{trainer.global_rank}.pt")

"""Options of commands that many tests give."""

from __future__ import annotations

QUICK = [
    "--mnp.suppression.runs=1",
    "--mnp.suppression.epochs=1",
    "--mnp.masks.epochs=1",
    "--mnp.pruning.rule=count",
    "--mnp.pruning.amount=3",
    "--mnp.verdict.most_classes=3",
]
MODEL = [
    "--model=lightning_mnp.models.Classifier",
    "--model.width=4",
    "--model.in_channels=1",
]
DATA = ["--data=lightning_mnp.data.DigitsDataModule", "--data.defense_size=40"]
TRAINER = [
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_model_summary=false",
]
COMMON = [*MODEL, *DATA, *TRAINER]

"""Defend a network through a Trainer: its precision, loggers, checkpoints and progress bar.

python examples/module.py --output runs/module
python examples/module.py --output runs/module --resume runs/module/checkpoints/last.ckpt

Without `--network`, a file with the weights of a thin ResNet-18 for digits of 16x16 pixels,
a backdoored one is trained first.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_mnp import MNPConfig, MNPModule, load_into, read_state_dict, write_state_dict
from lightning_mnp.attacks import BadNets
from lightning_mnp.data import DigitsDataModule
from lightning_mnp.models import Classifier, cifar_resnet18


def train(epochs: int) -> nn.Module:
    """Train a network on digits of which a tenth carry a patch and the label 0."""
    data = DigitsDataModule(attack=BadNets(), image_size=16, batch_size=64)
    model = Classifier(width=8, in_channels=1, schedule="onecycle")
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    return model.network


def main() -> None:
    """Train or read a network, defend it, and keep checkpoints on the way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", type=Path, help="weights of the network")
    parser.add_argument("--resume", type=Path, help="checkpoint of a defense that was stopped")
    parser.add_argument("--precision", default="32-true", help="such as bf16-mixed")
    parser.add_argument("--epochs", type=int, default=20, help="of the training")
    parser.add_argument("--output", type=Path, default=Path("runs/module"), help="folder")
    options = parser.parse_args()

    L.seed_everything(0)
    path = options.network or options.output / "backdoored.safetensors"
    if options.network is None and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_state_dict(path, train(options.epochs).state_dict())
    network = cifar_resnet18(width=8, in_channels=1)
    load_into(network, read_state_dict(path))

    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=-1,  # the module stops the Trainer when the defense has finished
        precision=options.precision,
        logger=CSVLogger(options.output),
        log_every_n_steps=1,
        callbacks=[ModelCheckpoint(options.output / "checkpoints", save_last=True)],
    )
    # ModelCheckpoint saves after optimizer steps; the stages that prune take none. The module
    # writes the report itself and, if filters were pruned, the purified network.
    module = MNPModule(network, MNPConfig(seed=0), when="flagged", output_dir=options.output)
    clean = DigitsDataModule(image_size=16, defense_size=200).defense_dataloader()
    trainer.fit(module, clean, ckpt_path=options.resume, weights_only=True)
    print(module.report)


if __name__ == "__main__":
    main()

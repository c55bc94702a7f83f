"""Train a small network on poisoned digits, with the audit as a callback of its Trainer.

python examples/callback.py

The callback writes a report and, if it finds a backdoor, a purified network to `--output`. The
network in memory stays as it was trained.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning as L

from lightning_mnp import MNPCallback, MNPConfig, load_into, read_state_dict
from lightning_mnp.attacks import BadNets
from lightning_mnp.data import DigitsDataModule
from lightning_mnp.models import Classifier


def main() -> None:
    """Train, audit, and test the network as it was trained and the purified one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20, help="of the training")
    parser.add_argument("--when", choices=("never", "flagged", "always"), default="flagged")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/callback"), help="folder")
    options = parser.parse_args()

    L.seed_everything(options.seed)
    # The attacker's part: a tenth of the training images carry a patch and the label 0.
    data = DigitsDataModule(attack=BadNets(), image_size=16, batch_size=64)
    model = Classifier(width=8, in_channels=1, schedule="onecycle")

    # The defender's part. The clean images come from `data.defense_dataloader()`.
    audit = MNPCallback(
        when=options.when, config=MNPConfig(seed=options.seed), output_dir=options.output
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=options.epochs,
        callbacks=[audit],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)

    assert audit.report is not None
    print(f"{len(audit.report.pruned)} filters pruned: {audit.report.pruned}")
    trainer.test(model, data)
    if audit.purified_path is not None:
        load_into(model, read_state_dict(audit.purified_path))
        trainer.test(model, data)


if __name__ == "__main__":
    main()

"""Audit and defend a network without a Trainer, and write the purified weights.

python examples/plain.py --output runs/plain

The network is trained here, in a plain loop, on digits of which a tenth carry a patch and the
label 0. The audit sees the network and 200 clean digits only.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from lightning_mnp import audit, defend, write_state_dict
from lightning_mnp.attacks import BadNets
from lightning_mnp.data import DigitsDataModule
from lightning_mnp.models import cifar_resnet18


def train(network: nn.Module, data: DigitsDataModule, epochs: int) -> None:
    """Train a network by SGD with one cycle of the learning rate."""
    loader = data.train_dataloader()
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, epochs * len(loader))
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def rates(network: nn.Module, data: DigitsDataModule) -> str:
    """Return clean accuracy and attack success rate in words."""
    network.eval()
    shares = []
    for loader in data.test_dataloader():  # clean images, then triggered ones
        hits = [network(batch[0]).argmax(1) == batch[1] for batch in loader]
        shares.append(float(torch.cat(hits).float().mean()))
    return f"clean accuracy {shares[0]:.1%}, attack success rate {shares[1]:.1%}"


def main() -> None:
    """Train, audit, defend, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20, help="of the training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/plain"), help="folder")
    options = parser.parse_args()
    output = options.output / "purified.safetensors"
    if output.exists():  # nothing is overwritten, so it is better known before the work
        parser.error(f"--output: expected a folder without {output.name}, but got {output.parent}")

    torch.manual_seed(options.seed)
    data = DigitsDataModule(attack=BadNets(), image_size=16, batch_size=64)
    network = cifar_resnet18(width=8, in_channels=1)
    train(network, data, options.epochs)

    clean = data.defense_dataloader()  # any loader of clean, normalized images and their labels
    report = audit(network, clean, seed=options.seed, progress=True)
    print(report)
    report = defend(network, clean, seed=options.seed, when="always", progress=True)
    assert report.model is not None
    print(f"before: {rates(network, data)}")
    print(f"after:  {rates(report.model, data)}, {len(report.pruned)} filters pruned")

    options.output.mkdir(parents=True, exist_ok=True)
    report.save(options.output / "report.json")
    write_state_dict(output, report.model.state_dict())


if __name__ == "__main__":
    main()

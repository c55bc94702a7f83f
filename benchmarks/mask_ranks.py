"""Where the filters that a backdoor needs stand in the order in which the paper's masks prune.

    python -m benchmarks.mask_ranks --network FOLDER --changes benchmarks/results/figure1.csv

`changes` is what examples/figure1.py writes for the same network: the backdoor loss change (BLC) of
each filter. For the filters with the greatest, the command prints M1, M2 and their ranks: those of
rank 1 are pruned first.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_mnp import DefenseSet, MNPConfig, MNPDefense, load_into, read_state_dict
from lightning_mnp.data import CIFAR10DataModule
from lightning_mnp.models import cifar_resnet18

__all__ = ["Masks", "main", "masks_of", "needed_filters", "rank", "trained_network"]

_SETTINGS = {"paper": MNPConfig.paper, "averaged": MNPConfig.averaged_masks}


@dataclass
class Masks:
    """The dual masks of a network.

    Attributes:
        filters: Layer name and index of each filter.
        penalty: M1 of the last run.
        preserving: M2 of the last run.
        total: M1 + M2, averaged over the runs: the filters with the lowest are pruned.
    """

    filters: list[tuple[str, int]]
    penalty: Tensor
    preserving: Tensor
    total: Tensor


def masks_of(network: nn.Module, data: DefenseSet, config: MNPConfig) -> Masks:
    """Make the masks, without pruning.

    Args:
        network: The network.
        data: The defense set.
        config: Options, with a rule that prunes by masks.
    """
    defense = MNPDefense(network, data, config, when="always")
    while defense.phase != "pruning":
        defense.step()
    case = defense.case
    filters = [(layer.name, place) for layer in case.layers for place in range(layer.filters)]
    masks = case.penalty.values.detach(), case.preserving.values.detach()
    return Masks(filters, *masks, case.scores)


def trained_network(folder: Path) -> nn.Module:
    """Read a ResNet-18 that `fit` has trained, of whatever width.

    Args:
        folder: The folder with last.ckpt.
    """
    weights = read_state_dict(folder / "last.ckpt")
    stem = next(weight for name, weight in weights.items() if name.endswith("conv1.weight"))
    network = cifar_resnet18(10, stem.shape[0])
    load_into(network, weights)
    return network.eval()


def needed_filters(file: Path, above: float) -> dict[tuple[str, int], float]:
    """Read which filters a backdoor needs.

    Args:
        file: A CSV of examples/figure1.py.
        above: The BLC from which a filter counts.

    Returns:
        The BLC of these filters, the greatest first.
    """
    with file.open(encoding="utf-8", newline="") as lines:
        rows = [
            ((row["layer"], int(row["filter"])), float(row["BLC"])) for row in csv.DictReader(lines)
        ]
    return dict(sorted((row for row in rows if row[1] > above), key=lambda row: -row[1]))


def rank(values: Tensor, place: int) -> int:
    """Return the rank of a value, from 1 for the lowest; equal values have the same.

    Example:
        >>> [rank(torch.tensor([0.5, 0.0, 0.5, 1.0]), place) for place in range(4)]
        [2, 1, 2, 4]
    """
    return int((values < values[place]).sum()) + 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", type=Path, required=True, help="folder with last.ckpt")
    parser.add_argument("--changes", type=Path, required=True, help="CSV of examples/figure1.py")
    parser.add_argument("--data", type=Path, default=Path("~/data/cifar10"), help="CIFAR-10")
    parser.add_argument("--above", type=float, default=0.01, help="least BLC")
    parser.add_argument("--settings", nargs="*", choices=_SETTINGS, default=list(_SETTINGS))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    network = trained_network(options.network)
    module = CIFAR10DataModule(options.data.expanduser())
    module.setup("test")
    data = DefenseSet.from_loader(module.defense_dataloader())
    needed = needed_filters(options.changes, options.above)
    print("| setting | filter | BLC | M1 | M2 | rank by M1 | rank by the mean of M1 + M2 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in options.settings:
        masks = masks_of(network, data, _SETTINGS[name](seed=0))
        for key, change in needed.items():
            place = masks.filters.index(key)
            both = f"{masks.penalty[place]:.2f} | {masks.preserving[place]:.2f}"
            ranks = f"{rank(masks.penalty, place)} | {rank(masks.total, place)}"
            print(f"| {name} | {key[0]}/{key[1]} | {change:.3f} | {both} | {ranks} |", flush=True)
    print(f"\nThere are {len(masks.filters)} filters; rank 1 is pruned first.")
    return 0


if __name__ == "__main__":
    sys.exit(main())

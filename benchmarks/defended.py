"""Defend every network of `benchmarks.attacks` and measure CA and ASR before and after.

    python -m benchmarks.defended --data ~/data/cifar10 --networks runs/attacks/cifar10-2core

The defense sees clean training images only; the trigger files serve to measure. Finished runs are
kept. The default's constants were not tuned on these networks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader

from lightning_mnp import MNPConfig, defend
from lightning_mnp.attacks import SavedTrigger
from lightning_mnp.checkpoint import load_into, read_state_dict
from lightning_mnp.data import BackdoorDataModule, CIFAR10DataModule, ImageNetSubsetDataModule
from lightning_mnp.metrics import AttackSuccessRate, CleanAccuracy
from lightning_mnp.models import cifar_resnet18
from lightning_mnp.surrogate import reach_ratio


def datamodule(root: Path, imagenette: bool, **options: Any) -> BackdoorDataModule:
    """Give the images that the networks were trained with."""
    if imagenette:
        return ImageNetSubsetDataModule(root, preset="imagenette", image_size=64, **options)
    return CIFAR10DataModule(root, **options)


def measure(network: nn.Module, loaders: list[DataLoader[Any]]) -> dict[str, float]:
    """Give CA and, where there are triggered images, ASR, in percent."""
    accuracy, success = CleanAccuracy(), AttackSuccessRate()
    with torch.no_grad():
        for images, labels in loaders[0]:
            accuracy.update(network(images), labels)
        for images, targets, labels in loaders[1] if len(loaders) > 1 else ():
            success.update(network(images), targets, labels)
    figures = {"CA": 100 * accuracy.compute().item()}
    if len(loaders) > 1:
        figures["ASR"] = 100 * success.compute().item()
    return figures


def run(folder: Path, seed: int, preset: str, data: Path, imagenette: bool) -> dict[str, Any]:
    """Defend one network with one defense set."""
    network = cifar_resnet18(width=16)
    load_into(network, read_state_dict(folder / "checkpoints" / "last.ckpt"))
    network.eval()
    trigger = folder / "checkpoints" / "trigger.safetensors"
    attack = SavedTrigger(trigger) if trigger.exists() else None
    images = datamodule(data, imagenette, attack=attack, defense_seed=seed)
    config = MNPConfig.paper(seed=seed) if preset == "paper" else MNPConfig(seed=seed)
    before = measure(network, images.test_dataloader())
    started = time.perf_counter()
    report = defend(network, images.defense_dataloader(), when="always", config=config)
    seconds = time.perf_counter() - started
    assert report.model is not None
    return {
        "network": folder.name,
        "seed": seed,
        "before": before,
        "after": measure(report.model, images.test_dataloader()),
        "pruned": len(report.pruned),
        "verdict": report.verdict,
        "target_class": report.target_class,
        "reach": reach_ratio(report.reaches)[1] if report.reaches else None,
        "seconds": seconds,
    }


def mean_and_worst(values: list[float], worst: Callable[[list[float]], float]) -> str:
    """Write the mean and, of several values, the worst; a dash where there is none."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({worst(values):.2f})"


def table(rows: list[dict[str, Any]]) -> str:
    """Write a Markdown table: means over the defense sets, worst ones of several in brackets."""
    lines = [
        "| network | CA before | ASR before | CA after | ASR after | pruned | flagged | target | "
        "reach |",
        "| --- " * 9 + "|",
    ]
    for name in dict.fromkeys(row["network"] for row in rows):
        group = [row for row in rows if row["network"] == name]
        first = group[0]["before"]
        accuracies = [row["after"]["CA"] for row in group]
        rates = [row["after"]["ASR"] for row in group if "ASR" in row["after"]]
        reaches = [row["reach"] for row in group if row["reach"] is not None]
        cells = [
            name,
            f"{first['CA']:.2f}",
            f"{first['ASR']:.2f}" if "ASR" in first else "-",
            mean_and_worst(accuracies, min),
            mean_and_worst(rates, max),
            ", ".join(str(row["pruned"]) for row in group),
            f"{sum(row['verdict'] == 'backdoored' for row in group)} of {len(group)}",
            ", ".join(str(row["target_class"]).replace("None", "-") for row in group),
            "-".join(dict.fromkeys(f"{of(reaches):.2f}" for of in (min, max) if reaches)) or "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Make the runs that are missing and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the images")
    parser.add_argument("--networks", type=Path, default=Path("runs/attacks/cifar10-2core"))
    parser.add_argument("--imagenette", action="store_true", help="the data is Imagenette, 64 px")
    parser.add_argument("--preset", choices=("default", "paper"), default="default")
    parser.add_argument("--only", nargs="*", help="names of networks; without it, all")
    parser.add_argument("--seeds", type=int, default=2, help="defense sets of each network")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    trained = [path.parent.name for path in sorted(options.networks.glob("*/result.json"))]
    missing = sorted(set(options.only or ()) - set(trained))
    if missing:
        parser.error(f"--only: expected names out of {trained}, but got {missing}")
    for name in options.only or trained:
        folder = options.networks / name
        for seed in range(options.seeds):
            kept = folder / f"defended-{options.preset}-{seed}.json"
            if not kept.exists():
                row = run(
                    folder, seed, options.preset, options.data.expanduser(), options.imagenette
                )
                kept.write_text(json.dumps(row))
                print(f"{kept}: done", flush=True)
            rows.append(json.loads(kept.read_text()))
    Console(width=160, markup=False).print(table(rows))


if __name__ == "__main__":
    main()

"""Defend every network of `benchmarks.attacks` and measure CA and ASR before and after.

    python -m benchmarks.defended --data ~/data/cifar10 --networks runs/attacks/cifar10-2core

The defense sees clean training images only; the trigger files serve to measure. A network without
a trigger is defended if it is flagged, one with a trigger in any case; "flagged" tells whether the
verdict would have led to it. Finished runs are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from scipy.stats import binomtest
from torch import nn
from torch.utils.data import DataLoader, Subset

from lightning_mnp import DefenseSet, MNPConfig, baselines, defend
from lightning_mnp.attacks import SavedTrigger
from lightning_mnp.checkpoints.read import read_state_dict
from lightning_mnp.checkpoints.state_dict import load_into
from lightning_mnp.data import BackdoorDataModule, CIFAR10DataModule, ImageNetSubsetDataModule
from lightning_mnp.metrics import AttackSuccessRate, CleanAccuracy
from lightning_mnp.models import cifar_resnet18


def datamodule(root: Path, imagenette: bool, **options: Any) -> BackdoorDataModule:
    """Return the images that the networks were trained with."""
    if imagenette:
        return ImageNetSubsetDataModule(root, preset="imagenette", image_size=64, **options)
    return CIFAR10DataModule(root, **options)


def thinned(loader: DataLoader[Any], most: int | None) -> DataLoader[Any]:
    """Return every n-th image of a loader, so that at most so many are left; all where None."""
    dataset: Any = loader.dataset
    if most is None or len(dataset) <= most:
        return loader
    rows = range(0, len(dataset), -(-len(dataset) // most))
    return DataLoader(
        Subset(dataset, rows), batch_size=loader.batch_size, collate_fn=loader.collate_fn
    )


def measure(network: nn.Module, loaders: list[DataLoader[Any]]) -> dict[str, float]:
    """Return CA and, where there are triggered images, ASR, in percent."""
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


@dataclass(frozen=True)
class Variant:
    """A defense set that is not what one would wish for.

    Attributes:
        size: Number of images.
        predicted: Whether labels are the network's own predictions.
        impure: Share of the images that are triggered, with the attacker's label.
        impurity: Share of them that the defender reckons with.
    """

    size: int = 500
    predicted: bool = False
    impure: float = 0.0
    impurity: float = 0.0

    @property
    def suffix(self) -> str:
        """What tells the files of its runs from others."""
        parts = (
            f"-{self.size}" if self.size != 500 else "",
            "-predicted" if self.predicted else "",
            f"-impure{self.impure:g}" if self.impure else "",
            f"-impurity{self.impurity:g}" if self.impurity else "",
        )
        return "".join(parts)

    def apply(self, network: nn.Module, images: BackdoorDataModule) -> DefenseSet:
        """Return the defense set of a datamodule, changed so."""
        data = DefenseSet.from_loader(images.defense_dataloader())
        pixels, labels = data.images.clone(), data.labels.clone()
        if self.impure:
            count = round(self.impure * len(labels))
            triggered, targets, _ = next(iter(images.test_dataloader()[1]))
            pixels[:count], labels[:count] = triggered[:count], targets[:count]
        if self.predicted:
            with torch.no_grad():
                labels = torch.cat([network(part).argmax(1) for part in pixels.split(250)])
        return DefenseSet(pixels, labels)


def run(
    folder: Path,
    seed: int,
    preset: str,
    data: Path,
    imagenette: bool,
    most: int | None,
    variant: Variant,
) -> dict[str, Any]:
    """Defend one network with one defense set."""
    weights = read_state_dict(folder / "checkpoints" / "last.ckpt")
    stem = next(weight for name, weight in weights.items() if name.endswith("conv1.weight"))
    network = cifar_resnet18(width=stem.shape[0])
    load_into(network, weights)
    network.eval().to(memory_format=torch.channels_last)
    trigger = folder / "checkpoints" / "trigger.safetensors"
    attack = SavedTrigger(trigger) if trigger.exists() else None
    options = {"attack": attack, "defense_seed": seed, "defense_size": variant.size}
    images = datamodule(data, imagenette, **options)
    loaders = images.test_dataloader()
    loaders = [thinned(each, most) for each in loaders]
    before = measure(network, loaders)
    loader = variant.apply(network, images)
    row: dict[str, Any] = {"network": folder.name, "seed": seed, "before": before}
    started = time.perf_counter()
    if preset in baselines.names():  # they remove backdoors, and do not judge
        result = baselines.find(preset)(network, loader, seed)
        defended, row["pruned"] = result.model, len(result.pruned)
    else:
        config = MNPConfig(seed=seed).changed({"pruning.impurity": variant.impurity})
        published = {"paper": MNPConfig.paper, "averaged-masks": MNPConfig.averaged_masks}
        if preset in published:
            config = published[preset](seed=seed)
        always = attack is not None or preset in published
        report = defend(network, loader, when="always" if always else "flagged", config=config)
        assert report.model is not None
        defended, row["pruned"] = report.model, len(report.pruned)
        row.update(verdict=report.verdict, target_class=report.target_class, score=report.score)
        row.update(ratio=report.detection_ratio, pile_up=report.pile_up)
        row.update({each.name: (each.target_class, each.value) for each in report.signals})
        if report.reaudit is not None:
            row["reaudit"] = (report.reaudit.verdict, report.reaudit.score)
    row["seconds"] = time.perf_counter() - started
    return {**row, "after": measure(defended, loaders)}


def mean_and_worst(values: list[float], worst: Callable[[list[float]], float]) -> str:
    """Write the mean and, of several values, the worst; a dash where there is none."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({worst(values):.2f})"


def target(row: dict[str, Any]) -> str:
    """Name the suspected target class: "all" for all-to-all, a dash where there is none."""
    if row.get("target_class") is not None:
        return str(row["target_class"])
    judged = math.isfinite(row.get("score", math.nan)) and row["verdict"] != "clean"
    return "all" if judged else "-"


def table(rows: list[dict[str, Any]]) -> str:
    """Write a Markdown table: means over the defense sets, worst ones of several in brackets."""
    lines = [
        "| network | CA before | ASR before | CA after | ASR after | pruned | flagged | target | "
        "score | again |",
        "| --- " * 10 + "|",
    ]
    for name in dict.fromkeys(row["network"] for row in rows):
        group = [row for row in rows if row["network"] == name]
        first = group[0]["before"]
        accuracies = [row["after"]["CA"] for row in group]
        rates = [row["after"]["ASR"] for row in group if "ASR" in row["after"]]
        scores = [row["score"] for row in group if math.isfinite(row.get("score", math.nan))]
        verdicts = [row["verdict"] for row in group if row.get("verdict")]
        again = [row["reaudit"][0] for row in group if row.get("reaudit")]
        cells = [
            name,
            f"{first['CA']:.2f}",
            f"{first['ASR']:.2f}" if "ASR" in first else "-",
            mean_and_worst(accuracies, min),
            mean_and_worst(rates, max),
            ", ".join(str(row["pruned"]) for row in group),
            f"{verdicts.count('backdoored')} of {len(group)}" if verdicts else "-",
            ", ".join(target(row) for row in group),
            "-".join(dict.fromkeys(f"{of(scores):.2f}" for of in (min, max) if scores)) or "-",
            ", ".join(again) or "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(rows: list[dict[str, Any]]) -> str:
    """Say in a line each what the rows say together."""
    attacked = [row for row in rows if "ASR" in row["before"]]
    lines = []
    for kind, group in (
        ("backdoored", attacked),
        ("clean", [r for r in rows if r not in attacked]),
    ):
        if not group:
            continue
        flagged = sum(row.get("verdict") == "backdoored" for row in group)
        low, high = binomtest(flagged, len(group)).proportion_ci(method="exact")
        drops = [row["before"]["CA"] - row["after"]["CA"] for row in group]
        lines.append(
            f"{kind}: {flagged} of {len(group)} flagged (95% interval {low:.0%} to {high:.0%}); CA "
            f"drop {statistics.mean(drops):.2f} on average, {max(drops):.2f} at worst"
        )
        if kind == "backdoored":
            rates = [row["after"]["ASR"] for row in group]
            lines.append(
                f"ASR after: {statistics.mean(rates):.2f} on average, {max(rates):.2f} at worst, "
                f"above 10 in {sum(rate > 10 for rate in rates)} of {len(rates)}"
            )
    return "\n".join(lines)


def main() -> None:
    """Make the runs that are missing and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the images")
    parser.add_argument("--networks", type=Path, default=Path("runs/attacks/cifar10-2core"))
    parser.add_argument("--imagenette", action="store_true", help="the data is Imagenette, 64 px")
    presets = ("default", "paper", "averaged-masks", *baselines.names())
    parser.add_argument("--preset", choices=presets, default="default")
    parser.add_argument("--only", nargs="*", help="names of networks; without it, all")
    parser.add_argument("--seeds", type=int, default=2, help="defense sets of each network")
    parser.add_argument("--test_images", type=int, help="most test images; without it, all")
    parser.add_argument("--size", type=int, default=500, help="images in the defense set")
    parser.add_argument("--predicted", action="store_true", help="labels by the network itself")
    parser.add_argument("--impure", type=float, default=0.0, help="share that is poisoned")
    parser.add_argument("--impurity", type=float, default=0.0, help="share that is reckoned with")
    options = parser.parse_args()
    torch.set_num_threads(1)
    variant = Variant(options.size, options.predicted, options.impure, options.impurity)
    rows = []
    trained = [path.parent.name for path in sorted(options.networks.glob("*/result.json"))]
    missing = sorted(set(options.only or ()) - set(trained))
    if missing:
        parser.error(f"--only: expected names out of {trained}, but got {missing}")
    for name in options.only or trained:
        folder = options.networks / name
        for seed in range(options.seeds):
            kept = folder / f"defended-{options.preset}{variant.suffix}-{seed}.json"
            if not kept.exists():
                data, most = options.data.expanduser(), options.test_images
                row = run(folder, seed, options.preset, data, options.imagenette, most, variant)
                kept.write_text(json.dumps(row))
                print(f"{kept}: done", flush=True)
            rows.append(json.loads(kept.read_text()))
    Console(width=160, markup=False).print(table(rows))
    print(summary(rows))


if __name__ == "__main__":
    main()

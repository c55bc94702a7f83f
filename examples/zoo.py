"""Defend the networks of a zoo and print the table; every finished run is kept.

    python examples/zoo.py --zoo ZOO --data ~/data/cifar10 --preset default

The folder ZOO holds `load.py`, which defines `load(name)` and `trigger(info, images)`, and the
networks `badnets.pt`, `blend.pt` and `clean.pt`. Each network is defended with several defense
sets of 500 clean training images. Attack success is measured afterwards; nothing depends on it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_mnp import MNPConfig, defend
from lightning_mnp.data import CIFAR10DataModule
from lightning_mnp.metrics.functional import attack_success_rate, clean_accuracy

NETWORKS = ("badnets", "blend", "clean")
TARGET = 0
PRESETS: dict[str, Callable[..., MNPConfig]] = {
    "default": MNPConfig,
    "paper": MNPConfig.paper,
    "averaged-masks": MNPConfig.averaged_masks,
}


def load_zoo(folder: Path) -> ModuleType:
    """Import the zoo's own `load.py`."""
    spec = importlib.util.spec_from_file_location("zoo_load", folder / "load.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Evaluation:
    """Clean accuracy and attack success rate on all test images, in percent."""

    def __init__(self, data: CIFAR10DataModule, zoo: ModuleType) -> None:
        self.zoo = zoo
        self._untouched: dict[str, tuple[float, float | None]] = {}
        self.images, self.labels = data.test_set.to_memory().images, data.test_set.labels
        self.mean = torch.tensor(data.mean).reshape(1, -1, 1, 1)
        self.std = torch.tensor(data.std).reshape(1, -1, 1, 1)

    def untouched(self, name: str) -> tuple[float, float | None]:
        """Return CA and ASR of a network as it is, measured once."""
        if name not in self._untouched:
            self._untouched[name] = self(*self.zoo.load(f"{name}.pt"))
        return self._untouched[name]

    def classes(self, network: nn.Module, info: dict[str, Any] | None) -> Tensor:
        """Predict all test images, triggered where an attack's description is given."""
        parts = []
        with torch.no_grad():
            for images in self.images.split(500):
                pixels = images.float() / 255
                if info is not None:
                    pixels = self.zoo.trigger(info, pixels)
                parts.append(network((pixels - self.mean) / self.std).argmax(1))
        return torch.cat(parts)

    def __call__(self, network: nn.Module, info: dict[str, Any]) -> tuple[float, float | None]:
        """Return CA and, for a network that was attacked, ASR."""
        network.eval()
        accuracy = 100 * float(clean_accuracy(self.classes(network, None), self.labels))
        if info["atk"] not in ("badnets", "blend"):
            return accuracy, None
        wanted = torch.full_like(self.labels, TARGET)
        success = attack_success_rate(self.classes(network, info), wanted, self.labels)
        return accuracy, 100 * float(success)


def run(
    name: str, seed: int, preset: str, zoo: ModuleType, root: Path, evaluate: Evaluation
) -> dict[str, Any]:
    """Defend one network with one defense set and measure before and after."""
    network, info = zoo.load(f"{name}.pt")
    data = CIFAR10DataModule(root, defense_size=500, defense_seed=seed)
    config = PRESETS[preset](seed=seed)
    before = evaluate.untouched(name)
    started = time.perf_counter()
    report = defend(network, data.defense_dataloader(), when="always", config=config)
    seconds = time.perf_counter() - started
    assert report.model is not None
    after = evaluate(report.model, info)
    return {
        "network": name,
        "seed": seed,
        "preset": preset,
        "ca_before": before[0],
        "ca_after": after[0],
        "asr_before": before[1],
        "asr_after": after[1],
        "pruned": len(report.pruned),
        "ratio": report.detection_ratio,
        "verdict": report.verdict,
        "target_class": report.target_class,
        "reasons": report.reasons,
        "seconds": seconds,
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print all runs, and a summary of each network."""
    table = Table()
    for column in ("network", "seed", "CA before", "CA after", "ASR before", "ASR after"):
        table.add_column(column, justify="right")
    for column in ("pruned", "ratio", "verdict", "target", "seconds"):
        table.add_column(column, justify="right")

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    for row in rows:
        table.add_row(
            row["network"],
            str(row["seed"]),
            *(percent(row[key]) for key in ("ca_before", "ca_after", "asr_before", "asr_after")),
            str(row["pruned"]),
            f"{row['ratio']:.2f}",
            row["verdict"],
            "-" if row["target_class"] is None else str(row["target_class"]),
            f"{row['seconds']:.0f}",
        )
    console = Console(width=120)
    console.print(table)
    for name in NETWORKS:
        chosen = [row for row in rows if row["network"] == name]
        if not chosen:
            continue
        drops = [row["ca_before"] - row["ca_after"] for row in chosen]
        flagged = sum(row["verdict"] == "backdoored" for row in chosen)
        line = f"{name}: CA drop {statistics.mean(drops):.2f} (worst {max(drops):.2f})"
        rates = [row["asr_after"] for row in chosen if row["asr_after"] is not None]
        if rates:
            line += f", ASR {statistics.mean(rates):.2f} (worst {max(rates):.2f})"
        console.print(f"{line}, flagged {flagged} of {len(chosen)}", highlight=False)


def main() -> None:
    """Make the runs that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zoo", type=Path, required=True, help="folder with load.py")
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10's folder")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="default")
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, default=5, help="defense sets of each network")
    parser.add_argument("--out", type=Path, default=Path("runs/zoo"), help="where runs are kept")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    zoo = load_zoo(options.zoo)
    evaluate = Evaluation(CIFAR10DataModule(options.data), zoo)
    folder = options.out / options.preset
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in options.networks:
        for seed in range(options.seeds):
            path = folder / f"{name}-{seed}.json"
            if not path.exists():
                row = run(name, seed, options.preset, zoo, options.data, evaluate)
                partial = path.with_suffix(".partial")  # a killed run leaves no half of a file
                partial.write_text(json.dumps(row, indent=2) + "\n")
                partial.replace(path)
                print(f"{path}: done", flush=True)
            rows.append(json.loads(path.read_text()))
    print_table(rows)


if __name__ == "__main__":
    main()

"""Run the default and the paper's setting on the networks that the default was tuned on.

    python -m benchmarks.tuning --networks runs/tuning

These are the networks of `benchmarks.networks`; the figures show what the choice rested on, and
are no claim about other networks. Finished runs are kept.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from benchmarks.networks import MEAN, STD, TUNING, accuracy
from lightning_mnp import DefenseSet, MNPConfig, defend
from lightning_mnp.defense_data.subset import balanced_indices
from lightning_mnp.models import cifar_resnet18


def measure(name: str, network: torch.nn.Module, test: dict[str, torch.Tensor]) -> list[float]:
    """Clean accuracy and, for a backdoored network, attack success rate, in percent."""
    attack = TUNING[name][0]
    figures = [100 * accuracy(network, test["images"], test["labels"])]
    if attack is not None:
        others = test["labels"] != attack.target_class
        wanted = attack.target_labels(test["labels"][others], 10)
        figures.append(100 * accuracy(network, attack.apply(test["images"][others]), wanted))
    return figures


def run(name: str, seed: int, preset: str, folder: Path) -> dict[str, Any]:
    """Defend one network with one defense set."""
    network = cifar_resnet18(width=16)
    network.load_state_dict(load_file(folder / f"{name}.safetensors"))
    stored = torch.load(folder / "train.pt", weights_only=True)
    test = torch.load(folder / "test.pt", weights_only=True)
    rows = balanced_indices(stored["labels"], 500, seed)
    data = DefenseSet((stored["images"][rows].float() / 255 - MEAN) / STD, stored["labels"][rows])
    config = MNPConfig.paper(seed=seed) if preset == "paper" else MNPConfig(seed=seed)
    started = time.perf_counter()
    report = defend(network.eval(), data, when="always", config=config)
    seconds = time.perf_counter() - started
    assert report.model is not None
    return {
        "network": name,
        "seed": seed,
        "before": measure(name, network, test),
        "after": measure(name, report.model, test),
        "pruned": len(report.pruned),
        "verdict": report.verdict,
        "target": report.target_class,
        "score": report.score,
        "ratio": report.detection_ratio,
        "pile_up": report.pile_up,
        "top_class": report.runs[0].top_class,
        "signals": {signal.name: signal.value for signal in report.signals},
        "stages": report.seconds,
        "curve": report.pruning.curve,
        "warnings": report.warnings,
        "seconds": seconds,
    }


def main() -> None:
    """Make the runs that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", type=Path, default=Path("runs/tuning"), help="their folder")
    parser.add_argument("--preset", choices=("default", "paper"), default="default")
    parser.add_argument("--only", nargs="*", default=list(TUNING), help="names")
    parser.add_argument("--seeds", type=int, default=2, help="defense sets of each network")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("network", "seed", "CA/ASR before", "after", "pruned", "verdict", "target")
    for column in ("ratio", "pile-up", "score", "seconds"):
        table.add_column(column)
    for name in options.only:
        for seed in range(options.seeds):
            path = options.networks / f"{options.preset}-{name}-{seed}.json"
            if not path.exists():
                path.write_text(json.dumps(run(name, seed, options.preset, options.networks)))
                print(f"{path}: done", flush=True)
            row = json.loads(path.read_text())
            figures = ["/".join(f"{x:.1f}" for x in row[key]) for key in ("before", "after")]
            table.add_row(
                name,
                str(seed),
                *figures,
                *(str(row[key]) for key in ("pruned", "verdict", "target")),
                f"{row['ratio']:.2f}",
                f"{row['pile_up']:.2f} on {row['top_class']}",
                f"{row['score']:.2f}",
                f"{row['seconds']:.0f}",
            )
    Console(width=130).print(table)


if __name__ == "__main__":
    main()

"""What an audit costs: against RNP's procedure in one run, and for a thousand classes.

    python -m benchmarks.cost rnp --data ~/data/cifar10 --weights runs/attacks/cifar10-2core/clean
    python -m benchmarks.cost classes

`rnp` takes the processor time of an audit and of RNP (unlearning, recovering, pruning) on the same
network and images, on one thread, in turns. `classes` counts the passes of an audit of a network of
1,000 classes, which but for clean suppression depend on the numbers of classes and images alone
and so are counted on a tiny one, and times a few passes of a ResNet-50 with random weights at 224
pixels.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet50

from lightning_mnp import DefenseSet, MNPConfig, MNPDefense, audit, load_into, read_state_dict
from lightning_mnp.baselines import rnp
from lightning_mnp.config import Constants
from lightning_mnp.data import CIFAR10DataModule
from lightning_mnp.engine.runner import run_defense
from lightning_mnp.models import cifar_resnet18
from lightning_mnp.report import DefenseReport
from lightning_mnp.signals.abstention import AbstentionConstants

__all__ = ["compare", "large_audit", "main", "time_of_a_pass"]


def compare(network: nn.Module, data: DefenseSet, repeats: int) -> dict[str, Any]:
    """Take the processor time of an audit and of RNP, in turns.

    Args:
        network: The network.
        data: The defense set.
        repeats: How often.

    Returns:
        Seconds of each run by name, the audit's passes, and the ratio of the medians.
    """
    report = DefenseReport("undecided")
    seconds: dict[str, list[float]] = {"rnp": [], "audit": []}
    for _ in range(repeats):
        seconds["rnp"].append(_processor_time(lambda: rnp(network, data)))
        started = time.process_time()
        report = audit(network, data)
        seconds["audit"].append(time.process_time() - started)
    ratio = statistics.median(seconds["audit"]) / statistics.median(seconds["rnp"])
    return {
        **{name: [round(each, 1) for each in values] for name, values in seconds.items()},
        "passes": round(sum(report.passes.values())),
        "verdict": report.verdict,
        "ratio": round(ratio, 2),
    }


def _processor_time(run: Callable[[], object]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def large_audit(classes: int, images: int) -> DefenseReport:
    """Audit a tiny network of many classes on noise, although it knows nothing.

    Args:
        classes: Number of classes.
        images: Number of images, their labels in turn.

    Returns:
        The report. Its passes are those of any network with as many classes and images, but for
        clean suppression, which takes no step in a network that knows nothing.
    """
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2)),
        *(nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(8, classes),
    ).eval()
    data = DefenseSet(torch.randn(images, 3, 16, 16), torch.arange(images) % classes)
    anyway = Constants(AbstentionConstants(abstain=False))
    defense = MNPDefense(network, data, MNPConfig(), when="never", constants=anyway)
    run_defense(defense)
    return defense.report()


def time_of_a_pass(network: nn.Module, size: int, batch: int = 8) -> float:
    """Return the processor seconds of one image forward and backward.

    Args:
        network: The network, with 1,000 classes.
        size: Side of the images in pixels.
        batch: Number of images at once.
    """
    images, labels = torch.randn(batch, 3, size, size), torch.arange(batch)

    def run() -> None:
        F.cross_entropy(network(images), labels).backward()

    run()
    return statistics.median(_processor_time(run) for _ in range(3)) / batch


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says.

    Args:
        arguments: Those behind the program's name; of this process if None.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=("rnp", "classes"))
    parser.add_argument("--data", type=Path, default=Path("~/data/cifar10"), help="of CIFAR-10")
    parser.add_argument("--weights", type=Path, help="file of a ResNet-18, or its folder")
    parser.add_argument("--width", type=int, default=16, help="channels of its first stage")
    parser.add_argument("--images", type=int, help="images; 500 for rnp, 1,000 for classes")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.command == "classes":
        report = large_audit(1000, options.images or 1000)
        passes = {name: round(count) for name, count in report.passes.items()}
        seconds = time_of_a_pass(resnet50().train(), 224)
        total = sum(passes.values())
        print(f"passes: {total} {passes}")
        print(
            f"ResNet-50 at 224 px: {seconds:.2f} processor seconds a pass, so about "
            f"{total * seconds / 3600:.1f} hours on one thread"
        )
        return 0
    if options.weights is None:
        parser.error("--weights: expected the file of a network, but got none")
    network = cifar_resnet18(10, options.width)
    found = options.weights
    file = found / "checkpoints" / "last.ckpt" if found.is_dir() else found
    load_into(network, read_state_dict(file))
    module = CIFAR10DataModule(options.data.expanduser(), defense_size=options.images or 500)
    module.setup("test")
    data = DefenseSet.from_loader(module.defense_dataloader())
    print(compare(network.eval(), data, options.repeats))
    return 0


if __name__ == "__main__":
    sys.exit(main())

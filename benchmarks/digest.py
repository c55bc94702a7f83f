"""Print a digest of what audits and defenses find: the same before and after a change of the code.

    python -m benchmarks.digest --zoo ../shared/zoo --data ~/data/cifar10

Each line is one case: a network, what was done to it, and a SHA-256 over verdict, score, target
class, pruned filters, masks and purified weights, to the last bit. The same code gives the same
lines on the same machine; figures differ between processors, so compare lines of one machine only.
The cases "resumed" save the state of the engine every so many steps, read it into a new engine and
go on there: their digests are those of the case above them.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import nn

import lightning_mnp
from lightning_mnp import (
    DefenseReport,
    DefenseSet,
    MNPConfig,
    MNPDefense,
    load_into,
    read_state_dict,
)
from lightning_mnp.cli.command_line import main as command_line
from lightning_mnp.data import CIFAR10DataModule, DigitsDataModule
from lightning_mnp.models import cifar_resnet18

# Steps between two interruptions of a resumed run: every phase is met, most of them midway.
EVERY = 23


def digest(report: DefenseReport) -> str:
    """Sum up what a report says and, where there is one, its network."""
    found = hashlib.sha256()
    told = [
        report.verdict,
        repr(report.score),
        repr(report.detection_ratio),
        report.target_class,
        report.all_to_all,
        [list(pair) for pair in report.pruned],
        masks_of(report),
    ]
    found.update(json.dumps(told).encode())
    if report.model is not None:
        for name, tensor in report.model.state_dict().items():
            found.update(name.encode())
            found.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def masks_of(report: DefenseReport) -> dict[str, list[float]]:
    """Return how much of each filter is left, by layer; nothing if no kernel was turned down."""
    return report.pruning.masks


def resumed(network: nn.Module, data: DefenseSet, config: MNPConfig) -> DefenseReport:
    """Defend a network in many pieces, each by an engine of its own."""
    defense = MNPDefense(network, data, config)
    while not defense.finished:
        for _ in range(EVERY):
            if not defense.finished:
                defense.step()
        file = io.BytesIO()
        torch.save(defense.state_dict(), file)
        file.seek(0)
        defense = MNPDefense(network, data, config)
        defense.load_state_dict(torch.load(file, weights_only=True))
    report = defense.report()
    report.model = defense.purified()
    return report


def digits() -> tuple[nn.Module, DefenseSet]:
    """Train the network of `lightning-mnp demo` and return it with its defense set."""
    with tempfile.TemporaryDirectory() as folder:
        command_line(["demo", "--output_dir", folder])
        weights = read_state_dict(Path(folder, "backdoored.ckpt"))
    network = cifar_resnet18(width=weights["network.conv1.weight"].shape[0], in_channels=1)
    load_into(network, weights)
    return network.eval(), DefenseSet.from_loader(
        DigitsDataModule(image_size=16).defense_dataloader()
    )


def zoo(folder: Path, name: str) -> nn.Module:
    """Load a network of a zoo by its own `load.py`."""
    spec = importlib.util.spec_from_file_location("zoo_load", folder / "load.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network: nn.Module = module.load(f"{name}.pt")[0]
    return network


def cases(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], DefenseReport]]]:
    """Name the cases with what carries each out."""
    if "digits" in options.only:
        network, data = digits()
        config, paper = MNPConfig(seed=0), MNPConfig.paper(seed=0)
        always = partial(lightning_mnp.defend, network, data, when="always")
        yield "digits audit", partial(lightning_mnp.audit, network, data, config=config)
        yield "digits defend", partial(always, config=config)
        yield "digits resumed", partial(resumed, network, data, config)
        yield "digits paper", partial(always, config=paper)
        yield "digits paper resumed", partial(resumed, network, data, paper)
    for name in ("badnets", "blend", "clean"):
        if name not in options.only:
            continue
        loader = CIFAR10DataModule(options.data.expanduser(), defense_size=500)
        data = DefenseSet.from_loader(loader.defense_dataloader())
        network = zoo(options.zoo, name)
        yield f"{name} audit", partial(lightning_mnp.audit, network, data, seed=0)
        yield f"{name} defend", partial(lightning_mnp.defend, network, data, when="always", seed=0)


def main() -> None:
    """Print the lines."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--zoo", type=Path, default=Path("../shared/zoo"), help="its folder")
    parser.add_argument("--data", type=Path, default=Path("~/data/cifar10"), help="CIFAR-10")
    names = ("digits", "badnets", "blend", "clean")
    parser.add_argument("--only", nargs="*", choices=names, default=names, help="networks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, carry_out in cases(options):
        report = carry_out()
        print(f"{name}: {report.verdict} {report.score:.4f} {digest(report)}", flush=True)


if __name__ == "__main__":
    main()

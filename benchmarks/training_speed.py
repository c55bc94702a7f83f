"""Measure how long an epoch on CIFAR-10 takes by each way of training.

    python -m benchmarks.training_speed --data ~/data/cifar10
    python -m benchmarks.training_speed --data ~/data/cifar10 --only thin --repeats 9

The ways differ in the loader (single images put together, or whole batches cut out of one tensor)
and in the memory format of the network. They take turns: each repetition trains some batches by
every way, in a changing order, and ratios are taken within a repetition. The time of an epoch is
the mean time of a step times the number of steps; the first step of each turn does not count. A
loader's share is the time that the training waits for the next batch, over the time of a step.

Each figure is taken twice: in seconds by the clock, and in seconds that the processor worked for
the process. On a machine with other work, ratios by the clock mean little. For the others,
OMP_WAIT_POLICY=PASSIVE keeps threads from spinning while they wait for each other.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import math
import platform
import statistics
import time
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.profilers import Profiler
from rich.console import Console
from rich.table import Table

from lightning_mnp.data import CIFAR10DataModule, ImageDataset
from lightning_mnp.models import Classifier

IMAGES, BATCH_SIZE = 50_000, 128
STEPS = math.ceil(IMAGES / BATCH_SIZE)
MOST_TIME, MOST_SHARE = 0.8, 0.05


@dataclass(frozen=True)
class Way:
    """One way of training.

    Attributes:
        on_device: Whether whole batches are cut out of one tensor.
        channels_last: Whether the network's memory format has the channels innermost.
    """

    on_device: bool
    channels_last: bool


# The first is what others are compared with: the defaults before there was a choice.
WAYS = {
    "ordinary": Way(False, False),
    "ordinary, channels last": Way(False, True),
    "whole batches": Way(True, False),
    "whole batches, channels last": Way(True, True),
}


@dataclass(frozen=True)
class Case:
    """A network, and how much of its training is measured.

    Attributes:
        width: Channels of the first stage of the ResNet-18.
        batches: Batches of each turn.
        repeats: Number of repetitions.
        ways: Names of the ways.
    """

    width: int
    batches: int
    repeats: int
    ways: tuple[str, ...]


CASES = {
    "thin": Case(16, 5, 6, tuple(WAYS)),
    "full": Case(64, 1, 2, ("ordinary", "whole batches, channels last")),
}


CLOCKS = {"clock": time.perf_counter, "processor": time.process_time}


class Stopwatch(Profiler):
    """Note when the training asks for a batch, gets it, and is done with it, by both clocks."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[list[float]] = []
        self.got: list[list[float]] = []
        self.done: list[list[float]] = []

    def start(self, action_name: str) -> None:
        """Note when a batch is asked for."""
        if action_name.endswith("train_dataloader_next"):
            self.asked.append([clock() for clock in CLOCKS.values()])

    def stop(self, action_name: str) -> None:
        """Note when it is there, and when its step has been made."""
        if action_name.endswith("train_dataloader_next"):
            self.got.append([clock() for clock in CLOCKS.values()])
        elif action_name == "run_training_batch":
            self.done.append([clock() for clock in CLOCKS.values()])

    def summary(self) -> str:
        """Return nothing: the lists are read instead."""
        return ""

    def figures(self) -> dict[str, tuple[float, float]]:
        """Return the seconds of a step and the loader's share by each clock, after the first."""
        found = {}
        for place, name in enumerate(CLOCKS):
            asked, got = ([each[place] for each in times[1:]] for times in (self.asked, self.got))
            spent = self.done[-1][place] - asked[0]
            found[name] = spent / len(asked), (sum(got) - sum(asked)) / spent
        return found


class Stored(CIFAR10DataModule):
    """CIFAR-10, read once for all ways."""

    def load(self, split: Any) -> ImageDataset:
        """Return the images of a split, in memory."""
        return _read(str(self.root), split)


@functools.cache
def _read(root: str, split: Any) -> ImageDataset:
    return CIFAR10DataModule(root).load(split).to_memory()


def train(data: Stored, way: Way, width: int, batches: int) -> dict[str, tuple[float, float]]:
    """Train some batches; return the seconds of a step and the loader's share by each clock."""
    seed_everything(0, verbose=False)
    stopwatch = Stopwatch()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_train_batches=batches + 1,  # the first warms up
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        profiler=stopwatch,
    )
    trainer.fit(Classifier(width=width, channels_last=way.channels_last), data)
    return stopwatch.figures()


def measure(case: Case, root: Path) -> dict[str, Any]:
    """Measure all ways of a case in turns; return the figures of each."""
    data = {
        name: Stored(root, batch_size=BATCH_SIZE, on_device=WAYS[name].on_device)
        for name in case.ways
    }
    turns: dict[str, list[dict[str, tuple[float, float]]]] = defaultdict(list)
    for turn in range(case.repeats):
        for place in range(len(case.ways)):
            name = case.ways[(place + turn) % len(case.ways)]
            turns[name].append(train(data[name], WAYS[name], case.width, case.batches))
            step, share = turns[name][-1]["clock"]
            print(f"  {name}: {1000 * step:.0f} ms a step, {share:.1%} waiting", flush=True)
    return {
        name: {clock: _figures(turns[name], turns[case.ways[0]], clock) for clock in CLOCKS}
        for name in case.ways
    }


def _figures(own: list[Any], first: list[Any], clock: str) -> dict[str, Any]:
    seconds = [turn[clock][0] for turn in own]
    shares = [turn[clock][1] for turn in own]
    ratios = [step / turn[clock][0] for step, turn in zip(seconds, first, strict=True)]
    return {
        "epoch_seconds": round(STEPS * statistics.median(seconds), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "loader_share": round(statistics.median(shares), 4),
        "loader_shares": [round(share, 4) for share in shares],
    }


def table(name: str, case: Case, figures: dict[str, Any]) -> Table:
    """Return the figures of a case as a table; epochs are extrapolated."""
    result = Table(title=f"{name} ResNet-18, {case.width} channels, {case.batches} steps a turn")
    for column in ("way", *(f"{clock}: epoch, ratio, loader" for clock in CLOCKS)):
        result.add_column(column)
    for way, row in figures.items():
        cells = [
            f"{each['epoch_seconds']:.0f} s, {each['ratio']:.2f}, {each['loader_share']:.2%}"
            for each in row.values()
        ]
        result.add_row(way, *cells)
    return result


def main() -> None:
    """Measure, print the tables, and keep the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("~/data/cifar10"), help="CIFAR-10")
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, help="without it, as many as each case has")
    parser.add_argument("--batches", type=int, help="of each turn; likewise")
    parser.add_argument("--out", type=Path, help="file for the figures, JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    found: dict[str, Any] = {
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "threads": options.threads,
        "goal": {"ratio": MOST_TIME, "loader_share": MOST_SHARE},
    }
    console = Console(width=100)
    for name in options.only:
        case = CASES[name]
        case = Case(
            case.width,
            options.batches or case.batches,
            options.repeats or case.repeats,
            case.ways,
        )
        print(f"{name}:", flush=True)
        figures = measure(case, options.data.expanduser())
        found[name] = {"batches": case.batches, "repeats": case.repeats, "ways": figures}
        console.print(table(name, case, figures))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

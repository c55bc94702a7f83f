"""Every door in the processes of `strategy="ddp"`; started by test_distributed.py.

python tests/distributed_script.py <number of processes> <what> <folder>
"""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import loader_script
import torch
from helpers import UserModule, images_and_labels, quick_config, quiet_trainer
from metric_cases import METRICS, feed, samples
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import lightning_mnp
from lightning_mnp import DefenseReport, MNPCallback, MNPDefense, MNPModule
from lightning_mnp.cli.command_line import main
from lightning_mnp.hosting.processes import process_count, process_rank

CONFIG = quick_config(verdict="ratio", amount=3)


def small_network(synchronized: bool = False) -> nn.Module:
    """A small network that knows the task, the same each time."""
    network = _new_network(synchronized)
    network.load_state_dict(_trained_weights())
    return network.eval()


def _new_network(synchronized: bool) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        norm = nn.SyncBatchNorm if synchronized else nn.BatchNorm2d
        return nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), norm(8), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 12, 3, padding=1), norm(12), nn.ReLU(), nn.Flatten()),
            nn.Linear(192, 4),
        )


@functools.cache  # many tests want this network
def _trained_weights() -> dict[str, Tensor]:
    network = _new_network(False)
    images, labels = images_and_labels(64, seed=1)
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
    return network.state_dict()


def still(network: nn.Module) -> UserModule:
    """A training that changes nothing, so that all doors get one network."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.0
    return UserModule(network.train(), lr=0.0)


class Shards:
    """A loader that shards by itself: one image, no image, all the others."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = images_and_labels()
        bounds = [0, 1, *[1] * (process_count() - 2), len(images)]
        first, last = bounds[process_rank()], bounds[process_rank() + 1]
        if last > first:
            yield images[first:last], labels[first:last]


def data(batch_size: int = 10, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*images_and_labels()), batch_size, **options)


@contextmanager
def masks_kept() -> Iterator[list[Tensor]]:
    """Keep the masks of all filters; a report has those of the pruned ones only."""
    report, kept = MNPDefense.report, []

    def keep(defense: MNPDefense) -> DefenseReport:
        kept.append(defense.case.scores.clone())
        return report(defense)

    MNPDefense.report = keep  # type: ignore[method-assign]
    try:
        yield kept
    finally:
        MNPDefense.report = report  # type: ignore[method-assign]


def outcome(report: DefenseReport, network: nn.Module, masks: list[Tensor]) -> dict[str, Any]:
    """What has to be the same in all processes, as tensors and primitives."""
    return {
        "verdict": report.verdict,
        "ratio": report.detection_ratio,
        "pruned": [[name.removeprefix("net."), index] for name, index in report.pruned],
        "scores": torch.tensor(report.pruning.scores),
        "masks": masks[-1],
        "images": report.defense_set and report.defense_set.images,
        "weights": {
            name: tensor
            for name, tensor in network.state_dict().items()
            if "num_batches_tracked" not in name
        },
    }


def through_callback(processes: int, folder: Path) -> dict[str, Any]:
    module = still(small_network())
    callback = MNPCallback("always", Shards(), CONFIG, output_dir=folder / "callback")
    trainer = quiet_trainer(strategy="ddp", devices=processes, callbacks=[callback])
    with masks_kept() as masks:
        trainer.fit(module, data())
    assert callback.report is not None
    trained = small_network()  # the network in memory is still this one, in every process
    for name, tensor in module.net.named_parameters():
        assert torch.equal(tensor, trained.get_parameter(name)), name
    assert callback.purified_path is not None
    lightning_mnp.load_into(trained, lightning_mnp.read_state_dict(callback.purified_path))
    return outcome(callback.report, trained, masks)


def through_module(processes: int, folder: Path) -> dict[str, Any]:
    module = MNPModule(small_network(), CONFIG, output_dir=folder / "module")
    trainer = quiet_trainer(strategy="ddp", devices=processes, max_epochs=-1)
    with masks_kept() as masks:
        trainer.fit(module, data(9, shuffle=True))
    assert module.report is not None
    return outcome(module.report, module.network, masks)


def through_function(folder: Path, network: nn.Module, **options: Any) -> dict[str, Any]:
    with masks_kept() as masks:
        report = lightning_mnp.defend(
            network, when="always", config=CONFIG, state_file=folder / "progress.pt", **options
        )
    assert report.model is not None
    return outcome(report, report.model, masks)


def command(processes: int, folder: Path) -> list[str]:
    """A defense by the command line; the weights have to be in the folder."""
    quiet = ("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary")
    return [
        *("defend", "--model=lightning_mnp.models.Classifier", "--model.width=2"),
        *("--model.in_channels=1", "--data=lightning_mnp.data.DigitsDataModule"),
        *("--data.defense_size=20", "--mnp.suppression.runs=1", "--mnp.suppression.epochs=1"),
        *(
            "--mnp.masks.epochs=1",
            "--mnp.pruning.rule=count",
            "--mnp.pruning.amount=3",
            "--mnp.verdict.rule=ratio",
        ),
        *("--trainer.accelerator=cpu", *[f"--trainer.{option}=false" for option in quiet]),
        *("--trainer.strategy=ddp", f"--trainer.devices={processes}", "--when=always"),
        f"--ckpt_path={folder / 'suspicious.pt'}",
        f"--output={folder / f'purified-{processes}.pt'}",
        f"--report={folder / f'report-{processes}.json'}",
    ]


def all_doors(processes: int, folder: Path) -> None:
    outcomes = {
        "callback": through_callback(processes, folder),
        "module": through_module(processes, folder),
    }
    assert process_count() == processes
    sampler: DistributedSampler[Any] = DistributedSampler(TensorDataset(*images_and_labels()))
    outcomes["sampler"] = through_function(folder, small_network(), loader=data(sampler=sampler))
    together = lightning_mnp.DefenseSet.from_loader(Shards(), gather=True)
    outcomes["gathered"] = through_function(folder, small_network(), loader=together)
    outcomes["synchronized"] = through_function(folder, small_network(True), loader=data())
    if process_rank() == 0:  # the others do not wait for it, nor it for them
        outcomes["one alone"] = through_function(folder, small_network(True), loader=data())
    code = main(command(processes, folder))
    assert code in (0, 3, 4), code
    errors = {"broken": broken(), "parted": parted(processes, folder)}
    stored = outcomes, errors, metrics(processes)
    torch.save(stored, folder / f"outcomes-{process_rank()}.pt")
    if processes == 2:
        loader_script.main(folder / "loader")
    # The first process, which has started the others, ends without a word.
    one_dies(0, processes, folder / "dying")


def metrics(processes: int) -> dict[str, float]:
    """What every metric computes of this process's share of the samples and the others'."""
    found = {}
    for name, (build, _) in METRICS.items():
        metric = build()
        feed(metric, tuple(part[process_rank() :: processes] for part in samples(name)), 4)
        found[name] = float(metric.compute())
    return found


def last_dies(processes: int, folder: Path) -> None:
    """The last process ends without a word."""
    one_dies(processes - 1, processes, folder)


def one_dies(rank: int, processes: int, folder: Path) -> None:
    """A process ends in the middle of the defense."""
    step = MNPDefense.step

    def step_or_die(defense: MNPDefense, *args: Any) -> dict[str, float]:
        if defense.phase == "masks" and process_rank() == rank:
            os._exit(7)
        return step(defense, *args)

    MNPDefense.step = step_or_die  # type: ignore[method-assign]
    through_callback(processes, folder)


def broken() -> str:
    """The last process cannot read its images: what all of them say."""

    class Broken(Shards):
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            if process_rank() == process_count() - 1:
                raise OSError("no such disk")
            yield from super().__iter__()

    try:
        lightning_mnp.DefenseSet.from_loader(Broken(), gather=True)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def parted(processes: int, folder: Path) -> str:
    """The last process takes a step more, as rounding might have it: what all of them say."""
    step = MNPDefense.step

    def step_twice(defense: MNPDefense, *args: Any) -> dict[str, float]:
        if defense.phase == "suppression" and process_rank() == processes - 1:
            step(defense, *args)
        return step(defense, *args)

    MNPDefense.step = step_twice  # type: ignore[method-assign]
    try:
        through_module(processes, folder / "parted")
    except RuntimeError as error:
        return str(error)
    finally:
        MNPDefense.step = step  # type: ignore[method-assign]
    return ""


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    what = {each.__name__: each for each in (all_doors, last_dies)}
    what[sys.argv[2]](int(sys.argv[1]), Path(sys.argv[3]))

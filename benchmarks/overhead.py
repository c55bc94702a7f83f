"""Measure what a defense costs beyond its passes through the network, in time and memory.

    python -m benchmarks.overhead
    python -m benchmarks.overhead --images 500 --epochs 20 --repeats 5

Time: the passes of a defense are recorded one by one (images, normalization, what the backward
pass differentiates by), and a bare PyTorch loop repeats exactly these, step by step in turns.
Memory: every tensor storage that an operation makes is followed from its birth to its end. The
model, the defense set, and one batch with its activations (the peak of a plain training step whose
gradients are dropped as they arrive) do not count; what remains is given in copies of the weights.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_mnp.config import MNPConfig
from lightning_mnp.defense_data.defense_set import DefenseSet
from lightning_mnp.engine.defense import MNPDefense
from lightning_mnp.engine.runner import run_defense
from lightning_mnp.models import cifar_resnet18
from lightning_mnp.report import DefenseReport
from lightning_mnp.surgery.forward import evaluating
from lightning_mnp.surgery.masked_network import MaskedNetwork

MOST_TIME, MOST_COPIES = 1.10, 2.0


@dataclass
class Pass:
    """One pass of a batch through the network.

    Attributes:
        images: Size of the batch.
        statistics: ``"batch"`` or ``"running"`` normalization.
        by: What the backward pass differentiates by: names of parameters, or ``"masks"`` or
            ``"images"``; empty where there is no backward pass.
    """

    images: int
    statistics: str
    by: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The kind of pass in a word or two."""
        if not self.by:
            return "forward"
        if self.by in (("masks",), ("images",)):
            return f"forward + backward to {self.by[0]}"
        every = any(not name.endswith(".weight") for name in self.by)
        return f"forward + backward to {'all' if every else 'filter'} weights"


@contextmanager
def recorded() -> Iterator[list[Pass]]:
    """Note every pass of every masked for the length of a context."""
    passes: list[Pass] = []
    call = MaskedNetwork.__call__

    def noted(masked: MaskedNetwork, images: Tensor, **options: Any) -> Tensor:
        logits = call(masked, images, **options)
        entry = Pass(len(images), options.get("statistics") or masked.statistics)
        passes.append(entry)
        tensors = {**(options.get("weights") or {}), "masks": options.get("masks")}
        tensors["images"] = images
        by = tuple(name for name, x in tensors.items() if x is not None and x.requires_grad)
        if logits.requires_grad:
            logits.register_hook(lambda _: setattr(entry, "by", by))  # only once it happens
        return logits

    with patch.object(MaskedNetwork, "__call__", noted):
        yield passes


class BareLoop:
    """Repeats recorded passes with nothing but the network, a loss and autograd.

    For each set of tensors that a pass differentiates by, there is a copy of the network in which
    only they require gradients. A pass by all weights ends with a step of SGD of length zero.
    Masks are no part of a bare network: such passes go back to the images instead.
    """

    def __init__(self, network: nn.Module, data: DefenseSet) -> None:
        self.network = network
        self.data = data
        self.modes: dict[tuple[str, ...], str] = {}
        self.networks: dict[tuple[str, ...], nn.Module] = {}
        self.optimizers: dict[tuple[str, ...], torch.optim.Optimizer] = {}

    def prepare(self, by: tuple[str, ...]) -> None:
        """Make the copy of the network for a kind of pass, where there is none yet."""
        if by in self.networks:
            return
        network = copy.deepcopy(self.network).requires_grad_(False)
        leaves = [p.requires_grad_() for name, p in network.named_parameters() if name in by]
        self.networks[by] = network
        if leaves:
            self.optimizers[by] = torch.optim.SGD(leaves, lr=0.0)

    def run(self, passes: list[Pass]) -> None:
        """Make some passes."""
        for entry in passes:
            network = self.networks[entry.by]
            if self.modes.get(entry.by) != entry.statistics:
                self.modes[entry.by] = entry.statistics
                for module in network.modules():
                    by_batch = entry.statistics == "batch"
                    module.training = by_batch and isinstance(module, _NormBase)
            self._pass(network, entry)

    def _pass(self, network: nn.Module, entry: Pass) -> None:
        images, labels = self.data.images[: entry.images], self.data.labels[: entry.images]
        if not entry.by:
            with torch.no_grad():
                network(images)
            return
        optimizer = self.optimizers.get(entry.by)
        if optimizer is None:
            images = images.detach().requires_grad_()
        loss = F.cross_entropy(network(images), labels)
        if optimizer is None:
            torch.autograd.grad(loss, images)
            return
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if entry.kind.endswith("all weights"):
            optimizer.step()


class Meter(TorchDispatchMode):
    """Adds up the storages that operations make while it is on, for as long as each lives.

    Storages of ``known`` tensors, which were there before, do not count.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.now: int = 0
        self.peak: int = 0
        self._refs: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or key in self._refs:
            return

        def gone(_: Any) -> None:
            del self._refs[key]
            self.now -= size

        self._refs[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def batch_memory(network: nn.Module, data: DefenseSet, size: int, by_batch: bool) -> int:
    """Peak of one batch and its activations through a training step, without the gradients."""
    network = copy.deepcopy(network).requires_grad_(True)
    for parameter in network.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    known = [*network.state_dict(keep_vars=True).values(), data.images, data.labels]
    with Meter(known) as meter, evaluating(network, (_NormBase,) if by_batch else ()):
        images, labels = data.images[:size].clone(), data.labels[:size].clone()
        F.cross_entropy(network(images), labels).backward()
        peak: int = meter.peak
    return peak


def defense_memory(network: nn.Module, data: DefenseSet, config: MNPConfig) -> dict[str, int]:
    """Peak of each phase of a defense, beyond the model and the defense set."""
    peaks: Counter[str] = Counter()
    known = [*network.state_dict(keep_vars=True).values(), data.images, data.labels]
    with Meter(known) as meter:

        def note(phase: str) -> None:
            peaks[phase] = max(peaks[phase], meter.peak)
            meter.peak = meter.now

        defense = MNPDefense(network, data, config, when="always")
        note("setup")
        run_defense(defense, observe=lambda _, phase, __: note(phase))
        defense.report().model = defense.purified()
        note("copy")
    return dict(peaks)


class Stopwatch:
    """Adds up, by name, wall time and this program's processor time, which no other counts in."""

    def __init__(self) -> None:
        self.times: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
        self.restart()

    def restart(self) -> None:
        """Count from now on."""
        self._started = _clocks()

    def stop(self, name: str) -> None:
        """Add the time since the last call of a method."""
        self.times[name] += _clocks() - self._started
        self.restart()

    @property
    def total(self) -> Tensor:
        """Sum over all names: seconds of wall time and of processor time."""
        return torch.stack(list(self.times.values())).sum(0)


def _clocks() -> Tensor:
    return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)


def timed_defense(
    network: nn.Module, data: DefenseSet, config: MNPConfig, bare: BareLoop
) -> tuple[Stopwatch, Stopwatch, list[Pass], DefenseReport]:
    """Do what `defend` does; after each of its steps, the bare loop makes the same passes.

    In turns as short as these, both are slowed down alike by whatever else the computer does.
    """
    made: list[Pass] = []
    loop, whole = Stopwatch(), Stopwatch()

    def follow(_: MNPDefense, phase: str, __: dict[str, float]) -> None:
        whole.stop(phase)
        for entry in passes:
            bare.prepare(entry.by)
        loop.restart()
        bare.run(passes)
        loop.stop(phase)
        made.extend(passes)
        passes.clear()
        whole.restart()

    with recorded() as passes:
        whole.restart()
        defense = MNPDefense(network, data, config, when="always")
        whole.stop("setup")
        run_defense(defense, observe=follow)
        report = defense.report()
        report.model = defense.purified()
        whole.stop("copy")
    return whole, loop, made, report


def measure_time(network: nn.Module, data: DefenseSet, config: MNPConfig, repeats: int) -> None:
    """Print how long a defense takes in units of a bare loop of the same passes."""
    bare = BareLoop(network, data)
    runs = []
    for repeat in range(repeats):
        whole, loop, made, report = timed_defense(network, data, config, bare)
        runs.append((whole, loop))
        if not repeat:
            print(f"  {report.verdict}, {len(report.pruned)} filters pruned; passes:")
            groups: dict[str, list[int]] = defaultdict(list)
            for entry in made:
                groups[f"{entry.kind}, {entry.statistics} statistics"].append(entry.images)
            for kind, sizes in sorted(groups.items()):
                print(f"    {len(sizes):5d} x {kind}, {sum(sizes)} images")
        print(
            f"  repeat {repeat + 1}: defend {whole.total[1]:.2f} s, bare loop {loop.total[1]:.2f} "
            f"s of processor time, ratio {whole.total[1] / loop.total[1]:.3f}",
            flush=True,
        )
    print("  seconds beyond the bare loop, median:", end="")
    for phase in runs[0][0].times:
        beyond = [float(whole.times[phase][1] - loop.times[phase][1]) for whole, loop in runs]
        base = statistics.median(float(loop.times[phase][1]) for _, loop in runs)
        print(f" {phase} {statistics.median(beyond):+.2f} on {base:.2f};", end="")
    print()
    for index, clock in enumerate(("wall", "processor")):
        ratios = [float(whole.total[index] / loop.total[index]) for whole, loop in runs]
        print(
            f"  {clock} time ratio: {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f}; at most {MOST_TIME:.2f} is the aim)"
        )


def measure_memory(network: nn.Module, data: DefenseSet, config: MNPConfig, largest: int) -> None:
    """Print the peak memory of a defense in copies of the weights."""
    weights = sum(p.untyped_storage().nbytes() for p in network.parameters())
    batch = batch_memory(network, data, largest, config.filters.statistics == "batch")
    peaks = defense_memory(network, data, config)
    print(
        f"  weights {weights / 2**20:.1f} MiB, a batch of {largest} with its activations "
        f"{batch / 2**20:.1f} MiB, defense set {data.images.nbytes / 2**20:.1f} MiB"
    )
    for phase, peak in peaks.items():
        print(f"    {phase}: peak {peak / 2**20:.1f} MiB")
    copies = (max(peaks.values()) - batch) / weights
    print(f"  weights copies: {copies:.2f} (at most {MOST_COPIES:.0f} is the aim)", flush=True)


def load(options: argparse.Namespace) -> tuple[nn.Module, DefenseSet]:
    """Make a network that knows nothing, and noise."""
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    images = torch.randn(options.images, 3, 32, 32, generator=generator)
    data = DefenseSet(images, torch.arange(options.images) % 10)
    return cifar_resnet18(width=options.width).eval(), data


def main() -> None:
    """Measure the default options and those of the paper."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=16, help="width of the network")
    parser.add_argument("--images", type=int, default=200, help="size of the defense set")
    parser.add_argument("--epochs", type=int, default=5, help="most passes of each stage")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each loop, in turns")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument("--seed", type=int, default=0, help="of data and defense")
    parser.add_argument("--only", choices=["time", "memory"], help="measure one of them")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    network, data = load(options)
    print(f"{type(network).__name__}, {data}, {options.threads} threads, torch {torch.__version__}")
    epochs = {"suppression.epochs": options.epochs, "masks.epochs": options.epochs}
    for name, config in (
        ("default", MNPConfig(seed=options.seed).changed(epochs)),
        ("paper", MNPConfig.paper(epochs, seed=options.seed)),
    ):
        largest = math.ceil(len(data) / data.passes(config.batch_size))
        print(f"{name}:", flush=True)
        if options.only != "memory":
            measure_time(network, data, config, options.repeats)
        if options.only != "time":
            measure_memory(network, data, config, largest)


if __name__ == "__main__":
    main()

"""Defend every network of a matrix, check what comes out, and write the table of the documentation.

    python -m benchmarks.matrix
    python -m benchmarks.matrix --only "timm/*" --out runs/matrix
    python -m benchmarks.matrix --page docs/reference/any-cnn.md

Each network runs in a process of its own, forked where everything is imported, so that the peak
memory is its own. Its line is kept as JSON: the command goes on where it stopped. Weights are
fresh, images are noise: what is looked at is whether every step works, and what it costs.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import importlib
import json
import multiprocessing
import re
import resource
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from benchmarks.architectures import MATRIX, Entry
from lightning_mnp.benchmark.machine import processor_name
from lightning_mnp.checkpoints.load import load_into
from lightning_mnp.checkpoints.read import read_state_dict
from lightning_mnp.checkpoints.write import write_state_dict
from lightning_mnp.config import (
    MaskOptions,
    MNPConfig,
    PruningOptions,
    SuppressionOptions,
    VerdictOptions,
)
from lightning_mnp.defense_data.defense_set import DefenseSet
from lightning_mnp.engine.defense import MNPDefense
from lightning_mnp.mnp.thresholds import pruned_count
from lightning_mnp.surgery.forward import call_network, evaluating
from lightning_mnp.surgery.layers import FilterLayers
from lightning_mnp.surgery.masks import FilterMasks

SEED = 0
IMAGES = 8
# Few and short steps: on fresh weights and noise, gradients of deep networks are long.
BUDGET = MNPConfig(
    seed=SEED,
    batch_size=8,
    augment="none",
    suppression=SuppressionOptions(lr=0.0005, epochs=1, stop_accuracy=None),
    masks=MaskOptions(epochs=1),
    pruning=PruningOptions(rule="share", amount=0.02, reaudit=False),
    verdict=VerdictOptions(rule="ratio"),
)


@dataclass
class Line:
    """What was found out about one network.

    Attributes:
        name: Name in the matrix.
        shape: Shape of an image.
        classes: Number of classes.
        parameters: Number of parameters.
        layers: Number of convolutions with filters to prune.
        behind_norm: Those of them whose mask acts behind a normalization layer.
        skipped: Number of convolutions left alone.
        filters: Number of filters.
        pruned: Number of filters that were pruned.
        seconds: Processor time of the defense.
        peak_mib: Peak memory of the process until the end of the defense.
        import_mib: Peak memory of the process before the network was built, by imports alone.
        difference: Largest difference of a logit between the network with masks attached and the
            network with them baked in, both in float64, as a share of the largest logit.
        reload: Whether the pruned network, saved as safetensors and loaded strictly into a fresh
            network, gives the same logits bit for bit.
        machine: Processor, threads and versions of packages.
    """

    name: str
    shape: list[int]
    classes: int
    parameters: int
    layers: int
    behind_norm: int
    skipped: int
    filters: int
    pruned: int
    seconds: float
    peak_mib: float
    import_mib: float
    difference: float
    reload: bool
    machine: str


def defense_set(entry: Entry, images: int = IMAGES, small: bool = False) -> DefenseSet:
    """Make noise with labels, as many of each class as there is room for."""
    generator = torch.Generator().manual_seed(SEED)
    shape = entry.small_shape if small else entry.shape
    noise = torch.randn(images, *shape, generator=generator)
    return DefenseSet(noise, torch.arange(images) % entry.classes)


def settled(network: nn.Module, images: Tensor) -> nn.Module:
    """Set the statistics of batch normalization to those of some images, as training would."""
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with evaluating(network, (nn.modules.batchnorm._BatchNorm,)), torch.no_grad():
        network(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return network.eval()


def machine(package: str) -> str:
    """Name the processor, the number of threads and the versions that matter."""
    packages = [f"{name} {version(name)}" for name in ("torch", package)]
    return f"{processor_name()}, threads: {torch.get_num_threads()}, {', '.join(packages)}"


def peak_mib() -> float:
    """Peak memory of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak) / (2**20 if sys.platform == "darwin" else 2**10)


def examine(
    entry: Entry,
    config: MNPConfig = BUDGET,
    images: int = IMAGES,
    small: bool = False,
) -> Line:
    """Take a network through a defense and check every step.

    Args:
        entry: The network.
        config: Options of the defense, with a rule that ranks by the masks.
        images: Size of the defense set.
        small: Whether to take the thin version of the network.

    Returns:
        The network's line.

    Raises:
        AssertionError: If a step does not do what it promises.
    """
    build = entry.small if small else entry.full
    imports = peak_mib()
    torch.manual_seed(SEED)
    data = defense_set(entry, images, small)
    network = settled(build(), data.images)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    started = time.process_time()
    defense = MNPDefense(network, data, config, when="always")
    while not defense.finished:
        defense.step()
    purified = defense.purified()
    report = defense.report()
    seconds = time.process_time() - started
    peak = peak_mib()
    after = network.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    # The last filter of a layer stays, which small networks are told.
    warnings = [text for text in report.warnings if not text.startswith("one filter stays")]
    assert not warnings, warnings
    assert report.runs[0].steps > 0, report.runs[0].stopped
    assert len(report.pruned) == round(config.pruning.amount * report.filters) > 0
    worst = float(defense.case.scores[defense.purification.changes.removed].max())
    assert pruned_count(defense.case.scores, "threshold", worst) >= len(report.pruned)
    probe = data.images[:2]
    check_attaching(network, defense.case.layers, probe)
    check_pruned(network, purified, defense, probe)
    return Line(
        name=entry.name,
        shape=list(data.images.shape[1:]),
        classes=entry.classes,
        parameters=sum(p.numel() for p in network.parameters()),
        layers=len(report.layers),
        behind_norm=sum(layer["site"] != layer["name"] for layer in report.layers),
        skipped=len(report.skipped),
        filters=report.filters,
        pruned=len(report.pruned),
        seconds=seconds,
        peak_mib=peak,
        import_mib=imports,
        difference=baked_difference(network, defense.case.layers, probe),
        reload=reloads(purified, build(), probe),
        machine=machine(entry.needs),
    )


@torch.no_grad()
def check_attaching(network: nn.Module, layers: FilterLayers, images: Tensor) -> None:
    """Check that attached masks act, and that nothing is left of them when removed."""
    plain = call_network(network, images)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with FilterMasks(network, layers, torch.full((layers.total,), 0.5)):
        masked = call_network(network, images)
    assert not torch.equal(masked, plain)
    assert torch.equal(call_network(network, images), plain)
    after = network.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())
    for module in network.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@torch.no_grad()
def check_pruned(
    network: nn.Module, purified: nn.Module, defense: MNPDefense, images: Tensor
) -> None:
    """Check that the pruned network computes what zeros as masks and the repair make of it."""
    masks = torch.ones(defense.case.layers.total)
    masks[defense.purification.changes.removed] = 0.0
    with FilterMasks(network, defense.case.layers, masks):
        masked = call_network(network, images)
    if defense.purification.changes.shift is not None:
        masked = masked + defense.purification.changes.shift.values
    torch.testing.assert_close(call_network(purified, images), masked, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def baked_difference(network: nn.Module, layers: FilterLayers, images: Tensor) -> float:
    """Compare masks from 0 to 2 attached and baked in, in float64; see :class:`Line`."""
    network, images = copy.deepcopy(network).double(), images.double()
    masks = 2 * torch.rand(layers.total, generator=torch.Generator().manual_seed(SEED)).double()
    masks[::10] = 0.0
    for layer, part in zip(layers, masks.split(layers.sizes), strict=True):
        if layer.site == layer.name and not layer.scale:
            part.round_().clamp_(max=1.0)  # standardized weights take nothing between
    with FilterMasks(network, layers, masks):
        masked = call_network(network, images)
    FilterMasks(network, layers, masks).bake()
    return float((call_network(network, images) - masked).abs().max() / masked.abs().max())


@torch.no_grad()
def reloads(purified: nn.Module, fresh: nn.Module, images: Tensor) -> bool:
    """Save a network, load it strictly into a fresh one, and compare their logits."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "purified.safetensors")
        write_state_dict(path, purified.state_dict())
        load_into(fresh, read_state_dict(path))
    return torch.equal(call_network(fresh.eval(), images), call_network(purified, images))


def file_name(name: str) -> str:
    """Name the file of a network's line."""
    return re.sub(r"[^\w.-]+", "-", name) + ".json"


def run_one(name: str, folder: Path) -> None:
    """Examine one network in this process and write its line, whole or not at all."""
    torch.set_num_threads(1)
    line = examine(MATRIX[name])
    partial = folder / f".{file_name(name)}"
    partial.write_text(json.dumps(asdict(line), indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / file_name(name))


def run_apart(name: str, folder: Path) -> bool:
    """Examine one network in a process of its own; tell whether that went well."""
    process = multiprocessing.get_context("fork").Process(target=run_one, args=(name, folder))
    process.start()
    process.join()
    return process.exitcode == 0


def read_lines(folder: Path) -> list[Line]:
    """Read the lines that are there, in the order of the matrix."""
    paths = [folder / file_name(name) for name in MATRIX]
    return [Line(**json.loads(path.read_text("utf-8"))) for path in paths if path.exists()]


def table(lines: list[Line]) -> str:
    """Write lines as a Markdown table."""
    rows = [
        "| network | image | classes | parameters | layers, behind a norm, left alone | filters | "
        "seconds | peak MiB | baked - masked | strict reload |",
        "| --- | --- | --: | --: | --: | --: | --: | --: | --: | --- |",
    ]
    rows += [
        f"| {line.name} | {' x '.join(map(str, line.shape))} | {line.classes:,} | "
        f"{line.parameters:,} | {line.layers}, {line.behind_norm}, {line.skipped} | "
        f"{line.filters:,} | {line.seconds:.1f} | {line.peak_mib:,.0f} | {line.difference:.0e} | "
        f"{'equal' if line.reload else 'DIFFERENT'} |"
        for line in lines
    ]
    return "\n".join(rows)


def write_page(page: Path, lines: list[Line]) -> None:
    """Put the table between the marks of a Markdown page, and say which networks have no line."""
    text = page.read_text("utf-8")
    start, end = "<!-- table -->\n", "\n<!-- end of the table -->"
    if start not in text or end not in text:
        raise ValueError(f"Expected {page} to hold the marks {start!r} and {end!r}.")
    before, after = text.split(start)[0], text.split(end)[1]
    content = table(lines)
    left = [f"`{name}`" for name in MATRIX if name not in {line.name for line in lines}]
    if left:
        content += f"\n\nNot measured yet: {', '.join(left)}."
    page.write_text(f"{before}{start}\n{content}\n{end}{after}", encoding="utf-8")


def main() -> None:
    """Examine every network that has no line yet, and show the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/matrix"), help="where lines go")
    parser.add_argument("--only", default="*", help="name pattern of the networks to examine")
    parser.add_argument("--page", type=Path, help="Markdown page to put the table into")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    names = fnmatch.filter(MATRIX, options.only)
    missing = [name for name in names if not (options.out / file_name(name)).exists()]
    torch.set_num_threads(1)  # before any work: a process with threads does not fork well
    for package in sorted({MATRIX[name].needs for name in missing}):
        importlib.import_module(package)
    failed = []
    for name in missing:
        print(name, file=sys.stderr, flush=True)
        if not run_apart(name, options.out):
            failed.append(name)
    lines = read_lines(options.out)
    print(table(lines))
    for machine in sorted({line.machine for line in lines}):
        print(machine)
    if options.page:
        write_page(options.page, lines)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

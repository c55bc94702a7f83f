"""`lightning-mnp scan`, from its options to its exit code."""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_mnp.api import audit, defend
from lightning_mnp.checkpoints.atomic_write import OutputError, check_writable
from lightning_mnp.checkpoints.load import PrefixMatch, load_into
from lightning_mnp.checkpoints.printable import printable
from lightning_mnp.checkpoints.read import read_weights
from lightning_mnp.checkpoints.state_dict import check_finite
from lightning_mnp.checkpoints.write import check_output, write_state_dict
from lightning_mnp.cli.scan.architecture import Architecture, find_architecture
from lightning_mnp.cli.scan.images import (
    common_side,
    draw,
    find_classes,
    list_images,
    read_images,
)
from lightning_mnp.cli.scan.options import ScanOptions
from lightning_mnp.cli.scan.preparation import Preparation, find_preparation
from lightning_mnp.cli.scan.source import find_weights
from lightning_mnp.config import MNPConfig
from lightning_mnp.defense_data.defense_set import DefenseSet
from lightning_mnp.report import EXIT_CODES, DefenseReport, WeightsFile
from lightning_mnp.report.report import is_report
from lightning_mnp.report.text import text, wants_color
from lightning_mnp.reporting import sarif
from lightning_mnp.reporting.files import save_report
from lightning_mnp.surgery.forward import call_network, evaluating
from lightning_mnp.surgery.network import check_network

__all__ = ["main", "scan"]

_WRONG_USE, _INTERRUPTED = 2, 130
_WORST_FIRST = (3, 2, 4, 0)  # what several files come to: the first code that one of them has
_WRONG_INPUT = (ValueError, TypeError, OSError, ImportError, torch.OutOfMemoryError)
_PART = 64  # images in a batch for predictions
_REPORTS = ("report.html", "report.json")


def main(options: ScanOptions) -> int:
    """Scan one weights file or several, print the outcome, and return the exit code.

    Args:
        options: What the command was asked for. With several files, the reports of each go to a
            folder of its own below ``out``.

    Returns:
        0 for a clean network, 3 for a backdoored one, 4 if it stays undecided, 2 for wrong use or
        input that was refused, 130 after Ctrl-C. With several files, 3 comes first, then 2, then 4.
    """
    try:
        codes = []
        for each in _one_by_one(options):
            if options.others:
                print(f"\n{printable(each.weights)}:", flush=True)
            codes.append(_scanned(each))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    return next(code for code in _WORST_FIRST if code in codes)


def _one_by_one(options: ScanOptions) -> list[ScanOptions]:
    """Return the options for each file, with a folder for its reports that is named like it."""
    if not options.others:
        return [options]
    files = (options.weights, *options.others)
    folders = _folders(files, options.out)
    return [
        replace(options, weights=file, others=(), out=options.out / folder)
        for file, folder in zip(files, folders, strict=True)
    ]


def _folders(files: Sequence[str], out: Path) -> list[str]:
    """Return a name for the reports of each file: its own, or one like it that nobody else has."""
    wanted = [_folder(file, out) for file in files]
    given: list[str] = []
    for name in wanted:
        if name in given:  # two files can come to one name, and a number to that of a third
            numbered = (f"{name}-{number}" for number in itertools.count(1))
            taken = {*wanted, *given}
            name = next(n for n in numbered if n not in taken and not (out / n).is_file())
        given.append(name)
    return given


def _folder(file: str, out: Path) -> str:
    name = re.sub(r"[^\w.-]+", "-", file).strip("-.")
    while (out / name).is_file():  # a weights file in the folder of the reports is named so itself
        name = f"{name}-report"
    return name


def _scanned(options: ScanOptions) -> int:
    """Scan one file and return the exit code.

    It is about the file that came in, whatever became of a purified copy.
    """
    try:
        return EXIT_CODES[scan(options).verdict]
    except Exception as error:
        if os.environ.get("LIGHTNING_MNP_DEBUG"):
            raise
        told = f"error: {error}"
        if not isinstance(error, _WRONG_INPUT):  # so that other files are scanned all the same
            told = f"{traceback.format_exc()}{told}"
        for line in told.splitlines():  # which may hold names from the file
            print(printable(line, 10_000), file=sys.stderr)
        return _WRONG_USE


def scan(options: ScanOptions, config: MNPConfig | None = None) -> DefenseReport:
    """Scan a weights file: read it, find its network, audit that, and write the reports.

    Args:
        options: What was asked for.
        config: Options of the method.

    Returns:
        The report, which is written and printed as well.

    Raises:
        ValueError: If file, images and options do not fit each other, or the file is refused.
        OutputError: If a report can't be written.
        ImportError: If a library that is needed is not installed.
    """
    _check_places(options)
    source = find_weights(options.weights)
    weights = read_weights(source.path, key=options.key, argument="WEIGHTS")
    check_finite(weights.tensors)
    architecture = find_architecture(options.arch, weights, source, options.classes)
    network = architecture.network.eval().to(options.device)
    match = load_into(network, weights.tensors)
    if options.purify is not None:
        check_output(options.purify, network.state_dict(), "--purify")

    channels = _channels(network)
    preparation = find_preparation(options, weights.facts, source, architecture, channels)
    paths = list_images(options.images)
    classes = options.classes or _classes(network, paths[: options.count], preparation, channels)
    found = find_classes(paths, options.images, options.labels, classes, architecture.class_names)
    chosen = draw(found, options.count, options.seed)
    size = preparation.size or common_side(chosen.paths) or preparation.usual_size
    images = preparation.normalize(read_images(chosen.paths, size, channels))
    labels = chosen.labels if chosen.labels is not None else _predicted(network, images)

    data = DefenseSet(images, torch.as_tensor(labels))
    if options.format == "text":  # it may take minutes: say at once what was understood
        shown = f"{len(data)} images of {size} x {size} pixels, {classes} classes"
        print(f"Scanning {printable(architecture.name)}: {shown}", file=sys.stderr)
    progress = options.format == "text" and sys.stdout.isatty()
    purifies = options.purify is not None
    report = (
        defend(network, data, seed=options.seed, config=config, progress=progress)
        if purifies
        else audit(network, data, seed=options.seed, config=config, progress=progress)
    )
    report.class_names = found.class_names
    report.weights_file = WeightsFile.of(source.path)
    if "://" in options.weights:
        report.weights_file = replace(report.weights_file, name=options.weights)
    notes = _notes(architecture, preparation, size)
    report.warnings = [*notes, *weights.warnings(), *found.notes, *report.warnings]
    for name in _REPORTS:
        save_report(report, options.out / name, argument="--out")
    if options.purify is not None and report.model is not None and report.verdict == "backdoored":
        _write_weights(report, options.purify, match)
    _print(report, options)
    return report


def _check_places(options: ScanOptions) -> None:
    """Check where work is to be done and files are to be written, before anything is read."""
    _check_device(options.device)
    paths = [options.out / name for name in _REPORTS]
    for path in paths:
        check_writable(path, "--out")
    there = [printable(str(path)) for path in paths if path.exists()]
    if there and not is_report(options.out / "report.json"):
        raise OutputError(
            f"Expected `--out` to be a folder without reports of other programs, but it holds "
            f"{' and '.join(there)}. Nothing of theirs is overwritten: name another folder, or "
            "move the files away."
        )
    if options.purify is not None:
        check_output(options.purify, {}, "--purify")


def _check_device(name: str) -> None:
    """Check that PyTorch knows a device, and that it is there."""
    try:
        torch.ones(1, device=torch.device(name)).item()  # also fails on `meta`, which holds nothing
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError, ImportError) as error:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise ValueError(
            f"Expected `--device` to be a device that is there, such as cpu or cuda, but got "
            f"{printable(name)!r}, and PyTorch finds {count or 'no'} GPU for cuda. Leave it out to "
            "use the CPU."
        ) from error


def _channels(network: nn.Module) -> int:
    """Return the number of channels of the images that a network takes."""
    first = next(
        (module for module in network.modules() if isinstance(module, nn.Conv2d)),
        None,
    )
    if first is None:
        raise ValueError(
            "Expected a network with convolutions, but it has none. Only CNNs can be audited."
        )
    return first.in_channels


def _classes(
    network: nn.Module, paths: Sequence[Path], preparation: Preparation, channels: int
) -> int:
    """Return the number of logits that a network returns.

    No layer tells it: the last one that is registered need not be the last one that is run.
    """
    side = preparation.size or common_side(paths) or preparation.usual_size
    return _checked(network, torch.zeros(2, channels, side, side))


def _checked(network: nn.Module, images: Tensor) -> int:
    """Check that a network can take images, and return its number of classes.

    The audit checks it, too, but later: it is told here in the same words.
    """
    device, side = next(network.parameters()).device, images.shape[-1]
    labels = torch.zeros(len(images), dtype=torch.long)
    try:
        return check_network(network, images.to(device), labels, call_network)
    except ValueError as error:
        raise ValueError(
            f"`--images`, read as {side} x {side} pixels (`--size` sets another side): {error}"
        ) from error


def _predicted(network: nn.Module, images: Tensor) -> list[int]:
    """Return the classes that a network predicts for images."""
    _checked(network, images[:2])
    device = next(network.parameters()).device
    with torch.no_grad(), evaluating(network):
        return [
            int(label)
            for part in images.split(_PART)
            for label in call_network(network, part.to(device)).argmax(1)
        ]


def _notes(architecture: Architecture, preparation: Preparation, size: int) -> list[str]:
    """Return how the network was found and the images prepared, if nobody has said it."""
    notes = []
    if architecture.how:
        notes.append(f"the architecture, {architecture.name}, was taken from {architecture.how}")
    origins = preparation.origins
    if preparation.assumed:
        notes.append(
            f"the normalization of the images is {origins['normalization']}: mean "
            f"{_row(preparation.mean)}, std {_row(preparation.std)}. If training had another, give "
            "--mean and --std"
        )
    if preparation.divided:
        notes.append(
            f"the normalization of the images, from {origins['normalization']}, is on the scale 0 "
            f"to 255 and was divided by 255: mean {_row(preparation.mean)}, std "
            f"{_row(preparation.std)}. If training had another, give --mean and --std"
        )
    if preparation.size is None:
        notes.append(f"the images have {size} x {size} pixels. If training had others, give --size")
    return notes


def _row(numbers: tuple[float, ...]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


def _write_weights(report: DefenseReport, path: Path, match: PrefixMatch) -> None:
    """Write the purified weights under the names that they have in the file."""
    assert report.model is not None
    tensors = {match.to_file(name): value for name, value in report.model.state_dict().items()}
    metadata = {"verdict": report.verdict, "pruned_filters": str(len(report.pruned))}
    write_state_dict(path, tensors, metadata, argument="--purify")


def _print(report: DefenseReport, options: ScanOptions) -> None:
    if options.format == "json":
        print(report.to_json())
    elif options.format == "sarif":
        assert report.weights_file is not None
        code, name = EXIT_CODES[report.verdict], report.weights_file.name
        print(json.dumps(sarif(report, artifact=name, exit_code=code), indent=2))
    else:
        print(text(report, color=wants_color(sys.stdout)))
        places = [printable(str(options.out / name)) for name in _REPORTS]
        if options.purify is not None:
            written = report.verdict == "backdoored"
            purified = printable(str(options.purify))
            print(f"Purified weights: {purified if written else 'none, since it is not flagged'}")
        print(f"Report: {places[0]}, {places[1]}")

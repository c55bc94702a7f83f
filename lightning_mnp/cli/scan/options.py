"""The options of `lightning-mnp scan`; reading them needs no PyTorch."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from lightning_mnp.cli.paths import expanded
from lightning_mnp.cli.words import WordsParser

__all__ = ["Format", "ScanOptions", "parse_options"]

Format = Literal["text", "json", "sarif"]

_USAGE = "lightning-mnp scan WEIGHTS... --images FOLDER [--arch NAME] [options]"
_DESCRIPTION = (
    "Judge whether the network in a weights file carries a backdoor. Nothing in the file is run. "
    "Exit codes: 0 clean, 3 backdoored, 4 undecided, 2 wrong use or refused input."
)


@dataclass(frozen=True)
class ScanOptions:
    """What the command was asked for; see the help of each option.

    Attributes:
        weights: The file, a folder, or ``hf://owner/name``.
        images: Folder of clean images.
        arch: Name of the architecture; None to find it from the file.
        labels: File with the images' classes.
        size: Side of the images in pixels.
        mean: Mean of each channel, on the scale [0, 1].
        std: Standard deviation of each channel, on the scale [0, 1].
        classes: Number of classes.
        key: Where in the file the weights are.
        count: Most images to use.
        seed: Seed of all that is drawn.
        device: Where the network runs.
        purify: File for the purified weights.
        out: Folder of the reports.
        format: What is printed.
        others: Further files, which are judged one after another.
    """

    weights: str
    images: Path
    arch: str | None = None
    labels: Path | None = None
    size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    classes: int | None = None
    key: str | None = None
    count: int = 500
    seed: int = 0
    device: str = "cpu"
    purify: Path | None = None
    out: Path = Path()
    format: Format = "text"
    others: tuple[str, ...] = ()


def parse_options(words: Sequence[str]) -> ScanOptions:
    """Read the words behind `lightning-mnp scan`.

    Args:
        words: The words.

    Raises:
        SystemExit: With code 2 if they are wrong, 0 after the help.

    Example:
        >>> parse_options(["model.pt", "--images", "clean", "--size", "64"]).size
        64
    """
    parser = WordsParser(
        prog="lightning-mnp scan", usage=_USAGE, description=_DESCRIPTION, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "weights",
        metavar="WEIGHTS",
        nargs="+",
        type=expanded,
        help=".pt, .pth, .ckpt or .safetensors; a folder with config.json; or hf://owner/name; "
        "several are judged one after another",
    )
    add(
        "--images",
        type=_path,
        metavar="FOLDER",
        help="clean images: in one folder for each class, or together, with or without --labels",
    )
    add(
        "--arch",
        metavar="NAME",
        help="torchvision/NAME, timm/NAME, hf/FOLDER or module:function; found from the file if "
        "not given",
    )
    add(
        "--labels", type=_path, metavar="FILE", help="lines `image,class`; else classes are guessed"
    )
    add("--size", type=_positive, metavar="N", help="side of the images in pixels")
    add("--mean", type=_numbers, metavar="A,B,C", help="mean of each channel, from 0 to 1")
    add("--std", type=_numbers, metavar="A,B,C", help="standard deviation of each channel")
    add("--classes", type=_positive, metavar="N", help="number of classes; else as the head has")
    add("--key", help="where in the file the weights are, such as `ema`")
    add("--count", type=_positive, default=500, metavar="N", help="most images to use (500)")
    add("--seed", type=int, default=0, metavar="N", help="seed of all that is drawn (0)")
    add("--device", default="cpu", help="cpu or cuda (cpu)")
    add("--purify", type=_path, metavar="FILE", help="write purified weights here, if flagged")
    add(
        "--out",
        type=_path,
        default=Path(),
        metavar="FOLDER",
        help="folder for report.html and report.json (this one)",
    )
    add("--format", choices=("text", "json", "sarif"), default="text", help="what to print (text)")
    shown = f"lightning-mnp {version('lightning-mnp')}"
    add("--version", action="version", version=shown, help="show the version and exit")
    found = vars(parser.parse_args(list(words)))
    if found["images"] is None:  # not argparse's business, which would not look at misspellings
        parser.error("expected --images FOLDER with clean images, but got none")
    if (found["mean"] is None) != (found["std"] is None):
        parser.error("expected --mean and --std together, but got only one of them")
    found["weights"], *others = dict.fromkeys(found["weights"])
    if others and (found["purify"] is not None or found["format"] != "text"):
        parser.error(
            "expected one file with --purify, --format json and --format sarif, but got "
            f"{len(others) + 1}; call the command for each of them"
        )
    return ScanOptions(**found, others=tuple(others))


def _path(word: str) -> Path:
    return Path(expanded(word))


def _positive(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, but got {word!r}")
    return int(word)


def _numbers(word: str) -> tuple[float, ...]:
    wrong = argparse.ArgumentTypeError(
        f"expected finite numbers with commas between them, such as 0.5,0.5,0.5, but got {word!r}"
    )
    try:
        numbers = tuple(float(part) for part in word.split(","))
    except ValueError as error:
        raise wrong from error
    if not all(map(math.isfinite, numbers)):
        raise wrong
    return numbers

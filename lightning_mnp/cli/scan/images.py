"""The clean images of a folder, and their classes: by folders, by a label file, or not known."""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from lightning_mnp.checkpoints.printable import printable
from lightning_mnp.defense_data.resizing import resize_and_crop

__all__ = ["FoundImages", "common_side", "draw", "find_classes", "list_images", "read_images"]

# What Pillow raises for files that are damaged, no images, or much too large.
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True)
class FoundImages:
    """Image files and their classes.

    Attributes:
        paths: The files.
        labels: Class of each of them; None if they are not known.
        class_names: Names of the classes; empty if they have none.
        notes: What the reader of the report should know.
    """

    paths: list[Path]
    labels: list[int] | None
    class_names: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def list_images(folder: Path) -> list[Path]:
    """List the images of a folder and of the folders in it.

    Args:
        folder: The folder.

    Returns:
        The files that end like images, in alphabetical order, without hidden ones and those in
        hidden folders, such as the copies that editors and notebooks keep.

    Raises:
        ValueError: If there is no such folder, or no image in it.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("L", (8, 8)).save(folder / "a.png")
        >>> [path.name for path in list_images(folder)]
        ['a.png']
    """
    if not folder.is_dir():
        raise ValueError(
            f"Expected argument `--images` to be a folder, but got {printable(str(folder))}. Check "
            f"the name; this is {printable(str(Path.cwd()))}."
        )
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMG_EXTENSIONS
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not paths:
        raise ValueError(
            f"Expected argument `--images` to be a folder with images, but "
            f"{printable(str(folder))} holds none that ends in one of {', '.join(IMG_EXTENSIONS)}."
        )
    return paths


def find_classes(
    paths: Sequence[Path],
    folder: Path,
    labels: Path | None,
    classes: int,
    class_names: Sequence[str] = (),
) -> FoundImages:
    """Find the classes of the images of a folder, if they are known.

    Args:
        paths: The images, as :func:`list_images` lists them.
        folder: Holds one folder for each class, or images.
        labels: File with lines ``image,class``, as spreadsheets write it, too, the image's path as
            seen from the folder, the class by number or name; None if the folders tell the classes,
            or nothing does.
        classes: Number of classes of the network.
        class_names: Names of its classes in their order, if they are known.

    Returns:
        The images. Class folders count in alphabetical order, as torchvision's ``ImageFolder`` has
        it, unless their names are those of ``class_names``, or numbers of classes.

    Raises:
        ValueError: If the classes do not fit the network.
    """
    if labels is not None:
        return _labeled_by_file(folder, paths, labels, classes, class_names)
    tops = sorted({path.relative_to(folder).parts[0] for path in paths if path.parent != folder})
    if len(tops) > 1 and all(path.parent != folder for path in paths):
        numbers, names = _numbers_of(tops, classes, class_names, f"folders in {folder}")
        by_folder = [numbers[path.relative_to(folder).parts[0]] for path in paths]
        return FoundImages(list(paths), by_folder, names)
    note = (
        "the images have no labels: the classes that the network predicts stand in for them. "
        "Whether it is right on them is not known"
    )
    return FoundImages(list(paths), None, list(class_names), [note])


def _numbers_of(
    found: Sequence[str], classes: int, class_names: Sequence[str], what: str
) -> tuple[dict[str, int], list[str]]:
    """Return the class number of each name that was found, and the names of all classes."""
    known = {name: number for number, name in enumerate(class_names)}
    if known and set(found) <= set(known):
        return known, list(class_names)
    numbers = {name: int(name) for name in found if name.isdecimal()}
    if len(set(numbers.values())) == len(found):
        if max(numbers.values()) < classes:
            return numbers, list(class_names)
        found = sorted(found, key=numbers.__getitem__)  # they begin with 1
    if len(found) == classes:
        return {name: number for number, name in enumerate(found)}, list(found)
    raise ValueError(
        f"Expected {classes} classes, as the network has, but there are {len(found)} "
        f"{printable(what)}: {', '.join(printable(name, 30) for name in found[:5])}, …. Name the "
        "folder whose folders are the classes, name the folders by the classes' numbers, or give "
        "--labels."
    )


def _labeled_by_file(
    folder: Path, paths: Sequence[Path], labels: Path, classes: int, class_names: Sequence[str]
) -> FoundImages:
    """Return images with the classes that a file has for them, without those that it lacks."""
    shown = printable(str(labels))
    try:
        lines = [line.strip() for line in labels.read_text("utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Expected argument `--labels` to be a text file with lines `image,class`, but {shown} "
            f"could not be read: {printable(str(error))}."
        ) from error
    there = {path.relative_to(folder).as_posix() for path in paths}
    told: dict[str, str] = {}
    for line in filter(None, lines):
        image, name = _cells(line, shown)
        if image not in there:  # it may be a path as Windows writes it
            image = Path(image.replace("\\", "/")).as_posix()
        told[image] = name
    kept = [path for path in paths if path.relative_to(folder).as_posix() in told]
    if not kept:
        raise ValueError(
            f"Expected `--labels` to name images in {printable(str(folder))}, but none of the "
            f"{len(told)} names in {shown} is there, such as {printable(next(iter(told), ''))!r}. "
            "Names are paths as seen from that folder."
        )
    by_path = [told[path.relative_to(folder).as_posix()] for path in kept]
    if all(name.isdecimal() and int(name) < classes for name in by_path):
        numbers, names = {name: int(name) for name in by_path}, list(class_names)
    else:
        numbers, names = _numbers_of(sorted(set(by_path)), classes, class_names, f"in {labels}")
    left = len(paths) - len(kept)
    notes = [f"{left} of {len(paths)} images have no label and were left out"] if left else []
    return FoundImages(kept, [numbers[name] for name in by_path], names, notes)


def _cells(line: str, shown: str) -> tuple[str, str]:
    """Return the path of the image and the class in a line of a label file."""
    # Where decimals have a comma, spreadsheets part cells by a semicolon.
    mark = next((mark for mark in (",", "\t", ";") if mark in line), ",")
    try:
        *parts, name = next(csv.reader([line], delimiter=mark))
    except csv.Error:
        parts = []
    if not parts:
        raise ValueError(
            f"Expected every line of `--labels` to be `image,class`, but {shown} has "
            f"{printable(line)!r}."
        )
    # A comma in a name need not be quoted.
    return Path(mark.join(parts).strip()).as_posix(), name.strip()


def draw(found: FoundImages, count: int, seed: int) -> FoundImages:
    """Draw images, as many of each class as there are, up to a number in all.

    Args:
        found: The images.
        count: The most to draw.
        seed: Seed of the draw.

    Returns:
        All images if they are not too many.

    Example:
        >>> found = FoundImages([Path(str(n)) for n in range(9)], [0, 0, 0, 0, 0, 0, 0, 1, 1])
        >>> sorted(draw(found, 4, seed=0).labels)
        [0, 0, 1, 1]
    """
    order = list(range(len(found.paths)))
    random.Random(seed).shuffle(order)
    seen: dict[int, int] = {}
    rank = {}
    for index in order:
        label = -1 if found.labels is None else found.labels[index]
        rank[index] = seen[label] = seen.get(label, 0) + 1
    chosen = sorted(sorted(order, key=rank.__getitem__)[:count])
    labels = None if found.labels is None else [found.labels[index] for index in chosen]
    paths = [found.paths[index] for index in chosen]
    return FoundImages(paths, labels, found.class_names, found.notes)


def common_side(paths: Sequence[Path]) -> int | None:
    """Return the side of images that are all squares of one size; None for others.

    Args:
        paths: The files.
    """
    sizes = set()
    for path in paths:
        with _opened(path) as image:
            sizes.add(image.size)
        if len(sizes) > 1 or image.width != image.height:
            return None
    side: int = sizes.pop()[0]
    return side


def read_images(paths: Sequence[Path], size: int, channels: int) -> Tensor:
    """Read images, scale them until the shorter side fits, and cut out the center square.

    Args:
        paths: The files.
        size: Side of the square in pixels.
        channels: 1 for gray, 3 for color.

    Returns:
        Shape (N, channels, size, size), uint8.

    Raises:
        ValueError: If a file can't be read, or images have neither 1 nor 3 channels.
    """
    if channels not in (1, 3):
        raise ValueError(
            f"Expected a network that takes images of 1 or 3 channels, but its first layer takes "
            f"{channels}. Audit it in Python, by `lightning_mnp.audit`."
        )
    read = []
    for path in paths:
        with _opened(path) as image:
            try:
                pixels = image.convert("L" if channels == 1 else "RGB")
            except _UNREADABLE as error:
                raise ValueError(_unreadable(path, error)) from error
        values = torch.frombuffer(bytearray(pixels.tobytes()), dtype=torch.uint8)
        shaped = values.reshape(pixels.height, pixels.width, channels).permute(2, 0, 1)
        read.append(resize_and_crop(shaped, size))
    return torch.stack(read)


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except _UNREADABLE as error:
        raise ValueError(_unreadable(path, error)) from error


def _unreadable(path: Path, error: Exception) -> str:
    return (
        f"Expected every file in `--images` that ends like one to be an image, but "
        f"{printable(str(path))} can't be read: {printable(str(error))}. Remove it."
    )

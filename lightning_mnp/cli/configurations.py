"""Configurations that come with the package: ``--config package:audit-cifar10``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_mnp.checkpoints.printable import printable
from lightning_mnp.cli.words import similar

__all__ = ["find_configuration", "with_found_configurations"]

_PREFIX = "package:"
_OPTIONS = ("--config", "-c", "--mnp")  # options that take a file of options
_PACKAGE = Path(__file__).parents[1]
# A wheel holds the files of `examples/`; in a checkout they lie beside the package.
_FOLDERS = (_PACKAGE / "examples", _PACKAGE.parent / "examples")


def find_configuration(name: str) -> Path:
    """Return the file of a configuration that comes with the package.

    Args:
        name: Path of the file in `examples/`, without its ending.

    Returns:
        The YAML file.

    Raises:
        ValueError: If there is none of that name.

    Example:
        >>> find_configuration("attacks/badnets").name
        'badnets.yaml'
    """
    folder = next((folder for folder in _FOLDERS if folder.is_dir()), _FOLDERS[0])
    known = {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in sorted(folder.rglob("*.yaml"))
    }
    if name not in known:
        raise ValueError(
            f"Expected `{_PREFIX}NAME` to name a configuration of the package, but got "
            f"{printable(_PREFIX + name, 200)!r}.{similar(name, known)}\n"
            f"There are: {', '.join(known)}."
        )
    return known[name]


def with_found_configurations(words: Sequence[str]) -> list[str]:
    """Return a command line with files in place of ``package:NAME``.

    Args:
        words: The words of the command line.

    Raises:
        ValueError: If there is no configuration of a name.

    Example:
        >>> found = with_found_configurations(["audit", "--config", "package:audit-digits"])
        >>> Path(found[2]).name
        'audit-digits.yaml'
    """
    found: list[str] = []
    for word in words:
        option, equals, value = word.partition("=")
        if equals and option in _OPTIONS and value.startswith(_PREFIX):
            word = f"{option}={find_configuration(value.removeprefix(_PREFIX))}"
        elif found and found[-1] in _OPTIONS and word.startswith(_PREFIX):
            word = str(find_configuration(word.removeprefix(_PREFIX)))
        found.append(word)
    return found

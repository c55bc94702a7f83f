"""Names that a user gives: of classes and files, and the known one that is nearest to another."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["file_digests", "file_words", "find_class", "nearest"]

_LONGEST = 150  # a file's name may have 255 bytes, with the parts around the words


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a sentence that suggests the known name nearest to an unknown one; "" if none is near.

    Args:
        name: The unknown name.
        known: The known ones.

    Example:
        >>> nearest("badnet", ["badnets", "blend"])
        " Did you mean 'badnets'?"
    """
    found = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {found[0]!r}?" if found else ""


def file_words(text: str) -> str:
    """Return a text as a part of a file's name: lower case, with dashes for what is no word.

    A long text is cut, and a digest of the whole stands in place of the rest.

    Args:
        text: Such as the label of a method.

    Example:
        >>> file_words("default (verdict.reference=/tmp/c.json)")
        'default-verdict.reference-tmp-c.json'
    """
    words = re.sub(r"[^a-z0-9.+-]+", "-", text.lower()).strip("-")
    if len(words) <= _LONGEST:
        return words
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{words[: _LONGEST - 9]}-{digest}"


def file_digests(options: Mapping[str, object]) -> dict[str, str]:
    """Return the SHA-256 of each file that an option names, by the name of the option.

    Args:
        options: Values by name; those that are no text, or no file that is there, are left out.

    Example:
        >>> file_digests({"ratio": 0.2, "image": "no-such-file.png"})
        {}
    """
    paths = {
        name: Path(os.path.expanduser(value))
        for name, value in options.items()
        if isinstance(value, str) and value
    }
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in paths.items()
        if path.is_file()
    }


def find_class(path: str) -> type[Any]:
    """Return the class of a dotted path.

    Args:
        path: Such as ``"lightning_mnp.attacks.BadNets"``.

    Raises:
        ValueError: If there is no such class.

    Example:
        >>> find_class("lightning_mnp.attacks.BadNets").__name__
        'BadNets'
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"Expected a `class_path` of a known class, but got {path!r}. Write it with its "
            "module, such as lightning_mnp.attacks.BadNets, and install the package that has it."
        ) from error
    if not isinstance(found, type):
        raise ValueError(
            f"Expected a `class_path` of a class, but {path!r} is a {type(found).__name__}. Name "
            "the class itself."
        )
    return found

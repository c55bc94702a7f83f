"""Names of classes, as data sets carry them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["find_class_names"]

_DEPTH = 10  # of data sets within data sets


def find_class_names(source: Any) -> tuple[str, ...]:
    """Find the names of the classes that a data loader or a data set knows.

    Args:
        source: A loader or a data set. Looked at are ``classes``, as torchvision's data sets have
            it, and ``class_names``, of the source and of each ``dataset`` within it.

    Returns:
        The names in the order of the labels; nothing if there are none.

    Example:
        >>> from types import SimpleNamespace
        >>> find_class_names(SimpleNamespace(dataset=SimpleNamespace(classes=["cat", "dog"])))
        ('cat', 'dog')
    """
    for _ in range(_DEPTH):
        for attribute in ("classes", "class_names"):
            names = getattr(source, attribute, None)
            listed = isinstance(names, Sequence) and not isinstance(names, str)
            if listed and names and all(isinstance(name, str) for name in names):
                return tuple(names)
        source = getattr(source, "dataset", None)
    return ()

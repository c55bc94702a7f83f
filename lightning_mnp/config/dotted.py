"""Options in groups as one row, by dotted names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["dotted"]


def dotted(options: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Return nested options by their dotted names, in their order.

    Args:
        options: Options; those that are mappings are groups.
        before: What stands in front of each name.

    Example:
        >>> dotted({"seed": 0, "masks": {"lr": 0.2, "epochs": 20}})
        {'seed': 0, 'masks.lr': 0.2, 'masks.epochs': 20}
    """
    found: dict[str, Any] = {}
    for name, value in options.items():
        full = f"{before}{name}"
        found.update(dotted(value, f"{full}.") if isinstance(value, Mapping) else {full: value})
    return found

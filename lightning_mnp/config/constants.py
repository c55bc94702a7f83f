"""Constants of the method, which a study may vary without patching private names."""

from __future__ import annotations

from dataclasses import asdict, is_dataclass
from typing import Any, TypeVar, cast

__all__ = ["Constants"]

Kind = TypeVar("Kind")


class Constants:
    """Constants of the method that are no options, but that a study may vary.

    Each module with constants keeps them in a frozen dataclass of its own. A study gives an
    instance with other values; for all others, the defaults hold.

    Args:
        given: Instances of such dataclasses, at most one of each.

    Raises:
        TypeError: If something else is given.
        ValueError: If there are two of a kind.

    Example:
        >>> from lightning_mnp.signals.patch import PatchConstants
        >>> constants = Constants(PatchConstants(counts_from=2.5))
        >>> constants.of(PatchConstants).counts_from
        2.5
        >>> Constants().of(PatchConstants).counts_from
        1.5
    """

    def __init__(self, *given: Any) -> None:
        self._given: dict[type, Any] = {}
        for each in given:
            if not is_dataclass(each) or isinstance(each, type):
                raise TypeError(
                    f"Expected instances of dataclasses of constants, but got {each!r}. Write "
                    "Constants(PatchConstants(counts_from=2.5)), say."
                )
            if type(each) in self._given:
                raise ValueError(
                    f"Expected one {type(each).__name__} at most, but got two. Leave one out."
                )
            self._given[type(each)] = each

    def of(self, kind: type[Kind]) -> Kind:
        """Return the constants of a kind: as given, or with their defaults.

        Args:
            kind: The dataclass.
        """
        return cast(Kind, self._given.get(kind) or kind())

    def to_dict(self) -> dict[str, Any]:
        """Return what was given as primitives, by the name of the dataclass."""
        return {kind.__name__: asdict(each) for kind, each in self._given.items()}

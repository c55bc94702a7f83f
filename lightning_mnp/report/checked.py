"""Values of a report that somebody else may have written: each has to be of its type and range.

A reader takes a value and the name of its place in the report, and returns the value or raises a
``TypeError`` that names the place, what was expected there, and what was found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias, TypeVar

from lightning_mnp.checkpoints.printable import printable

__all__ = [
    "Reader",
    "by_class",
    "by_name",
    "finite",
    "flag",
    "listed",
    "mapping",
    "number",
    "one_of",
    "optional",
    "plain",
    "record",
    "share",
    "text",
    "whole",
    "whole_from",
    "wrong",
]

Found = TypeVar("Found")
Reader: TypeAlias = Callable[[Any, str], Found]

_MOST = 2**63 - 1  # of a whole number: no size of a file or a network is larger
_DEEPEST = 50  # groups of options inside each other; other code calls itself for each


def wrong(place: str, expected: str, value: object) -> TypeError:
    """Return the error for a value that does not belong where it is.

    Args:
        place: Where it is in the report.
        expected: What belongs there.
        value: What was found.

    Example:
        >>> print(wrong("score", "a number", "high"))
        expected `score` to be a number, but got 'high'
    """
    if isinstance(value, (Mapping, list, tuple)):  # may be endless, or too deep to write out
        found = "an object" if isinstance(value, Mapping) else "a list"
        found = found if value else f"{found} with nothing in it"
    elif value is None:
        found = "null"
    else:
        found = printable(repr(value) if isinstance(value, str) else value, 60)
    return TypeError(f"expected `{printable(place)}` to be {expected}, but got {found}")


def text(value: Any, place: str) -> str:
    """Read text.

    Args:
        value: The value.
        place: Where it is in the report.

    Raises:
        TypeError: If it is something else.
    """
    if not isinstance(value, str):
        raise wrong(place, "text", value)
    return value


def flag(value: Any, place: str) -> bool:
    """Read what is true or false.

    Args:
        value: The value.
        place: Where it is in the report.

    Raises:
        TypeError: If it is something else.
    """
    if not isinstance(value, bool):
        raise wrong(place, "true or false", value)
    return value


def whole_from(least: int) -> Reader[int]:
    """Return a reader of whole numbers.

    Args:
        least: The least that is accepted.

    Example:
        >>> whole_from(1)(3, "images")
        3
    """

    def read(value: Any, place: str) -> int:
        if type(value) is not int or not least <= value <= _MOST:
            raise wrong(place, f"a whole number from {least} to 2**63 - 1", value)
        return value

    return read


whole = whole_from(0)


def number(value: Any, place: str) -> float:
    """Read a number; None stands for one that was not finite.

    Args:
        value: The value.
        place: Where it is in the report.

    Raises:
        TypeError: If it is something else, or not finite.

    Example:
        >>> number(None, "score")
        nan
    """
    return math.nan if value is None else finite(value, place, "a finite number or null")


def finite(value: Any, place: str, expected: str = "a finite number") -> float:
    """Read a number that has to be there.

    Args:
        value: The value.
        place: Where it is in the report.
        expected: What is expected there, for the message.

    Raises:
        TypeError: If it is something else, or not finite.
    """
    try:
        found = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:  # a whole number of hundreds of digits
        found = math.nan
    if not math.isfinite(found):
        raise wrong(place, expected, value)
    return found


def share(value: Any, place: str) -> float:
    """Read a number from 0 to 1; None stands for one that was not finite.

    Args:
        value: The value.
        place: Where it is in the report.

    Raises:
        TypeError: If it is something else, or out of range.
    """
    found = number(value, place)
    if not (math.isnan(found) or 0 <= found <= 1):
        raise wrong(place, "a number from 0 to 1 or null", value)
    return found


def one_of(names: Iterable[str]) -> Reader[Any]:
    """Return a reader of one of some names.

    Args:
        names: The names.
    """
    known = tuple(names)

    def read(value: Any, place: str) -> Any:
        if value not in known:
            raise wrong(place, f"one of {', '.join(known)}", value)
        return value

    return read


def optional(reader: Reader[Found]) -> Reader[Found | None]:
    """Return a reader that takes None, too.

    Args:
        reader: The reader of anything else.
    """
    return lambda value, place: None if value is None else reader(value, place)


def listed(reader: Reader[Found], *, least: int = 0) -> Reader[list[Found]]:
    """Return a reader of lists.

    Args:
        reader: The reader of each item.
        least: How many items there have to be.

    Example:
        >>> listed(whole)([1, 2], "counts")
        [1, 2]
    """

    def read(value: Any, place: str) -> list[Found]:
        if not isinstance(value, (list, tuple)) or len(value) < least:
            raise wrong(place, f"a list of {least} or more" if least else "a list", value)
        return [reader(item, f"{place}[{index}]") for index, item in enumerate(value)]

    return read


def mapping(value: Any, place: str) -> Mapping[Any, Any]:
    """Read an object, whatever it holds.

    Args:
        value: The value.
        place: Where it is in the report.

    Raises:
        TypeError: If it is something else.
    """
    if not isinstance(value, Mapping):
        raise wrong(place, "an object", value)
    return value


def by_name(reader: Reader[Found]) -> Reader[dict[str, Found]]:
    """Return a reader of values by name.

    Args:
        reader: The reader of each value.
    """

    def read(value: Any, place: str) -> dict[str, Found]:
        parts = mapping(value, place).items()
        return {str(name): reader(part, f"{place}.{name}") for name, part in parts}

    return read


def by_class(reader: Reader[Found]) -> Reader[dict[int, Found]]:
    """Return a reader of values by the number of a class.

    Args:
        reader: The reader of each value.

    Example:
        >>> by_class(number)({"3": 0.5}, "rare_classes")
        {3: 0.5}
    """

    def read(value: Any, place: str) -> dict[int, Found]:
        found = by_name(reader)(value, place)
        for name in found:
            if not (name.isascii() and name.isdigit() and len(name) < 19):
                raise wrong(place, "by the numbers of classes", name)
        return {int(name): part for name, part in found.items()}

    return read


def plain(value: Any, place: str) -> Any:
    """Read what may hold anything, but not at any depth.

    Args:
        value: The value.
        place: Where it is in the report.

    Raises:
        TypeError: If lists and objects are nested too deeply for those who show them.
    """
    layer = [value]
    for _ in range(_DEEPEST):
        groups = [each for each in layer if isinstance(each, (Mapping, list, tuple))]
        layer = [
            part
            for each in groups
            for part in (each.values() if isinstance(each, Mapping) else each)
        ]
        if not layer:
            return value
    raise wrong(place, f"nested at most {_DEEPEST} deep", value)


def record(make: Callable[..., Found], **readers: Reader[Any]) -> Reader[Found]:
    """Return a reader of an object with parts; parts that it does not know are left out.

    Args:
        make: What is made of the parts.
        readers: The reader of each part, which has to be there.

    Example:
        >>> record(dict, name=text)({"name": "patch", "counts": True}, "signal")
        {'name': 'patch'}
    """

    def read(value: Any, place: str) -> Found:
        content = mapping(value, place)
        for name in readers:
            if name not in content:
                raise wrong(place, f"an object with `{name}`", value)
        return make(
            **{name: reader(content[name], f"{place}.{name}") for name, reader in readers.items()}
        )

    return read

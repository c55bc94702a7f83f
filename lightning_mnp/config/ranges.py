"""Ranges of options: dataclass fields that say which values they take, and the check of these."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

__all__ = ["check_options", "option", "require"]

Value = TypeVar("Value")


@dataclass(frozen=True)
class _Range:
    """The values that an option may have; see :func:`option`."""

    kind: type
    at_least: float | None
    above: float | None
    at_most: float | None
    below: float | None
    choices: tuple[Any, ...]
    optional: bool
    why: str

    def holds(self, value: object) -> bool:
        """Return whether a value is allowed."""
        if value is None:
            return self.optional
        if self.choices:
            return value in self.choices
        if self.kind is bool:
            return isinstance(value, bool)
        if self.kind is str:
            return isinstance(value, str)
        kinds = (int,) if self.kind is int else (int, float)
        if not isinstance(value, kinds) or isinstance(value, bool) or not math.isfinite(value):
            return False
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if self.choices:
            return f"one of {self.choices}"
        if self.kind is bool:
            return "True or False"
        if self.kind is str:
            return "text"
        text = "a whole number" if self.kind is int else "a number"
        low = {"from": self.at_least, "above": self.above}
        bounds = [f"{word} {value:g}" for word, value in low.items() if value is not None]
        if self.at_most is not None:
            bounds.append(f"to {self.at_most:g}")
        if self.below is not None:
            bounds.append(f"to below {self.below:g}" if self.at_least is not None else "")
            bounds[-1] = bounds[-1] or f"and below {self.below:g}"
        if len(bounds) == 1 and self.at_least is not None:
            bounds = [f"of at least {self.at_least:g}"]
        text = " ".join([text, *bounds])
        return f"{text}, or None" if self.optional else f"{text}{self.why}"


def option(
    default: Value,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    choices: Sequence[Any] = (),
    optional: bool = False,
    why: str = "",
) -> Value:
    """Make a dataclass field whose values :func:`check_options` checks.

    The kind of the default says what is expected: True or False, text, a whole number, or any
    number.

    Args:
        default: The default.
        at_least: The least value.
        above: What values lie above.
        at_most: The greatest value.
        below: What values lie below.
        choices: The only values, if these are few.
        optional: Whether None is allowed.
        why: A reason for the range, for the message; begins with a comma.

    Example:
        >>> @dataclass(frozen=True)
        ... class Options:
        ...     steps: int = option(5, at_least=1)
        ...     def __post_init__(self) -> None:
        ...         check_options(self)
        >>> Options(steps=0)
        Traceback (most recent call last):
        ...
        ValueError: Expected argument `steps` to be a whole number of at least 1, but got 0.
    """
    kind = type(default)
    allowed = _Range(kind, at_least, above, at_most, below, tuple(choices), optional, why)
    return field(default=default, metadata={"range": allowed})


def check_options(options: Any, group: str = "") -> None:
    """Check every field of a dataclass that :func:`option` has made.

    Args:
        options: The dataclass instance.
        group: The name of the group that it is, for messages.

    Raises:
        ValueError: If a value is out of range.
    """
    for each in fields(options):
        allowed = each.metadata.get("range")
        if allowed is not None:
            require(allowed.holds(getattr(options, each.name)), options, each.name, allowed, group)


def require(condition: bool, options: Any, name: str, expected: object, group: str = "") -> None:
    """Raise an error if an option is out of range.

    Args:
        condition: Whether it is in range.
        options: The object that has it as an attribute.
        name: Its name.
        expected: What it is expected to be, in words.
        group: The name of the group that it is in, if any.

    Raises:
        ValueError: If the condition does not hold.
    """
    if not condition:
        shown = f"{group}.{name}" if group else name
        raise ValueError(
            f"Expected argument `{shown}` to be {expected}, but got {getattr(options, name)!r}."
        )

"""Checks of the arguments of attacks, each with its message."""

from __future__ import annotations

import math

__all__ = [
    "check_at_least",
    "check_choice",
    "check_positive",
    "check_range",
    "check_rate",
    "check_share",
]


def check_at_least(least: float, **arguments: float) -> None:
    """Raise an error if an argument is below a bound or not finite.

    Args:
        least: The lowest value allowed.
        arguments: Values by the names of the arguments.

    Raises:
        ValueError: If one is below ``least``, infinite or not a number.

    Example:
        >>> check_at_least(1, steps=0)
        Traceback (most recent call last):
        ValueError: Expected argument `steps` to be at least 1, but got 0.
    """
    for name, value in arguments.items():
        if not least <= value < math.inf:
            raise ValueError(f"Expected argument `{name}` to be at least {least}, but got {value}.")


def check_positive(**arguments: float) -> None:
    """Raise an error if an argument is not above 0 and finite.

    Args:
        arguments: Values by the names of the arguments.

    Raises:
        ValueError: If one is 0 or below, infinite or not a number.
    """
    for name, value in arguments.items():
        if not 0.0 < value < math.inf:
            raise ValueError(f"Expected argument `{name}` to be above 0, but got {value}.")


def check_range(least: float, most: float, **arguments: float) -> None:
    """Raise an error if an argument is outside of a range.

    Args:
        least: The lowest value allowed.
        most: The highest value allowed.
        arguments: Values by the names of the arguments.

    Raises:
        ValueError: If one is below ``least``, above ``most`` or not a number.
    """
    for name, value in arguments.items():
        if not least <= value <= most:
            raise ValueError(
                f"Expected argument `{name}` to be from {least} to {most}, but got {value}."
            )


def check_share(**arguments: float) -> None:
    """Raise an error if an argument is not above 0 and at most 1.

    Args:
        arguments: Values by the names of the arguments.

    Raises:
        ValueError: If one is 0 or below, above 1 or not a number.
    """
    for name, value in arguments.items():
        if not 0.0 < value <= 1.0:
            raise ValueError(
                f"Expected argument `{name}` to be above 0 and at most 1, but got {value}."
            )


def check_rate(poison_rate: float, **arguments: float) -> None:
    """Raise an error if a share of a batch does not fit beside the poisoned images.

    Args:
        poison_rate: Share of the batch that is poisoned, from 0 to 1.
        arguments: Other shares of the batch by the names of the arguments.

    Raises:
        ValueError: If one is below 0, or above what the poison rate leaves.
    """
    for name, value in arguments.items():
        if not 0.0 <= value <= 1.0 - poison_rate:
            raise ValueError(
                f"Expected argument `{name}` to be from 0 to {1.0 - poison_rate:.3g}, what the "
                f"poison rate leaves, but got {value}."
            )


def check_choice(choices: tuple[str, ...], **arguments: str) -> None:
    """Raise an error if an argument is not one of the words allowed.

    Args:
        choices: The words allowed.
        arguments: Values by the names of the arguments.

    Raises:
        ValueError: If one is another word.
    """
    for name, value in arguments.items():
        if value not in choices:
            raise ValueError(
                f"Expected argument `{name}` to be one of {choices}, but got {value!r}."
            )

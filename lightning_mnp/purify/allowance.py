"""The allowance: how much of a change may stay, for the harm that it does."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["harmless_share", "most_harmless"]


def most_harmless(harm: Callable[[int], float], count: int, most: float) -> int:
    """Find how many of an ordered row of changes can be made, by halving.

    Args:
        harm: The harm of the first so many; NaN is too much. It is taken to grow with their number.
        count: How many there are.
        most: The most harm allowed.

    Returns:
        From 0 to `count`.

    Example:
        >>> most_harmless(lambda changes: 0.1 * changes**2, count=9, most=1.0)
        3
    """
    if count == 0 or harm(count) <= most:
        return count
    fine, too_many = 0, count
    while too_many - fine > 1:
        middle = (fine + too_many) // 2
        if harm(middle) <= most:
            fine = middle
        else:
            too_many = middle
    return fine


def harmless_share(
    harm: Callable[[float], float], most: float, halvings: int
) -> tuple[float, float]:
    """Find the greatest share of a change that does no more harm than is allowed.

    Args:
        harm: The harm of a share from 0 to 1; NaN is too much. It is taken to grow with the share.
        most: The most harm allowed.
        halvings: The share is known to within 1 / 2 ** halvings.

    Returns:
        The share, from 0 to 1, and the harm of the whole change.

    Example:
        >>> harmless_share(lambda share: 4 * share, most=2.5, halvings=4)
        (0.625, 4.0)
    """
    whole, parts = harm(1.0), 2**halvings
    share = most_harmless(
        lambda count: whole if count == parts else harm(count / parts), parts, most
    )
    return share / parts, whole

"""How many filters a baseline prunes: by the rule of its paper, or a number or share of them."""

from __future__ import annotations

from typing import Literal, Protocol

from lightning_mnp.config import require

__all__ = ["AmountRule", "check_amount", "filters_to_prune"]

AmountRule = Literal["own", "number", "share"]


class _Options(Protocol):
    @property
    def rule(self) -> str: ...

    @property
    def amount(self) -> float: ...


def check_amount(options: _Options) -> None:
    """Check that the option `amount` fits the option `rule`.

    Args:
        options: The options of a baseline. By rules other than ``"number"`` and ``"share"``, the
            amount counts nothing.

    Raises:
        ValueError: If the amount is no whole number of filters, or no share, as the rule has it.

    Example:
        >>> from types import SimpleNamespace
        >>> check_amount(SimpleNamespace(rule="share", amount=0.01))
    """
    amount = options.amount
    if options.rule == "number":
        fits = amount >= 0 and float(amount).is_integer()
        expected = "a whole number of filters, at least 0"
    elif options.rule == "share":
        fits, expected = 0 <= amount < 1, "a share from 0 to below 1"
    else:
        return
    require(fits, options, "amount", f"{expected} (`rule` is {options.rule!r})")


def filters_to_prune(options: _Options, total: int, available: int) -> int:
    """Return how many filters to prune by the rule ``"number"`` or ``"share"``.

    Args:
        options: The options of a baseline, whose rule is one of the two.
        total: Number of filters of the network; a share is a share of these, whichever filters a
            baseline may prune. So the same share is the same number for all baselines. A share
            above 0 is at least one filter.
        available: Number of filters that the baseline may prune.

    Returns:
        The number, from 0 to ``available - 1``.

    Raises:
        ValueError: If no filter that the baseline may prune would be left.

    Example:
        >>> from types import SimpleNamespace
        >>> filters_to_prune(SimpleNamespace(rule="share", amount=0.01), 1200, available=128)
        12
    """
    count = int(options.amount)
    if options.rule == "share":
        count = max(int(options.amount > 0), round(options.amount * total))
    if count >= available:
        raise ValueError(
            f"Expected argument `amount` to leave one of the {available} filters that can be "
            f"pruned here, but got {options.amount:g}, which are {count} filters (`rule` is "
            f"{options.rule!r}). Lower `amount`."
        )
    return count

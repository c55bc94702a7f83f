"""Which filters go: the lowest M1 + M2 (Algorithm 1, line 14)."""

from __future__ import annotations

from torch import Tensor

from lightning_mnp.config import PruningRule

__all__ = ["pruned_count", "pruning_order"]


def pruning_order(scores: Tensor) -> Tensor:
    """Sort filters by M1 + M2, those to prune first in front.

    Args:
        scores: M1 + M2 of every filter, shape (total filters,).

    Returns:
        Filter positions, shape (total filters,); equal scores keep the network's order.

    Example:
        >>> import torch
        >>> pruning_order(torch.tensor([2.0, 1.0, 2.5, 1.0]))
        tensor([1, 3, 0, 2])
    """
    return scores.argsort(stable=True)


def pruned_count(scores: Tensor, rule: PruningRule, amount: float) -> int:
    """Return how many filters a rule prunes that ranks them by M1 + M2.

    Args:
        scores: M1 + M2 of every filter, shape (total filters,), from 1 to 3.
        rule: ``"count"``, ``"share"`` or ``"threshold"``.
        amount: The count, the share of all filters, or the threshold, epsilon in Algorithm 1:
            filters at or below it are pruned (line 14 keeps those above).

    Raises:
        ValueError: If the count is not below the number of filters, or the rule is another.

    Example:
        >>> import torch
        >>> pruned_count(torch.tensor([1.0, 1.5, 2.0]), "threshold", 1.5)
        2
    """
    if rule == "count":
        if amount >= len(scores):
            raise ValueError(
                f"Expected argument `pruning.amount` to be below {len(scores)}, the number of "
                f"filters, but got {amount:g}."
            )
        return int(amount)
    if rule == "share":
        return round(amount * len(scores))
    if rule == "threshold":
        return int((scores <= amount).sum())
    raise ValueError(
        f"Expected argument `rule` to be 'count', 'share' or 'threshold', but got {rule!r}."
    )

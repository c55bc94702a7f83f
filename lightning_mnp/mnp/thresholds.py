"""Which filters go: the lowest M1 + M2 (Algorithm 1, line 14), but never all of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mnp.config import PruningRule

__all__ = ["FilterChoice", "choose_filters", "pruned_count", "pruning_order"]


@dataclass(frozen=True)
class FilterChoice:
    """Which filters go, and which would go if they were not the last of their layers.

    Attributes:
        pruned: Positions of the filters to prune, lowest M1 + M2 first.
        spared: Positions of the filters that stay although they rank among those to prune.
    """

    pruned: Tensor
    spared: list[int]


def pruning_order(scores: Tensor) -> Tensor:
    """Sort filters by M1 + M2, those to prune first in front.

    Args:
        scores: M1 + M2 of every filter, shape (total filters,).

    Returns:
        Filter positions, shape (total filters,); equal scores keep the network's order.

    Example:
        >>> pruning_order(torch.tensor([2.0, 1.0, 2.5, 1.0]))
        tensor([1, 3, 0, 2])
    """
    return scores.argsort(stable=True)


def pruned_count(scores: Tensor, rule: PruningRule, amount: float) -> int:
    """Return how many filters a rule wants to prune that ranks them by M1 + M2.

    Args:
        scores: M1 + M2 of every filter, shape (total filters,), from 1 to 3.
        rule: ``"count"``, ``"share"`` or ``"threshold"``.
        amount: The count; the share of all filters, of which a share above 0 is at least one
            filter; or the threshold, epsilon in Algorithm 1: filters at or below it are pruned
            (line 14 keeps those above).

    Raises:
        ValueError: If the count is not below the number of filters, or the rule is another.

    Example:
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
        return max(int(amount > 0), round(amount * len(scores)))
    if rule == "threshold":
        return int((scores <= amount).sum())
    raise ValueError(
        f"Expected argument `rule` to be 'count', 'share' or 'threshold', but got {rule!r}."
    )


def choose_filters(
    scores: Tensor, sizes: Sequence[int], rule: PruningRule, amount: float
) -> FilterChoice:
    """Choose the filters with the lowest M1 + M2, and leave each layer its highest one.

    A layer without filters would pass nothing on. By the rules ``"count"`` and ``"share"`` the
    next filter goes in place of one that stays, as long as there is one.

    Args:
        scores: M1 + M2 of every filter, shape (total filters,).
        sizes: Number of filters of each layer.
        rule: As for :func:`pruned_count`.
        amount: As for :func:`pruned_count`.

    Returns:
        The filters that go, and those that stay as the last of their layers.

    Raises:
        ValueError: As :func:`pruned_count`.

    Example:
        >>> choose_filters(torch.tensor([1.0, 1.1, 1.2, 1.3]), [2, 2], "count", 2)
        FilterChoice(pruned=tensor([0, 2]), spared=[1])
    """
    count = pruned_count(scores, rule, amount)
    order = pruning_order(scores).tolist()
    left = list(sizes)
    layer_of = [layer for layer, size in enumerate(sizes) for _ in range(size)]
    pruned: list[int] = []
    spared: list[int] = []
    for position in order[:count] if rule == "threshold" else order:
        if len(pruned) == count:
            break
        if left[layer_of[position]] == 1:
            spared.append(position)
        else:
            pruned.append(position)
            left[layer_of[position]] -= 1
    return FilterChoice(torch.tensor(pruned, dtype=torch.long, device=scores.device), spared)

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_mnp.mnp.thresholds import choose_filters, pruned_count, pruning_order


def test_order_is_by_score_and_then_by_place() -> None:
    scores = torch.tensor([1.5, 1.0, 3.0, 1.0, 2.0])
    assert pruning_order(scores).tolist() == [1, 3, 0, 4, 2]


@pytest.mark.parametrize(
    ("total", "share", "count"),
    [(4800, 0.00625, 30), (1200, 0.00625, 8), (40, 0.00625, 1), (40, 0.0, 0), (3, 0.9, 3)],
)
def test_a_share_above_zero_is_at_least_one_filter(total: int, share: float, count: int) -> None:
    assert pruned_count(torch.ones(total), "share", share) == count


def chosen_by_hand(scores: list[float], sizes: list[int], rule: str, amount: float) -> list[int]:
    """Look again and again for the lowest filter that is not the only one left of its layer."""
    layer_of = [layer for layer, size in enumerate(sizes) for _ in range(size)]
    left, chosen = set(range(len(scores))), list[int]()
    while rule == "threshold" or len(chosen) < amount:
        free = [
            place
            for place in sorted(left)
            if sum(layer_of[other] == layer_of[place] for other in left) > 1
            and (rule != "threshold" or scores[place] <= amount)
        ]
        if not free:
            break
        chosen.append(min(free, key=lambda place: (scores[place], place)))
        left.remove(chosen[-1])
    return chosen


@pytest.mark.parametrize("sizes", [[12], [1, 11], [2, 1, 4, 5], [1] * 12])
@pytest.mark.parametrize(
    ("rule", "amount"), [("count", 0), ("count", 5), ("count", 11), ("threshold", 2.0)]
)
def test_each_layer_keeps_its_highest_filter(rule: Any, amount: float, sizes: list[int]) -> None:
    scores = (1 + 2 * torch.rand(12)).mul(8).round().div(8)  # some of them equal
    choice = choose_filters(scores, sizes, rule, amount)
    assert choice.pruned.tolist() == chosen_by_hand(scores.tolist(), sizes, rule, amount)
    assert not set(choice.spared) & set(choice.pruned.tolist())
    for kept in torch.arange(12).split(sizes):
        assert set(kept.tolist()) - set(choice.pruned.tolist())


def test_the_filters_that_are_spared_are_those_passed_over() -> None:
    scores = torch.tensor([1.0, 1.3, 1.1, 1.4, 1.5])
    sizes = [1, 2, 2]
    assert choose_filters(scores, sizes, "count", 1).spared == [0]
    assert choose_filters(scores, sizes, "count", 2).spared == [0, 1]
    assert choose_filters(scores, sizes, "threshold", 1.2).spared == [0]
    assert choose_filters(scores, [5], "count", 4).spared == []

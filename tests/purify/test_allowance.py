from __future__ import annotations

import math

import pytest

from lightning_mnp.purify.allowance import harmless_share, most_harmless


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8])
@pytest.mark.parametrize("fine", range(9))
def test_as_many_changes_as_harm_allows(count: int, fine: int) -> None:
    asked = []

    def harm(changes: int) -> float:
        assert 0 < changes <= count
        asked.append(changes)
        return 0.0 if changes <= fine else math.nan if changes % 2 else 1.0

    assert most_harmless(harm, count, 0.5) == min(count, fine)
    assert len(asked) <= 1 + math.ceil(math.log2(count + 1))


@pytest.mark.parametrize(
    ("most", "share"), [(16.0, 1.0), (15.0, 0.9375), (9.9, 0.5625), (1.0, 0.0625), (0.2, 0.0)]
)
def test_the_largest_share_that_harm_allows(most: float, share: float) -> None:
    asked = []

    def harm(tried: float) -> float:
        asked.append(tried)
        return 16 * tried

    assert harmless_share(harm, most, halvings=4) == (share, 16.0)
    assert len(asked) == len(set(asked)) <= 5


def test_harm_that_is_not_known_is_too_much() -> None:
    share, whole = harmless_share(lambda tried: math.nan, most=1.0, halvings=4)
    assert share == 0
    assert math.isnan(whole)

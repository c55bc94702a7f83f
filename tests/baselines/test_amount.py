from __future__ import annotations

from dataclasses import dataclass

import pytest

from lightning_mnp.baselines.amount import check_amount, filters_to_prune


@dataclass(frozen=True)
class Options:
    rule: str = "own"
    amount: float = 0.0


@pytest.mark.parametrize(
    ("rule", "amount", "expected"),
    [
        ("number", 0, 0),
        ("number", 7.0, 7),
        ("share", 0.0, 0),
        ("share", 0.00625, 8),
        ("share", 0.0999, 120),
        ("share", 0.0001, 1),
    ],
)
def test_a_share_is_one_of_all_filters(rule: str, amount: float, expected: int) -> None:
    options = Options(rule, amount)
    check_amount(options)
    assert filters_to_prune(options, total=1200, available=121) == expected


@pytest.mark.parametrize(
    ("rule", "amount", "expected"),
    [
        ("number", 1.5, r"a whole number of filters, at least 0 \(`rule` is 'number'\)"),
        ("number", -1, r"a whole number of filters.*"),
        ("share", 1.0, r"a share from 0 to below 1 \(`rule` is 'share'\)"),
        ("share", -0.1, r"a share from 0 to below 1.*"),
    ],
)
def test_an_amount_that_does_not_fit_the_rule(rule: str, amount: float, expected: str) -> None:
    with pytest.raises(ValueError, match=f"argument `amount` to be {expected}, but got {amount}"):
        check_amount(Options(rule, amount))


@pytest.mark.parametrize("rule", ["own", "threshold", "fixed"])
def test_other_rules_take_no_amount(rule: str) -> None:
    check_amount(Options(rule, 1e9))


@pytest.mark.parametrize(("rule", "amount"), [("number", 121), ("share", 0.1008)])
def test_one_filter_has_to_be_left(rule: str, amount: float) -> None:
    message = rf"leave one of the 121 filters .*got {amount:g}, which are 121 .*Lower `amount`"
    with pytest.raises(ValueError, match=message):
        filters_to_prune(Options(rule, amount), total=1200, available=121)

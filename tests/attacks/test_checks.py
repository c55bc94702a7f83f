from __future__ import annotations

import math

import pytest

from lightning_mnp.attacks.checks import (
    check_at_least,
    check_choice,
    check_positive,
    check_range,
    check_rate,
    check_share,
)


def test_values_within_bounds_pass() -> None:
    check_at_least(2, a=2, b=2.5)
    check_positive(a=1e-9)
    check_range(1, 3, a=1, b=3)
    check_share(a=1e-9, b=1.0)
    check_rate(0.25, a=0.0, b=0.75)
    check_choice(("x", "y"), a="y")


@pytest.mark.parametrize("value", [1, -math.inf, math.inf, math.nan])
def test_at_least(value: float) -> None:
    with pytest.raises(ValueError, match=f"`b` to be at least 2, but got {value}."):
        check_at_least(2, a=2, b=value)


@pytest.mark.parametrize("value", [0.0, -1, math.inf, math.nan])
def test_positive(value: float) -> None:
    with pytest.raises(ValueError, match=f"`a` to be above 0, but got {value}."):
        check_positive(a=value)


@pytest.mark.parametrize("value", [0.9, 3.1, math.nan])
def test_range(value: float) -> None:
    with pytest.raises(ValueError, match=f"`a` to be from 1 to 3, but got {value}."):
        check_range(1, 3, a=value)


@pytest.mark.parametrize("value", [0.0, 1.1, math.nan])
def test_share(value: float) -> None:
    with pytest.raises(ValueError, match=f"`a` to be above 0 and at most 1, but got {value}."):
        check_share(a=value)


@pytest.mark.parametrize("value", [-0.1, 0.8, math.nan])
def test_rate(value: float) -> None:
    message = f"`a` to be from 0 to 0.75, what the poison rate leaves, but got {value}."
    with pytest.raises(ValueError, match=message):
        check_rate(0.25, a=value)


def test_choice() -> None:
    with pytest.raises(ValueError, match=r"`a` to be one of \('x', 'y'\), but got 'z'."):
        check_choice(("x", "y"), a="z")

from __future__ import annotations

import math
import random

import pytest

from lightning_mnp.signals.standout import Standout, StandoutConstants, find_standout


def reference(values: dict[int, float], unit: float, least: float) -> tuple[int, float]:
    """The gap to the next class over the spread of all others, by looking at every pair."""
    [top] = [c for c in values if all(values[c] > values[k] for k in values if k != c)]
    others = [values[c] for c in values if c != top]
    gap = min(values[top] - value for value in others)
    spread = max(abs(first - second) for first in others for second in others)
    return top, gap / max(spread, least * unit)


def drawn(seed: int) -> dict[int, float]:
    generator = random.Random(seed)
    classes = generator.sample(range(100), generator.randint(2, 20))
    return {index: generator.gauss(0, 10 ** generator.uniform(-2, 1)) for index in classes}


@pytest.mark.parametrize("seed", range(40))
def test_it_is_the_gap_over_the_spread(seed: int) -> None:
    values, unit = drawn(seed), 0.1 + seed / 10
    top, value = reference(values, unit, least=1.0 if len(values) <= 4 else 0.25)
    found = find_standout(values, unit)
    assert found.target_class == top
    assert found.value == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_neither_the_unit_nor_the_level_nor_the_order_makes_a_difference(seed: int) -> None:
    values = drawn(seed)
    found = find_standout(values, 0.5)
    other = {index: 3.0 + 8.0 * value for index, value in reversed(values.items())}
    again = find_standout(other, 8.0 * 0.5)
    assert again.target_class == found.target_class
    assert again.value == pytest.approx(found.value, rel=1e-6)


def test_the_class_that_stands_out_is_no_part_of_the_spread() -> None:
    values = {0: 0.0, 1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 5: 8.0}
    assert find_standout(values) == Standout(5, 1.0)
    assert find_standout({**values, 5: 12.0}) == Standout(5, 2.0)


@pytest.mark.parametrize(("count", "least"), [(2, 1.0), (3, 1.0), (4, 1.0), (5, 0.25), (10, 0.25)])
def test_even_classes_are_taken_for_less_even_than_they_are(count: int, least: float) -> None:
    """Most of all where there are few, whose spread says little."""
    even = {**dict.fromkeys(range(count), 2.0), 1: 5.0}
    assert find_standout(even, 3.0) == Standout(1, 1.0 / least)
    constants = StandoutConstants(least_spread=0.5, least_spread_of_few=2.0)
    assert find_standout(even, 3.0, constants) == Standout(1, 0.5 / least)


def test_how_many_classes_are_few_can_be_varied() -> None:
    even = {**dict.fromkeys(range(6), 0.0), 3: 1.0}
    assert find_standout(even).value == 4.0
    assert find_standout(even, constants=StandoutConstants(few=6)).value == 1.0


@pytest.mark.parametrize("values", [(1.0, 7.0, 7.0, 2.0), (3.0, 3.0), (0.0,) * 10])
def test_of_classes_that_tie_none_stands_out(values: tuple[float, ...]) -> None:
    found = find_standout(dict(enumerate(values)))
    assert found.value == 0.0
    assert values[found.target_class] == max(values)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("index", [0, 3, 5])
def test_with_a_figure_that_is_not_finite_none_stands_out(wrong: float, index: int) -> None:
    values = {0: 0.0, 1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 5: 90.0}
    assert find_standout({**values, index: wrong}).value == 0.0

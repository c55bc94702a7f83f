from __future__ import annotations

import math

import pytest

from lightning_mnp.baselines.anomaly import anomaly_indices


def by_hand(values: list[float]) -> list[float]:
    """The index written out: the middle of sorted lists, of an odd number of values."""
    median = sorted(values)[len(values) // 2]
    distances = sorted(abs(value - median) for value in values)
    mad = distances[len(values) // 2]
    return [(value - median) / (1.4826 * mad) for value in values]


@pytest.mark.parametrize("values", [[3.0, 1.0, 7.0], [9.0, 80.0, 70.0, 75.0, 91.0]])
def test_the_index_is_that_of_the_definition(values: list[float]) -> None:
    found = anomaly_indices(dict(enumerate(values)))
    assert [found[index] for index in range(len(values))] == pytest.approx(by_hand(values))


def test_the_index_has_no_unit() -> None:
    values = {0: 1.0, 1: 2.0, 2: 5.0, 3: 7.0}
    scaled = {index: 100 + 10 * value for index, value in values.items()}
    assert anomaly_indices(scaled) == pytest.approx(anomaly_indices(values))


def test_half_of_the_values_are_equal() -> None:
    found = anomaly_indices({0: 5.0, 1: 5.0, 2: 5.0, 3: 1.0, 4: 9.0})
    assert found == {0: 0.0, 1: 0.0, 2: 0.0, 3: -math.inf, 4: math.inf}

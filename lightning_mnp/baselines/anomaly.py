"""The anomaly index: how far a value is from the median of all, in robust standard deviations."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

__all__ = ["anomaly_indices"]

# For normal values, this times the median absolute deviation is the standard deviation.
_CONSISTENCY = 1.4826


def anomaly_indices(values: Mapping[int, float]) -> dict[int, float]:
    """Compute the anomaly index of each value, with a sign.

    It is the distance from the median, divided by 1.4826 times the median absolute deviation from
    the median (MAD). This is the outlier test of Neural Cleanse (Wang et al., S&P 2019, Sec. IV),
    where an absolute value above 2 is an outlier.

    Args:
        values: A value for each class.

    Returns:
        The index of each class, negative below the median. If the MAD is zero, because half of
        the values are equal, any other value has the index infinity.

    Example:
        >>> found = anomaly_indices({0: 10.0, 1: 11.0, 2: 12.0, 3: 13.0, 4: 2.0})
        >>> round(found[4], 2)
        -6.07
    """
    median = statistics.median(values.values())
    spread = statistics.median(abs(value - median) for value in values.values())
    return {
        index: _divide(value - median, _CONSISTENCY * spread) for index, value in values.items()
    }


def _divide(distance: float, spread: float) -> float:
    if spread > 0:
        return distance / spread
    return math.copysign(math.inf, distance) if distance else 0.0

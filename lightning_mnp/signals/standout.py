"""How far one class stands out from the others, in a unit that the network itself provides.

What a search measures for a class depends on the network: on its depth, its accuracy, its data. No
fixed value is right for all. But most classes have no backdoor, and they say what is usual. So the
gap between the greatest value and the next is divided by the spread of all the others. That is
Dixon's test for an outlier (Dixon, 1950), with the outlier left out of the spread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Standout", "StandoutConstants", "find_standout"]


@dataclass(frozen=True)
class StandoutConstants:
    """When the spread of the other classes is too small to divide by.

    Attributes:
        least_spread: Least spread, in the unit of the values.
        few: With so many classes or fewer, the spread says little of what is usual.
        least_spread_of_few: Least spread then.
    """

    least_spread: float = 0.25
    few: int = 4
    least_spread_of_few: float = 1.0


@dataclass(frozen=True)
class Standout:
    """The class of the greatest value.

    Attributes:
        target_class: That class.
        value: Its gap to the next class, divided by the spread of the others; at least 0.
    """

    target_class: int
    value: float


def find_standout(
    values: Mapping[int, float], unit: float = 1.0, constants: StandoutConstants | None = None
) -> Standout:
    """Find the class that stands out, and by how much.

    Args:
        values: A value for each class, two classes or more; large for a backdoor.
        unit: What is usual for the values, above 0. The least spread is a multiple of it.
        constants: Constants that differ from their defaults.

    Returns:
        The class, and the gap to the next class over the spread of all other classes: the next
        one minus the least. The value is 0 if a figure is not finite.

    Example:
        >>> find_standout({0: -1.0, 1: 5.0, 2: 0.0, 3: 1.0, 4: -1.0})
        Standout(target_class=1, value=2.0)
    """
    constants = constants or StandoutConstants()
    ranked = sorted(values, key=values.__getitem__, reverse=True)
    top, following, last = ranked[0], ranked[1], ranked[-1]
    if not all(math.isfinite(value) for value in values.values()):
        return Standout(top, 0.0)
    few = len(values) <= constants.few
    least = constants.least_spread_of_few if few else constants.least_spread
    spread = max(values[following] - values[last], least * unit)
    return Standout(top, (values[top] - values[following]) / spread)

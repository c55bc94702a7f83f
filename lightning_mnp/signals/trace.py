"""Traces: where a backdoor shows without its trigger, as margins that pruning takes down."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lightning_mnp.config import Constants

__all__ = ["Trace", "TraceConstants", "strength"]

# Margins below this do not count: the images are back in their own class.
_LOWEST_MARGIN = -1.0


@dataclass(frozen=True)
class TraceConstants:
    """When little is left of a trace.

    Attributes:
        little_at: Share of the strength at the start from which next to nothing is left.
        least_strength: A trace that is as weak as this from the start has nothing to give.
        images: Most images of a trace; they go through the network at once, so never more than a
            batch.
    """

    little_at: float = 0.1
    least_strength: float = 1.0
    images: int = 32


class Trace(ABC):
    """Images in which a backdoor shows.

    Args:
        constants: Constants that differ from their defaults.
        decides: Whether pruning goes on as long as the backdoor shows in this trace.

    Attributes:
        name: What it is.
        little_below: Little is left only below this strength, whatever it was at the start.
    """

    name: ClassVar[str]
    little_below: float = math.inf

    def __init__(self, constants: Constants, decides: bool = True) -> None:
        self._limits = constants.of(TraceConstants)
        self.decides = decides

    def shows_little(self, found: float, before: float) -> bool:
        """Return whether a strength is next to nothing; False for NaN.

        Args:
            found: The strength.
            before: The strength at the start.
        """
        return found <= min(self._limits.little_at * before, self.little_below)

    @abstractmethod
    def margins(self, masks: Tensor) -> Tensor:
        """Return margins of the target class under filter masks, shape (N,); large for a backdoor.

        Args:
            masks: Filter masks, shape (total filters,).
        """

    def adapt(self, masks: Tensor, taken: int) -> None:  # noqa: B027 (some have nothing to follow)
        """Follow the network after so many steps of pruning; thoroughly after none.

        Args:
            masks: Filter masks that are in force.
            taken: The steps.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what :meth:`adapt` changes, as tensors and primitives."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Go on where :meth:`state_dict` was taken."""


def strength(trace: Trace, masks: Tensor) -> Tensor:
    """Compute how strongly a backdoor shows in a trace: the mean margin, as far as margins count.

    Args:
        trace: The trace.
        masks: Filter masks, shape (total filters,).

    Returns:
        A scalar, 0 if all images are clearly in their own class again.
    """
    return trace.margins(masks).clamp_min(_LOWEST_MARGIN).mean() - _LOWEST_MARGIN

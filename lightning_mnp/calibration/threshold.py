"""The threshold of the verdict's score, computed from clean networks of the user's own."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from lightning_mnp.config import MNPConfig
from lightning_mnp.signals.population import rate_interval

__all__ = ["Calibration", "calibrate_threshold", "check_count"]


@dataclass(frozen=True)
class Calibration:
    """A threshold, and what it was computed from.

    Attributes:
        scores: Scores of the networks, from 0, in the order of the argument.
        rate: The false positive rate that was asked for, between 0 and 1.
        threshold: Value for `verdict.threshold` of :class:`~lightning_mnp.config.MNPConfig`.
        bound: Upper bound of the probability that one more clean network is flagged; at most
            ``rate``.
        default_threshold: The threshold that is used by default.
        default_flagged: Number of the networks that the default threshold flags.
        default_interval: Clopper-Pearson interval, at 95%, of the rate at which the default
            threshold flags clean networks of this kind.

    Example:
        >>> calibration = calibrate_threshold([0.2, 0.9, 0.4, 0.5], rate=0.2)
        >>> calibration.bound, calibration.default_share
        (0.2, 0.0)
    """

    scores: tuple[float, ...]
    rate: float
    threshold: float
    bound: float
    default_threshold: float
    default_flagged: int
    default_interval: tuple[float, float]

    @property
    def default_share(self) -> float:
        """Share of the networks that the default threshold flags, from 0 to 1."""
        return self.default_flagged / len(self.scores)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as primitives, ready for JSON."""
        content = asdict(self)
        content["scores"] = list(self.scores)
        content["default_interval"] = list(self.default_interval)
        content["default_share"] = self.default_share
        return content

    def to_json(self) -> str:
        """Return everything as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def __str__(self) -> str:
        low, high = self.default_interval
        count = len(self.scores)
        return (
            f"threshold: {self.threshold!r}, which flags a clean network of this kind with a "
            f"probability of at most {self.bound:.2%} (asked for: {self.rate:.2%}; networks: "
            f"{count})\n"
            f"the default threshold, {self.default_threshold:g}, flags {self.default_flagged} of "
            f"{count}: {self.default_share:.1%}, with an interval of {low:.1%} to {high:.1%} at "
            "95%\n"
            f"to use the threshold: --mnp.verdict.threshold {self.threshold!r}"
        )


def calibrate_threshold(scores: Iterable[float], rate: float = 0.05) -> Calibration:
    """Compute the threshold that flags few clean networks, from the scores of clean networks.

    It lies just above the k-th smallest of n scores, k = ceil((n + 1) (1 - rate)) (split conformal
    prediction, Vovk et al. 2005). If the n networks and a new one are exchangeable, because all of
    them were made by the same recipe, then the score of the new one is at least the threshold with
    a probability of at most ``rate``, whatever the distribution of the scores. This probability is
    over the choice of the n networks, too.

    Args:
        scores: The :attr:`DefenseReport.score <lightning_mnp.report.DefenseReport>` of each
            network, finite, from 0; only of networks that could be judged, and all with the same
            options and the same defense set. A score does not depend on the threshold that was
            used.
        rate: The greatest accepted probability of flagging a clean network, between 0 and 1.

    Returns:
        The threshold, and how the default threshold would do.

    Raises:
        ValueError: If there are too few scores for the rate, or a value is out of range.

    Example:
        >>> result = calibrate_threshold([0.2, 0.9, 0.4, 0.5], rate=0.2)
        >>> round(result.threshold, 6), result.default_flagged
        (0.9, 0)
        >>> result.threshold > 0.9
        True
    """
    values = tuple(float(score) for score in scores)
    rate = float(rate)
    for index, value in enumerate(values):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(
                f"Expected argument `scores` to hold finite numbers from 0, but number {index} is "
                f"{value!r}. A report has no score if the verdict is by Eq. 8. Leave that network "
                "out, and those whose report says that they could not be `judged`."
            )
    check_count(len(values), rate)
    above = math.floor((len(values) + 1) * _exact(rate))  # n + 1 - k
    threshold = math.nextafter(sorted(values)[len(values) - above], math.inf)
    default = MNPConfig().verdict.threshold
    flagged = sum(value >= default for value in values)
    return Calibration(
        scores=values,
        rate=rate,
        threshold=threshold,
        bound=above / (len(values) + 1),
        default_threshold=default,
        default_flagged=flagged,
        default_interval=rate_interval(flagged, len(values)),
    )


def check_count(count: int, rate: float) -> None:
    """Check that there are enough networks for a rate.

    Args:
        count: Number of networks.
        rate: The false positive rate that the user asks for.

    Raises:
        ValueError: If there are fewer than 1 / rate - 1, or the rate is out of range.

    Example:
        >>> check_count(19, 0.05)
    """
    if not 0 < rate < 1:
        raise ValueError(f"Expected argument `rate` to be between 0 and 1, but got {rate!r}.")
    needed = math.ceil(1 / _exact(rate) - 1)
    if count < needed:
        raise ValueError(
            f"Expected at least {needed} clean networks for a `rate` of {rate:g}, but got {count}. "
            + (
                f"Add networks, or choose a `rate` of at least {_least_rate(count):.4g}."
                if count
                else "Add networks."
            )
        )


def _exact(rate: float) -> Fraction:
    """Return a rate as the decimal number that it was written as, so that 20 * 0.05 is 1."""
    return Fraction(repr(float(rate)))


def _least_rate(count: int) -> float:
    """Return the smallest rate, of four digits, that so many networks are enough for."""
    return math.ceil(10_000 / (count + 1)) / 10_000

"""The reference population: scores of clean networks, with which a score is compared.

A score says how far some class stands out. How often that happens by chance is a question to clean
networks: those that this package was measured on, or those of the user.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from lightning_mnp.checkpoints.printable import printable
from lightning_mnp.report import ReferenceRate

__all__ = ["SCORES_FORMAT", "Population", "rate_interval", "read_population"]

SCORES_FORMAT = "lightning-mnp calibration 2"  # 1: scores of the former verdict
_PACKAGED = "population.json"
_CONFIDENCE = 0.95


def rate_interval(hits: int, total: int) -> tuple[float, float]:
    """Return the 95% interval of a rate, after Clopper and Pearson (1934).

    Args:
        hits: How many.
        total: Of how many, at least 1.

    Example:
        >>> low, high = rate_interval(1, 2)
        >>> round(low, 3), round(high, 3)
        (0.013, 0.987)
    """
    interval = binomtest(hits, total).proportion_ci(_CONFIDENCE, method="exact")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class Population:
    """Clean networks and their scores.

    Attributes:
        scores: Of each network, the highest score of its audits, from 0; by the digest of its
            weights.
        described: What they are, for a sentence that begins with "Of 40".
    """

    scores: Mapping[str, float]
    described: str

    def rate(self, score: float) -> ReferenceRate | None:
        """Return how many of the networks look as suspicious as a score.

        Args:
            score: A score, from 0.

        Returns:
            Their number and the 95% interval of Clopper and Pearson (1934) of the rate; None if
            the score is not finite or there are no networks.

        Example:
            >>> rate = Population({"a": 0.2, "b": 0.7}, "clean networks").rate(0.5)
            >>> rate.networks, rate.as_suspicious, round(rate.high, 3)
            (2, 1, 0.987)
        """
        if not self.scores or not math.isfinite(score):
            return None
        hits, total = sum(each >= score for each in self.scores.values()), len(self.scores)
        low, high = rate_interval(hits, total)
        return ReferenceRate(total, hits, low, high, self.described)


def read_population(path: str = "") -> Population:
    """Read the reference population.

    Args:
        path: A file that ``lightning-mnp calibrate`` has written; the networks that this package
            was measured on if empty.

    Returns:
        The networks. Those with the same weights count as one. If the file has a threshold, only
        those count that it rests on.

    Raises:
        ValueError: If the file is missing or holds something else.

    Example:
        >>> read_population().described.split()[:2]
        ['clean', 'networks']
    """
    if not path:
        text = files("lightning_mnp.signals").joinpath(_PACKAGED).read_text("utf-8")
        content = json.loads(text)
        return Population(_highest(content), content["described"])
    shown = printable(path)
    try:
        # `Path.expanduser` would raise for a file `~name`.
        content = json.loads(Path(os.path.expanduser(path)).read_text("utf-8"))
        if content["format"] != SCORES_FORMAT:
            raise ValueError
        scores = _highest(content)
        if not all(math.isfinite(score) and score >= 0 for score in scores.values()):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        what = "is none"
        if isinstance(error, OSError):
            what = f"cannot be read ({error.strerror})"
        raise ValueError(
            "Expected option `verdict.reference` to name a file that `lightning-mnp calibrate` has "
            f"written, but {shown} {what}. Check the name, or leave the option out to compare "
            "with the networks of this package."
        ) from error
    return Population(scores, f"clean networks of your own ({shown})")


def _highest(content: Mapping[str, Any]) -> dict[str, float]:
    scores: dict[str, float] = {}
    networks, calibration = content["networks"], content.get("calibration")
    if calibration is not None:  # others are kept from earlier calls, and were left out since
        files = set(calibration["files"])
        named = {each["weights"] for each in networks if each["file"] in files}
        networks = [each for each in networks if each["weights"] in named]
    for network in networks:
        weights, score = str(network["weights"]), float(network["score"])
        scores[weights] = max(score, scores.get(weights, score))
    return scores

"""The verdict: what the suppression runs say of a network."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_mnp.config import MNPConfig
from lightning_mnp.result import RunResult, Verdict

__all__ = ["Judgement", "judge"]


@dataclass(frozen=True)
class Judgement:
    """A verdict with what it rests on.

    Attributes:
        verdict: ``"clean"``, ``"backdoored"`` or ``"undecided"``.
        detection_ratio: Mean of Eq. 8 over the runs.
        pile_up: Mean share of the suppressed networks' predictions on their top class.
        target_class: The class thought to be the backdoor's target, or None.
        reasons: In words.
    """

    verdict: Verdict
    detection_ratio: float
    pile_up: float
    target_class: int | None
    reasons: tuple[str, ...]


def judge(runs: Sequence[RunResult], correlation: float, config: MNPConfig) -> Judgement:
    """Judge a network by its suppression runs.

    Args:
        runs: The runs, at least one.
        correlation: Rank correlation of magnitude and saliency of the network as it is.
        config: Options; ``verdict`` chooses the rule and ``delta`` its threshold (Eq. 8).

    Returns:
        The judgement.
    """
    ratio = _mean([run.detection_ratio for run in runs])
    pile_up = _mean([run.pile_up for run in runs])
    votes = Counter(run.top_class for run in runs).most_common(1)[0]
    reasons = []
    verdict: Verdict
    if not math.isfinite(ratio) or correlation <= 0:
        verdict = "undecided"
        reasons.append(
            f"magnitude and saliency do not correlate in the network as it is ({correlation:.2f})"
        )
    else:
        verdict = "backdoored" if ratio <= config.delta else "clean"
        relation = "at most" if ratio <= config.delta else "above"
        reasons.append(f"the detection ratio {ratio:.2f} is {relation} delta = {config.delta:g}")
    return Judgement(verdict, ratio, pile_up, votes[0], tuple(reasons))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

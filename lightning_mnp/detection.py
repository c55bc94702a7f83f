"""The verdict: what the suppression runs and the reach of the classes say of a network."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_mnp.config import MNPConfig
from lightning_mnp.result import RunResult, Verdict
from lightning_mnp.surrogate import reach_ratio

__all__ = ["Judgement", "judge", "suspected_class", "top_class"]

# Measured on networks that no table reports; see "The default" in the documentation.
BACKDOORED_BELOW = 0.5
CLEAN_ABOVE = 0.6


@dataclass(frozen=True)
class Judgement:
    """A verdict with what it rests on.

    Attributes:
        verdict: ``"clean"``, ``"backdoored"`` or ``"undecided"``.
        detection_ratio: Mean of Eq. 8 over the runs.
        pile_up: Mean share of the suppressed networks' predictions on their top class.
        suspect: The class that a backdoor would aim at, whatever the verdict.
        reasons: In words.
    """

    verdict: Verdict
    detection_ratio: float
    pile_up: float
    suspect: int
    reasons: tuple[str, ...]

    @property
    def target_class(self) -> int | None:
        """The class thought to be the backdoor's target; None for a clean network."""
        return None if self.verdict == "clean" else self.suspect


def judge(
    runs: Sequence[RunResult],
    correlation: float,
    reaches: dict[int, float],
    config: MNPConfig,
    accuracy: float,
) -> Judgement:
    """Judge a network.

    Args:
        runs: The suppression runs, at least one.
        correlation: Rank correlation of magnitude and saliency of the network as it is.
        reaches: The reach of the classes, see :class:`~lightning_mnp.surrogate.ReachSearch`;
            may be empty where ``config.verdict`` is ``"ratio"``.
        config: Options; ``verdict`` chooses the rule.
        accuracy: The network's accuracy on the defense set, from 0 to 1.

    Returns:
        The judgement; undecided where the network knows too little for it to mean anything.
    """
    ratio = sum(run.detection_ratio for run in runs) / len(runs)
    pile_up = sum(run.pile_up for run in runs) / len(runs)
    top = top_class(runs)
    verdict, suspect, reasons = (
        _by_ratio(ratio, correlation, config.delta, top)
        if config.verdict == "ratio"
        else _by_reach(reaches, top)
    )
    classes = len(runs[0].predictions)
    # Twice the chance level, or halfway to perfect where there are only a few classes.
    known = max(min(2 / classes, (1 + 1 / classes) / 2), config.stop_accuracy or 0.0)
    if accuracy <= known or not any(run.steps for run in runs):
        verdict = "undecided"
        reasons.append(
            f"the network's accuracy on the defense set is {accuracy:.0%}, which is too low for a "
            "verdict; check that images are normalized and labeled as in training"
        )
    reasons.append(
        f"after clean suppression, {pile_up:.0%} of the predictions fall on class {top}, with a "
        f"detection ratio of {ratio:.2f}"
    )
    return Judgement(verdict, ratio, pile_up, suspect, tuple(reasons))


def top_class(runs: Sequence[RunResult]) -> int:
    """Tell the class on which the predictions of most suppression runs pile up."""
    return Counter(run.top_class for run in runs).most_common(1)[0][0]


def suspected_class(reaches: dict[int, float], top: int) -> int:
    """Tell which class a backdoor would aim at.

    Args:
        reaches: The reach of the classes.
        top: The class on which the suppressed networks' predictions pile up.

    Returns:
        That class, if it is reached conspicuously soon, too; else the one reached soonest.

    Example:
        >>> suspected_class({0: 0.1, 1: 0.2, 2: 0.4, 3: 0.5, 4: 0.4}, top=1)
        1
        >>> suspected_class({0: 0.1, 1: 0.3, 2: 0.4, 3: 0.5, 4: 0.4}, top=1)
        0
    """
    soonest, _, median = reach_ratio(reaches)
    return top if reaches.get(top, math.inf) < CLEAN_ABOVE * median else soonest


def _by_ratio(
    ratio: float, correlation: float, delta: float, top: int
) -> tuple[Verdict, int, list[str]]:
    """Eq. 8, where it means something."""
    if not math.isfinite(ratio) or correlation <= 0:
        reason = "magnitude and saliency do not correlate in the network as it is"
        return "undecided", top, [f"{reason} ({correlation:.2f})"]
    if ratio <= delta:
        return "backdoored", top, [f"the detection ratio is at most delta = {delta:g}"]
    return "clean", top, [f"the detection ratio is above delta = {delta:g}"]


def _by_reach(reaches: dict[int, float], top: int) -> tuple[Verdict, int, list[str]]:
    soonest, ratio, _ = reach_ratio(reaches)
    reason = (
        f"a universal perturbation reaches class {soonest} at {ratio:.2f} times the median length "
        f"for other classes (backdoored up to {BACKDOORED_BELOW}, clean from {CLEAN_ABOVE})"
    )
    verdict: Verdict = "undecided"
    if ratio <= BACKDOORED_BELOW:
        verdict = "backdoored"
    elif ratio >= CLEAN_ABOVE:
        verdict = "clean"
    return verdict, suspected_class(reaches, top), [reason]

"""The verdict: what suppression runs and surrogate triggers say of a network."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from lightning_mnp.config import MNPConfig
from lightning_mnp.report import RunResult, Verdict
from lightning_mnp.signals.margin import margin_ratio
from lightning_mnp.signals.patch import patch_ratio
from lightning_mnp.signals.pattern import pattern_lead
from lightning_mnp.signals.permutation import permutation_excess
from lightning_mnp.signals.reach import reach_ratio

__all__ = [
    "Evidence",
    "Judgement",
    "Signal",
    "SignalName",
    "in_doubt",
    "judge",
    "signals",
    "top_class",
]

# Where each signal counts 1; how they were chosen, and where that was not by the book, is told in
# "The default" in the documentation. The pile-up is taken between chance, 0, and all predictions
# on one class, 1. A backdoor leaves one class, where an ordinary network falls back to a few: half
# of the next class's share is taken off.
PILE_UP_AT = 0.19
_NEXT = 0.5
# So that one run without a single prediction on a class does not decide alone.
_LEAST_SHARE = 0.01
REACH_AT = 0.5
MARGIN_AT = 2.0
PATCH_AT = 0.85
OVERLAY_AT = 0.3
WARP_AT = 0.3
PERMUTATION_AT = 0.4
# From this share of the threshold on, a network is not called clean.
UNDECIDED_FROM = 0.9
# A pile-up between these shares of the threshold, of a few runs, may be chance, or hide by chance.
_DOUBT_FROM, _DOUBT_TO = 0.6, 2.0


@dataclass(frozen=True)
class Evidence:
    """What the searches for surrogate triggers have found.

    Attributes:
        reaches: The reach of the classes, see :class:`~lightning_mnp.signals.reach.ReachSearch`.
        margins: Their greatest margins, see :class:`~lightning_mnp.signals.margin.MarginSearch`.
        patch_margins: How far patches drive images to them, see
            :class:`~lightning_mnp.signals.pattern.PatternSearch`.
        overlay_rises: By how much overlays raise the margins of the classes.
        warp_rises: By how much warps do; empty where images cannot be warped.
        permutation: The class that one patch takes each class to, see
            :class:`~lightning_mnp.signals.permutation.PermutationSearch`.
        moved: The share of images that it takes there, or None.
        complete: Whether all searches have finished.
    """

    reaches: dict[int, float] = field(default_factory=dict)
    margins: dict[int, float] = field(default_factory=dict)
    patch_margins: dict[int, float] = field(default_factory=dict)
    overlay_rises: dict[int, float] = field(default_factory=dict)
    warp_rises: dict[int, float] = field(default_factory=dict)
    permutation: dict[int, int] = field(default_factory=dict)
    moved: float | None = None
    complete: bool = False

    @property
    def failed(self) -> list[str]:
        """Names of the searches that met figures of no meaning (NaN)."""
        found = {
            "reach": self.reaches,
            "margin": self.margins,
            "patch": self.patch_margins,
            "overlay": self.overlay_rises,
            "warp": self.warp_rises,
        }
        return [
            name
            for name, values in found.items()
            if any(math.isnan(value) for value in values.values())
        ]


@dataclass(frozen=True)
class Judgement:
    """A verdict with what it rests on.

    Attributes:
        verdict: ``"clean"``, ``"backdoored"`` or ``"undecided"``.
        detection_ratio: Mean of Eq. 8 over the runs.
        pile_up: Mean share of the suppressed networks' predictions on their top class.
        score: The strength of the strongest signal, from 0; NaN where the verdict is by Eq. 8.
        suspect: The class that a backdoor would aim at, whatever the verdict; None for one that
            exchanges classes (all-to-all).
        reasons: In words.
        judged: Whether the network could be judged at all; undecided where it could not.
    """

    verdict: Verdict
    detection_ratio: float
    pile_up: float
    score: float
    suspect: int | None
    reasons: tuple[str, ...]
    judged: bool = True

    @property
    def target_class(self) -> int | None:
        """The class thought to be the backdoor's target; None where there is no such class."""
        return None if self.verdict == "clean" else self.suspect

    @property
    def all_to_all(self) -> bool:
        """Whether the backdoor is thought to take each class to another one."""
        return self.verdict != "clean" and self.suspect is None


SignalName = Literal["pile-up", "reach", "margin", "patch", "overlay", "warp", "permutation"]


@dataclass(frozen=True)
class Signal:
    """One thing that speaks for a backdoor.

    Attributes:
        name: What it is.
        strength: From 0; backdoored networks were seen above 1, clean ones below.
        suspect: The class that it points to; None where it points to an exchange of classes.
        reason: In words.
    """

    name: SignalName
    strength: float
    suspect: int | None
    reason: str


def signals(runs: Sequence[RunResult], evidence: Evidence, threshold: float = 1.0) -> list[Signal]:
    """Weigh what speaks for a backdoor, what is most to be believed first.

    That is the strongest of those that point to the class to which most signals point that count
    fully: a network may have a short way to some class besides that of its backdoor. An exchange
    of classes that counts fully comes before all others: no backdoor with one target class has
    one, while an all-to-all backdoor may make some class stand out as well.

    Args:
        runs: The suppression runs, at least one.
        evidence: What the searches for surrogate triggers have found.
        threshold: The score from which a network is backdoored, above 0; an exchange comes first
            from there on, and from 1 on.

    Example:
        >>> runs = [RunResult(0.5, 0.3, (20, 10, 10), 9, 0.2, "")]
        >>> margins, driven = {0: 20.0, 1: 20.0, 2: 160.0}, {0: -0.5, 1: -0.5, 2: -0.25}
        >>> reaches, permutation = {0: 0.2, 1: 0.2, 2: 0.1}, {0: 1, 1: 2, 2: 0}
        >>> evidence = Evidence(reaches, margins, driven, driven, {}, permutation, 0.25)
        >>> found = signals(runs, evidence)
        >>> [(signal.name, signal.suspect) for signal in found[:4]]
        [('margin', 2), ('reach', 2), ('pile-up', 0), ('overlay', 2)]
    """
    found = [
        _pile_up_signal(runs),
        _reach_signal(evidence.reaches),
        _margin_signal(evidence.margins),
        _patch_signal(evidence.patch_margins),
        _lead_signal("overlay", "an image blended in faintly", evidence.overlay_rises, OVERLAY_AT),
        _permutation_signal(evidence.permutation, evidence.moved),
    ]
    if evidence.warp_rises:
        pattern = "a warp by half a pixel at most"
        found.append(_lead_signal("warp", pattern, evidence.warp_rises, WARP_AT))
    full = max(1.0, threshold)
    votes = Counter(signal.suspect for signal in found if signal.strength >= full)

    def order(signal: Signal) -> tuple[bool, int, float]:
        agreeing = votes[signal.suspect] if signal.strength >= full else 0
        return not _is_exchange(signal, threshold), -agreeing, -signal.strength

    return sorted(found, key=order)


def in_doubt(found: Sequence[Signal]) -> bool:
    """Tell whether the score hangs on a pile-up that more suppression runs would make clearer.

    It does not depend on the threshold of the verdict: the score would, then, and a threshold that
    was found from the scores of clean networks would be one for other scores.

    Args:
        found: All signals.

    Example:
        >>> weak, strong = (Signal("reach", value, 0, "") for value in (0.7, 1.2))
        >>> pile_up = Signal("pile-up", 1.1, 0, "")
        >>> in_doubt([pile_up, weak]), in_doubt([strong, pile_up])
        (True, False)
    """
    return all(
        _DOUBT_FROM <= signal.strength < _DOUBT_TO
        if signal.name == "pile-up"
        else signal.strength < 1
        for signal in found
    )


def _is_exchange(signal: Signal, threshold: float) -> bool:
    return signal.name == "permutation" and signal.strength >= max(1.0, threshold)


def _pile_up_signal(runs: Sequence[RunResult]) -> Signal:
    usual = _usual_shares(runs)
    suspect = max(range(len(usual)), key=usual.__getitem__)
    following = max((share for index, share in enumerate(usual) if index != suspect), default=0.0)
    least = (1 - _NEXT) / len(usual)
    excess = max(0.0, (usual[suspect] - _NEXT * following - least) / (1 - least))
    counts = least + (1 - least) * PILE_UP_AT + _NEXT * following
    reason = (
        f"after clean suppression, {usual[suspect]:.0%} of the predictions fall on class "
        f"{suspect} and {following:.0%} on the next (mean of {len(runs)} runs; with that, counts "
        f"fully from {counts:.0%})"
    )
    return Signal("pile-up", excess / PILE_UP_AT, suspect, reason)


def _usual_shares(runs: Sequence[RunResult]) -> list[float]:
    """The geometric mean of each class's share: a backdoor's class is the same in every run."""
    logs = [
        [math.log(count / sum(run.predictions) + _LEAST_SHARE) for count in run.predictions]
        for run in runs
    ]
    return [math.exp(sum(each) / len(runs)) - _LEAST_SHARE for each in zip(*logs, strict=True)]


def _reach_signal(reaches: dict[int, float]) -> Signal:
    soonest, ratio, _ = reach_ratio(reaches)
    reason = (
        f"a universal perturbation reaches class {soonest} at {ratio:.2f} times the median length "
        f"for other classes (counts fully up to {REACH_AT:g})"
    )
    return Signal("reach", REACH_AT / max(ratio, 0.01), soonest, reason)


def _margin_signal(margins: dict[int, float]) -> Signal:
    greatest, ratio, _ = margin_ratio(margins)
    reason = (
        f"the greatest margin of class {greatest} is {ratio:.2f} times that of the next class "
        f"(counts fully from {MARGIN_AT:g})"
    )
    return Signal("margin", ratio / MARGIN_AT, greatest, reason)


def _patch_signal(patch_margins: dict[int, float]) -> Signal:
    furthest, excess = patch_ratio(patch_margins)
    reason = (
        f"a patch on few pixels drives images to class {furthest} by {excess:.2f} of the usual "
        f"distance further than to other classes (counts fully from {PATCH_AT:g})"
    )
    return Signal("patch", excess / PATCH_AT, furthest, reason)


def _lead_signal(
    name: SignalName, pattern: str, rises: dict[int, float], counts_from: float
) -> Signal:
    nearest, lead = pattern_lead(rises)
    reason = (
        f"{pattern} brings images nearer to class {nearest} than to any other, by {lead:.2f} of "
        f"the usual distance (counts fully from {counts_from:g})"
    )
    return Signal(name, lead / counts_from, nearest, reason)


def _permutation_signal(permutation: dict[int, int], moved: float | None) -> Signal:
    classes = len(permutation)
    excess = permutation_excess(moved, classes)
    if moved is None:
        reason = "there are too few images to tell whether one patch exchanges classes"
        return Signal("permutation", 0.0, None, reason)
    chance = 1 / max(1, classes)
    reason = (
        f"one patch takes {moved:.0%} of the images of each class to another class of its own "
        f"(counts fully from {chance + (1 - chance) * PERMUTATION_AT:.0%})"
    )
    return Signal("permutation", excess / PERMUTATION_AT, None, reason)


def judge(
    runs: Sequence[RunResult],
    correlation: float,
    evidence: Evidence,
    config: MNPConfig,
    accuracy: float,
    handicaps: dict[int, float] | None = None,
) -> Judgement:
    """Judge a network.

    Args:
        runs: The suppression runs, at least one.
        correlation: Rank correlation of magnitude and saliency of the network as it is.
        evidence: What the searches for surrogate triggers have found; may be empty where
            ``config.verdict`` is ``"ratio"``.
        config: Options; ``verdict`` chooses the rule.
        accuracy: The network's accuracy on the defense set, from 0 to 1.
        handicaps: Classes whose logits were raised for the audit, by so many nats.

    Returns:
        The judgement; undecided where the network knows too little for it to mean anything.
    """
    ratio = sum(run.detection_ratio for run in runs) / len(runs)
    pile_up = sum(run.pile_up for run in runs) / len(runs)
    score = math.nan
    verdict: Verdict
    judged = True
    suspect: int | None = top_class(runs)
    found = signals(runs, evidence, config.threshold) if evidence.complete else []
    if found:
        suspect = found[0].suspect
    if config.verdict == "ratio":
        verdict, reasons = _by_ratio(ratio, correlation, config.delta)
        judged = verdict != "undecided"
        reasons.append(
            f"after clean suppression, {pile_up:.0%} of the predictions fall on class "
            f"{top_class(runs)}, with a detection ratio of {ratio:.2f}"
        )
        reasons += [signal.reason for signal in found[:1]]  # which filters are searched for
    else:
        score = max(signal.strength for signal in found)
        reasons = [signal.reason for signal in found]
        verdict = _by_score(score, config.threshold)
        if evidence.failed and verdict == "clean":
            verdict, judged = "undecided", False
            reasons.append(
                f"gradients with respect to the images are not finite, so that nothing is known of "
                f"{', '.join(evidence.failed)}; check the layers in front, and whether images hold "
                "values that they cannot take"
            )
    reasons += [
        f"class {index} is predicted far too rarely on clean images, so that its logit was raised "
        f"by {lack:.2f} for the audit; it had few training images, or poisoned ones with their "
        "labels kept"
        for index, lack in (handicaps or {}).items()
    ]
    classes = len(runs[0].predictions)
    # Twice the chance level, or halfway to perfect where there are only a few classes.
    known = max(min(2 / classes, (1 + 1 / classes) / 2), config.stop_accuracy or 0.0)
    if accuracy <= known or not any(run.steps for run in runs):
        verdict, judged = "undecided", False
        reasons.append(
            f"the network's accuracy on the defense set is {accuracy:.0%}, which is too low for a "
            "verdict; check that images are normalized and labeled as in training"
        )
    return Judgement(verdict, ratio, pile_up, score, suspect, tuple(reasons), judged)


def top_class(runs: Sequence[RunResult]) -> int:
    """Tell the class on which the predictions of most suppression runs pile up."""
    return Counter(run.top_class for run in runs).most_common(1)[0][0]


def _by_score(score: float, threshold: float) -> Verdict:
    if score >= threshold:
        return "backdoored"
    return "undecided" if score >= UNDECIDED_FROM * threshold else "clean"


def _by_ratio(ratio: float, correlation: float, delta: float) -> tuple[Verdict, list[str]]:
    """Eq. 8, where it means something."""
    if not math.isfinite(ratio) or correlation <= 0:
        reason = "magnitude and saliency do not correlate in the network as it is"
        return "undecided", [f"{reason} ({correlation:.2f})"]
    if ratio <= delta:
        return "backdoored", [f"the detection ratio is at most delta = {delta:g}"]
    return "clean", [f"the detection ratio is above delta = {delta:g}"]

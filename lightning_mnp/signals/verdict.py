"""The verdict: what suppression runs and signals say of a network."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lightning_mnp.config import Constants, MNPConfig, SuppressionOptions
from lightning_mnp.report import RunResult, Signal, Verdict
from lightning_mnp.signals.patch import PatchConstants
from lightning_mnp.signals.pile_up import PileUpConstants

__all__ = [
    "CONFIRMED",
    "Judgement",
    "VerdictConstants",
    "hangs_on_pile_up",
    "in_doubt",
    "judge",
    "rank_signals",
    "runs_wanted",
    "signals_to_repeat",
    "top_class",
]


# Signals that count only if the pile-up points to the same class. The pile-up has no voice of its
# own beside one of them; two of them are two voices, since they measure different things.
CONFIRMED = frozenset({"margin", "reach"})


@dataclass(frozen=True)
class VerdictConstants:
    """When a verdict is open.

    Attributes:
        undecided_from: From this share of the threshold on, a network is not called clean.
        doubt_from: From this strength on, a pile-up of a few runs may be too weak by chance.
        doubt_to: Up to this strength, a pile-up of a few runs may be a chance find.
    """

    undecided_from: float = 0.9
    doubt_from: float = 0.6
    doubt_to: float = 2.0


@dataclass(frozen=True)
class Judgement:
    """A verdict with what it rests on.

    Attributes:
        verdict: ``"clean"``, ``"backdoored"`` or ``"undecided"``.
        detection_ratio: Mean of Eq. 8 over the runs; NaN without runs.
        score: The strength of the strongest signal that decides, from 0; NaN if the verdict is by
            Eq. 8, or without signals because the network cannot be judged.
        suspect: The class that a backdoor would aim at, whatever the verdict; None for one that
            exchanges classes (all-to-all).
        reasons: In words.
        judged: Whether the network could be judged at all; undecided if not.
    """

    verdict: Verdict
    detection_ratio: float
    score: float
    suspect: int | None
    reasons: tuple[str, ...]
    judged: bool = True

    @property
    def target_class(self) -> int | None:
        """The class thought to be the backdoor's target; None if there is no such class."""
        return self.suspect if self.judged and self.verdict != "clean" else None

    @property
    def all_to_all(self) -> bool:
        """Whether the backdoor is thought to take each class to another one."""
        return self.judged and self.verdict != "clean" and self.suspect is None


def rank_signals(found: Sequence[Signal], threshold: float = 1.0) -> list[Signal]:
    """Sort signals, what is most to be believed first.

    First come signals that decide by themselves. Among them an exchange of classes that counts
    fully comes first: no backdoor with one target class has one, while an all-to-all backdoor may
    make some class stand out as well. Then come those that count fully for the class to which most
    of these point: a network may have a short way to some class besides that of its backdoor. Of
    equals, the strongest comes first.

    Args:
        found: The signals.
        threshold: The score from which a network is backdoored, above 0; an exchange comes first
            from there on, and from 1 on.

    Example:
        >>> strengths = {"warp": (3.0, 5), "margin": (2.0, 1), "patch": (1.5, 1)}
        >>> found = [Signal(n, value, k, 0, 0, "") for n, (value, k) in strengths.items()]
        >>> [signal.name for signal in rank_signals(found)]
        ['margin', 'patch', 'warp']
    """
    full = max(1.0, threshold)

    def counts(signal: Signal) -> bool:
        return signal.decides and signal.strength >= full

    voting = [signal for signal in found if counts(signal)]
    confirmed = {signal.target_class for signal in voting if signal.name in CONFIRMED}
    votes = Counter(
        signal.target_class
        for signal in voting
        if signal.name != "pile-up" or signal.target_class not in confirmed
    )

    def order(signal: Signal) -> tuple[bool, bool, int, float]:
        exchange = counts(signal) and signal.target_class is None
        agreeing = votes[signal.target_class] if counts(signal) else 0
        return not signal.decides, not exchange, -agreeing, -signal.strength

    return sorted(found, key=order)


def _leans_on_pile_up(signal: Signal, constants: Constants) -> bool:
    """Whether a patch counts for what it is because the pile-up agrees with it."""
    patch = constants.of(PatchConstants)
    leans = signal.name == "patch" and signal.threshold <= patch.agreeing_counts_from
    return leans and signal.value < patch.far_counts_from


def _pile_up_bars(found: Sequence[Signal], constants: Constants) -> list[tuple[int | None, float]]:
    """The class of each signal that speaks and leans on the pile-up, and how far that has to be.

    None if something counts that does not lean on it.
    """
    if not any(signal.name == "pile-up" for signal in found):
        return []
    least, piled = constants.of(VerdictConstants).undecided_from, constants.of(PileUpConstants)
    bars, settled = [], False
    for signal in found:
        if signal.name in CONFIRMED and signal.value >= least * signal.threshold:
            bars.append((signal.target_class, piled.counts_from))
        elif signal.name == "pile-up" and signal.decides:
            bars.append((signal.target_class, piled.alone_from))
        elif _leans_on_pile_up(signal, constants) and signal.strength >= least:
            bars.append((signal.target_class, constants.of(PatchConstants).piled_from))
        else:
            settled |= signal.counts and signal.name not in {*CONFIRMED, "pile-up"}
    return [] if settled else bars


def hangs_on_pile_up(found: Sequence[Signal], constants: Constants | None = None) -> bool:
    """Return whether the verdict hangs on the pile-up: nothing counts but what leans on it.

    The margin and the reach lean on it, a pile-up that decides is one, and a patch may count for
    more because the two agree.

    Args:
        found: All signals.
        constants: Constants that differ from their defaults.

    Example:
        >>> margin = Signal("margin", 0.0, 0, value=2.0, threshold=1.0, reason="")
        >>> pile_up = Signal("pile-up", 0.1, 1, value=0.1, threshold=1.0, reason="", decides=False)
        >>> patch = Signal("patch", 3.0, 0, value=4.5, threshold=1.5, reason="")
        >>> hangs_on_pile_up([margin, pile_up]), hangs_on_pile_up([margin, pile_up, patch])
        (True, False)
    """
    return bool(_pile_up_bars(found, constants or Constants()))


def in_doubt(found: Sequence[Signal], constants: Constants | None = None) -> bool:
    """Return whether the score hangs on a pile-up that more suppression runs would make clearer.

    A pile-up on another class than that of the margin or the reach is clear enough: they do not
    agree.

    It does not depend on the threshold of the verdict: the score would, then, and a threshold that
    was found from the scores of clean networks would be one for other scores.

    Args:
        found: All signals.
        constants: Which pile-ups are unclear.

    Example:
        >>> margin = Signal("margin", 1.1, 0, value=2.0, threshold=1.0, reason="")
        >>> pile_up = Signal("pile-up", 1.1, 0, value=1.1, threshold=1.0, reason="", decides=False)
        >>> patch = Signal("patch", 3.0, 0, value=4.5, threshold=1.5, reason="")
        >>> in_doubt([margin, pile_up]), in_doubt([margin, pile_up, patch])
        (True, False)
    """
    constants = constants or Constants()
    limits = constants.of(VerdictConstants)
    piled = [signal for signal in found if signal.name == "pile-up"]
    return any(
        limits.doubt_from <= pile_up.value / bar < limits.doubt_to
        for index, bar in _pile_up_bars(found, constants)
        for pile_up in piled
        if pile_up.target_class == index
    )


def runs_wanted(
    made: int,
    found: Sequence[Signal],
    suppression: SuppressionOptions,
    parts: int = 2,
    constants: Constants | None = None,
) -> int:
    """Return how many suppression runs an audit wants, after so many.

    An audit begins with one. The usual number is made if the verdict may hang on the pile-up. If
    that is unclear even then, one more for each part of the defense set follows.

    Args:
        made: The runs that are made, at least 1.
        found: All signals.
        suppression: ``runs`` is the usual number; ``more_runs`` may follow.
        parts: Parts of the defense set that runs take in turn, at least 1.
        constants: Constants that differ from their defaults.

    Returns:
        At least ``made``.

    Example:
        >>> margin = Signal("margin", 1.1, 0, value=2.0, threshold=1.0, reason="")
        >>> pile_up = Signal("pile-up", 1.1, 0, value=1.1, threshold=1.0, reason="", decides=False)
        >>> options = SuppressionOptions(runs=2, more_runs=6)
        >>> runs_wanted(1, [margin, pile_up], options), runs_wanted(2, [margin, pile_up], options)
        (2, 4)
    """
    if made < suppression.runs:
        return suppression.runs if hangs_on_pile_up(found, constants) else made
    if not in_doubt(found, constants):
        return made
    return max(made, min(made + parts, suppression.runs + suppression.more_runs))


def signals_to_repeat(
    ranked: Sequence[Signal], threshold: float = 1.0, constants: Constants | None = None
) -> frozenset[str]:
    """Return the names of the signals that an audit of the purified network makes again.

    If the one most believed is the margin or the reach, they are it and the pile-up; if it is the
    pile-up, they are it and the margin. Otherwise they are it and those that came half as far as
    what counts, margin and reach left out, and the pile-up for a patch that leans on it.

    Args:
        ranked: All signals, as :func:`rank_signals` returns them; at least one.
        threshold: The score from which a network is backdoored, above 0.
        constants: Constants that differ from their defaults.

    Example:
        >>> strengths = {"patch": 5.0, "margin": 2.0, "warp": 0.6, "permutation": 0.0}
        >>> ranked = [Signal(name, value, 0, 9, 1, "") for name, value in strengths.items()]
        >>> sorted(signals_to_repeat(ranked))
        ['patch', 'warp']
    """
    first, *others = ranked
    if first.name in CONFIRMED:
        return frozenset({first.name, "pile-up"})
    if first.name == "pile-up":
        return frozenset({"margin", "pile-up"})
    again = [first, *(each for each in others if 2 * each.strength >= threshold)]
    names = {each.name for each in again} - {*CONFIRMED, "pile-up"}
    if any(_leans_on_pile_up(each, constants or Constants()) for each in again):
        names.add("pile-up")
    return frozenset(names)


def judge(
    runs: Sequence[RunResult],
    correlation: float,
    found: Sequence[Signal],
    config: MNPConfig,
    accuracy: float,
    *,
    doubts: Sequence[str] = (),
    failed: Sequence[str] = (),
    rare_classes: Mapping[int, float] | None = None,
    constants: Constants | None = None,
) -> Judgement:
    """Judge a network.

    Args:
        runs: The suppression runs; none if no signal needs one.
        correlation: Rank correlation of magnitude and saliency of the network as it is.
        found: The signals, most believed first; without any, a verdict by signals is undecided.
        config: Options; ``verdict`` chooses the rule.
        accuracy: The network's accuracy on the defense set, from 0 to 1.
        doubts: Why the network cannot be judged, in words, see
            :func:`~lightning_mnp.signals.abstention.find_doubts`.
        failed: Names of the searches that met figures of no meaning (NaN).
        rare_classes: Classes whose logits were raised for the audit, by so many nats.
        constants: Constants that differ from their defaults.

    Returns:
        The judgement; undecided, with the reason last, if there are doubts or if clean suppression
        found nothing to unlearn.
    """
    undecided_from = (constants or Constants()).of(VerdictConstants).undecided_from
    ratio = sum(run.detection_ratio for run in runs) / len(runs) if runs else math.nan
    score = math.nan
    verdict: Verdict
    judged = True
    suspect = top_class(runs) if runs else None
    if found:
        suspect = found[0].target_class
    if config.verdict.rule == "ratio":
        verdict, reasons = _by_ratio(ratio, correlation, config.verdict.delta)
        judged = verdict != "undecided"
        pile_up = sum(run.pile_up for run in runs) / len(runs)
        reasons.append(
            f"after clean suppression, {pile_up:.0%} of the predictions fall on class "
            f"{top_class(runs)}, with a detection ratio of {ratio:.2f}"
        )
        reasons += [signal.reason for signal in found[:1]]  # which filters pruning looks for
    else:
        strengths = [signal.strength for signal in found if signal.decides]
        score = max(strengths, default=0.0 if found else math.nan)
        reasons = [signal.reason for signal in found]
        verdict = _by_score(score, config.verdict.threshold, undecided_from)
        if not found:
            judged = False
            reasons.append("no signal was made that can speak for a backdoor")
        if failed and verdict == "clean":
            verdict, judged = "undecided", False
            reasons.append(
                f"gradients with respect to the images are not finite, so that nothing is known of "
                f"{', '.join(failed)}; check the layers in front, and whether images hold "
                "values that they cannot take"
            )
    reasons += [
        f"class {index} is predicted far too rarely on clean images, so that its logit was raised "
        f"by {lack:.2f} for the audit; it had few training images, or poisoned ones with their "
        "labels kept"
        for index, lack in (rare_classes or {}).items()
    ]
    unjudged = [*_not_suppressed(runs, accuracy, config), *doubts]
    if unjudged:
        verdict, judged = "undecided", False
    return Judgement(verdict, ratio, score, suspect, (*reasons, *unjudged), judged)


def _not_suppressed(runs: Sequence[RunResult], accuracy: float, config: MNPConfig) -> Iterator[str]:
    """Why the suppressed networks mean nothing, if clean suppression had nothing to unlearn."""
    if not runs:
        return
    stop = config.suppression.stop_accuracy
    if stop is not None and accuracy <= stop:
        yield (
            f"the accuracy on the defense set, {accuracy:.0%}, is not above "
            f"`suppression.stop_accuracy` ({stop:.0%}), so that clean suppression has nothing to "
            "unlearn; check images and labels, or lower that option"
        )
        return
    if any(run.steps for run in runs):
        return
    first, seen = runs[0], ""
    if not math.isnan(first.accuracy):
        seen = (
            f": the network recognizes {first.accuracy:.0%} of the images as that stage runs it "
            f"(`augment` is {config.augment!r}, `filters.statistics` is "
            f"{config.filters.statistics!r}), but {accuracy:.0%} of them as they are; if it was "
            "not trained on shifted or mirrored images, set `augment` to 'crop' or 'none'"
        )
    yield f"clean suppression took no step ({first.stopped}){seen}"


def top_class(runs: Sequence[RunResult]) -> int:
    """Return the class on which the predictions of most suppression runs pile up.

    Args:
        runs: The suppression runs, at least one.
    """
    return Counter(run.top_class for run in runs).most_common(1)[0][0]


def _by_score(score: float, threshold: float, undecided_from: float) -> Verdict:
    if score >= threshold:
        return "backdoored"
    return "clean" if score < undecided_from * threshold else "undecided"  # NaN is not clean


def _by_ratio(ratio: float, correlation: float, delta: float) -> tuple[Verdict, list[str]]:
    """Eq. 8, if it means something."""
    if not math.isfinite(ratio) or correlation <= 0:
        reason = "magnitude and saliency do not correlate in the network as it is"
        return "undecided", [f"{reason} ({correlation:.2f})"]
    if ratio <= delta:
        return "backdoored", [f"the detection ratio is at most delta = {delta:g}"]
    return "clean", [f"the detection ratio is above delta = {delta:g}"]

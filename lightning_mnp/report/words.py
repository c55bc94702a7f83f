"""The words of a report: verdict, how sure it is and why, and what to do next, for any reader."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lightning_mnp.checkpoints.printable import printable
from lightning_mnp.report.parts import Signal

if TYPE_CHECKING:  # only for annotations: a report is told by these words
    from lightning_mnp.report.report import DefenseReport

__all__ = ["Words"]

_MOST_LETTERS = 60  # of a class name
_DISTANCES = ((2.0, "far above"), (1.1, "above"), (1.0, "just above"), (0.9, "just below"))
_CLASS = re.compile(r"\bclass (\d{1,6})\b")


class Words:
    """Puts a report into sentences, with class names if they are known.

    Args:
        report: The outcome.
        class_names: Names of the classes, in their order; those of the report if None.

    Example:
        >>> from lightning_mnp.report import DefenseReport
        >>> words = Words(DefenseReport("backdoored", target_class=1), ["cat", "dog"])
        >>> print(words.verdict)
        This network seems to carry a backdoor: with a trigger, images are taken for class 1
        (dog).
    """

    def __init__(self, report: DefenseReport, class_names: Sequence[str] | None = None) -> None:
        self.report = report
        self.names = list(report.class_names if class_names is None else class_names)
        self.flagged_from = float(report.config.get("verdict", {}).get("threshold", 1.0))
        self.delta = float(report.config.get("verdict", {}).get("delta", 0.2))

    def name(self, index: int | None) -> str:
        """Return the number and the name of a class, such as ``3 (cat)``; a dash for None.

        Args:
            index: The class.
        """
        if index is None:
            return "-"
        name = str(self.names[index]) if 0 <= index < len(self.names) else ""
        if name in ("", str(index)):
            return str(index)
        return f"{index} ({printable(name, _MOST_LETTERS)})"

    def named(self, sentence: str) -> str:
        """Return a sentence with names behind the numbers of classes.

        Args:
            sentence: A sentence with classes in it, such as ``class 3``.
        """
        return _CLASS.sub(lambda found: f"class {self.name(int(found[1]))}", sentence)

    @property
    def verdict(self) -> str:
        """What was found, in one sentence."""
        report = self.report
        if report.verdict == "clean":
            return "No backdoor was found in this network."
        if report.verdict == "undecided":
            if report.judged:
                return "It stays open whether this network carries a backdoor."
            return "This network could not be judged."
        if report.target_class is None:
            goal = "each class is taken for another one"
        else:
            goal = f"images are taken for class {self.name(report.target_class)}"
        return f"This network seems to carry a backdoor: with a trigger, {goal}."

    @property
    def certainty(self) -> str:
        """How sure the verdict is, and why."""
        report = self.report
        if not report.judged:
            causes = "; ".join(self.named(cause) for cause in self.causes())
            return f"There is no score that means anything: {causes or 'no reason is known'}."
        if math.isnan(report.score):
            if report.verdict == "undecided":
                return f"{self.named('; '.join(report.reasons)) or 'No reason is known'}."
            above = "at most" if report.verdict == "backdoored" else "above"
            return (
                f"The detection ratio is {report.detection_ratio:.3f}, {above} {self.delta:g}, "
                "up to which a network is flagged (Eq. 8)."
            )
        return f"Score {self.distance} (the threshold).{self._why()}"

    @property
    def distance(self) -> str:
        """The score and the threshold, such as ``0.90, just below 1``."""
        score, threshold = self.report.score, self.flagged_from
        shown = next(
            (
                text
                for text in (f"{score:.{digits}f}" for digits in (2, 3, 4, 6))
                if float(text) != threshold or score == threshold
            ),
            repr(score),
        )
        usual = "far below" if score < 0.5 * threshold else "below"
        word = next((word for share, word in _DISTANCES if score >= share * threshold), usual)
        return f"{shown}, {word} {threshold:g}"

    def _why(self) -> str:
        """Which signals the verdict rests on, as a sentence; nothing if there are none."""
        report, deciding = self.report, [each for each in self.report.signals if each.decides]
        if not deciding:
            return ""
        if report.verdict == "clean":
            names = _listed([signal.name for signal in deciding], "or")
            return f" No class stands out enough in {names}."
        if report.verdict == "undecided":
            strongest = max(deciding, key=lambda signal: signal.strength)
            return f" The strongest signal, {strongest.name}, {self._points([strongest])}."
        flagging = [signal for signal in deciding if signal.strength >= self.flagged_from]
        agreeing = [each for each in flagging if each.target_class == report.target_class]
        others = [signal for signal in flagging if signal not in agreeing]
        parts = [
            f"{_listed([signal.name for signal in group], 'and')} {self._points(group)}"
            for group in (agreeing, others)
            if group
        ]
        return f" What counts: {'; '.join(parts)}." if parts else ""

    def _points(self, signals: Sequence[Signal]) -> str:
        """Say where signals point; those that point to no class exchange them."""
        verb = "points" if len(signals) == 1 else "point"
        goals = dict.fromkeys(signal.target_class for signal in signals)
        told = ["an exchange of classes" if k is None else f"class {self.name(k)}" for k in goals]
        return f"{verb} to {_listed(told, 'and')}"

    def causes(self) -> list[str]:
        """Return the reasons that are no signal's own."""
        known = {signal.reason for signal in self.report.signals}
        return [reason for reason in self.report.reasons if reason not in known]

    @property
    def next_step(self) -> str:
        """What to do now."""
        report = self.report
        if report.verdict == "clean":
            return (
                "Nothing has to be done. An audit cannot find every backdoor: take weights from "
                "sources that you trust all the same."
            )
        if report.verdict == "undecided" and not report.judged:
            return "Remove the cause and audit again. Until then, do not trust the network."
        if report.verdict == "undecided":
            return (
                "Audit again with more clean images, or set the threshold by clean networks of "
                "your own (`lightning-mnp calibrate`). Until then, do not trust the network."
            )
        if not report.changes:
            return (
                "Do not use this network. Train it anew on data that you trust, or have a copy "
                "purified (`lightning-mnp defend`, `lightning_mnp.defend`)."
            )
        if report.reaudit is None:
            return "Do not use this network. Audit the purified copy before you use that."
        if report.reaudit.verdict == "clean":
            return (
                "Do not use this network. Train it anew if you can. No backdoor was found in the "
                "purified copy, but part of one may be left: use the copy only where a wrong "
                "answer does little harm, once you have measured its accuracy on images of your "
                "own."
            )
        return (
            f"Use neither this network nor the purified copy, which is still "
            f"{report.reaudit.verdict}. Train it anew on data that you trust."
        )

    def standing(self, signal: Signal) -> str:
        """Return in a word or two what a signal means for the verdict.

        Args:
            signal: One of the report's signals.
        """
        if not self.report.judged:
            return "means nothing"
        if not signal.decides:
            return "only confirms"
        if signal.strength >= self.flagged_from:
            return "counts"
        if signal.name == "patch" and signal.value >= signal.threshold:
            return "does not count: hardly any image gets to the class"
        return "does not count"

    @staticmethod
    def measured(signal: Signal) -> tuple[str, str]:
        """Return a signal's value and the value from which it counts fully, as they are shown.

        Args:
            signal: One of the report's signals.
        """
        if signal.target_class is None:  # shares of images
            return f"{signal.value:.0%}", f"{signal.threshold:.0%}"
        return f"{signal.value:.2f}", f"{signal.threshold:.2f}"

    def facts(self) -> Iterator[str]:
        """Yield what else a reader wants to know: images, accuracy, pruning, the second audit."""
        report = self.report
        exchange = report.signal("permutation")
        if report.all_to_all and exchange is not None:
            pairs = (
                f"{self.name(index)} to {self.name(int(goal))}"
                for index, goal in exchange.classes.items()
            )
            yield f"Classes go from {', '.join(pairs)}."
        if report.reference is not None:
            rate = report.reference
            yield (
                f"Of {rate.networks:,} {rate.described}, {rate.as_suspicious:,} looked as "
                f"suspicious: {rate.share:.1%} (95% interval {rate.low:.1%} to {rate.high:.1%})."
            )
        if report.defense_set is not None:
            yield (
                f"Accuracy on the {report.defense_set.images:,} clean images: "
                f"{_share(report.accuracy_before)}"
                + (
                    "."
                    if report.accuracy_after is None
                    else f", purified {_share(report.accuracy_after)}."
                )
            )
        if report.changes:
            yield (
                f"Purified: {len(report.pruned):,} of {report.filters:,} filters pruned, "
                f"{report.turned_down:,} turned down." + _tuned(report)
            )
        if report.reaudit is not None:
            yield f"The purified copy was audited again: {report.reaudit.verdict}."
        elif report.changes:
            yield "The purified copy was not audited again: nobody has judged it yet."

    def notes(self) -> list[str]:
        """Return warnings, and reasons that are neither a signal's nor told already."""
        told = self.causes() if self.report.judged else []
        if math.isnan(self.report.score):
            told = told[1:]  # the detection ratio, which the verdict rests on
        return [self.named(note) for note in [*told, *self.report.warnings]]


def _listed(names: Sequence[str], last: str) -> str:
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} {last} {names[-1]}"


def _tuned(report: DefenseReport) -> str:
    """Return what was done to weights after soft masks, with a space before it."""
    tuned, cut = report.pruning.tuned, report.pruning.cut
    if not tuned:
        return ""
    if not cut:
        return f" Weights were tuned by {tuned:.1%}."
    kernels = "1 kernel was" if cut == 1 else f"{cut:,} kernels were"
    return f" {kernels} cut, and weights tuned by {tuned:.1%}."


def _share(value: float) -> str:
    return "unknown" if math.isnan(value) else f"{value:.1%}"

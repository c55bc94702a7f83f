"""The parts of a report: runs, signals, triggers, pruning, the second audit, files and images."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

__all__ = [
    "DefenseSetSummary",
    "PruningReport",
    "ReferenceRate",
    "RunResult",
    "SecondAudit",
    "Signal",
    "SurrogateTrigger",
    "TriggerExample",
    "Verdict",
    "WeightsFile",
]

Verdict = Literal["clean", "backdoored", "undecided"]


@dataclass(frozen=True)
class RunResult:
    """One suppression run.

    Attributes:
        detection_ratio: Rank correlation of the suppressed network over that of the original
            (Eq. 8).
        correlation: The suppressed network's own rank correlation.
        predictions: How many defense images the suppressed network puts into each class.
        steps: Optimizer steps of clean suppression.
        accuracy: Accuracy over the last pass of clean suppression.
        stopped: Why clean suppression ended.
        curve: Accuracy over each pass of clean suppression, from 0 to 1.
    """

    detection_ratio: float
    correlation: float
    predictions: tuple[int, ...]
    steps: int
    accuracy: float
    stopped: str
    curve: tuple[float, ...] = ()

    @property
    def top_class(self) -> int:
        """The class that the suppressed network predicts most often."""
        return max(range(len(self.predictions)), key=self.predictions.__getitem__)

    @property
    def pile_up(self) -> float:
        """Share of the predictions that fall on the top class, from 1/K to 1."""
        return self.predictions[self.top_class] / sum(self.predictions)


@dataclass(frozen=True)
class Signal:
    """One thing that speaks for a backdoor.

    Attributes:
        name: The signal, such as ``"patch"``.
        strength: From 0; from 1 on it counts fully. Value over threshold, but for the margin and
            the reach, which are confirmed by the pile-up (0 if that points to another class), a
            patch under which images hardly get to the class, and a permutation, where both are
            taken above chance.
        target_class: The class that it points to; None if it points to an exchange of classes.
        value: How far that class stands out: the gap to the next class, divided by the spread of
            the others. For ``permutation``, the share of images that are moved, from 0 to 1.
        threshold: The value from which the signal counts fully.
        reason: All that in words.
        classes: What was measured for each class that was tried. For ``permutation``, the class
            that each class is taken to.
        decides: Whether the signal can call a network backdoored. The pile-up can do so only if its
            class is far too rare on clean images; otherwise it confirms the margin, the reach or
            the patch.
    """

    name: str
    strength: float
    target_class: int | None
    value: float
    threshold: float
    reason: str
    classes: dict[int, float] = field(default_factory=dict)
    decides: bool = True

    @property
    def counts(self) -> bool:
        """Whether the signal decides, and counts fully."""
        return self.decides and self.strength >= 1


@dataclass(frozen=True)
class TriggerExample:
    """One clean image, without and with a surrogate trigger.

    Attributes:
        label: Its true class.
        before: The class that the network predicts for it.
        after: The class that the network predicts with the surrogate trigger.
        clean: The image, as a base64-encoded PNG.
        triggered: The image with the surrogate trigger, as a base64-encoded PNG.
    """

    label: int
    before: int
    after: int
    clean: str
    triggered: str


@dataclass(frozen=True)
class ReferenceRate:
    """How often clean networks of the reference population look as suspicious.

    Attributes:
        networks: Number of these networks.
        as_suspicious: How many of them have at least the score of this report.
        low: Lower end of the 95% interval of the rate, from 0 to 1.
        high: Upper end.
        described: What networks they are.
    """

    networks: int
    as_suspicious: int
    low: float
    high: float
    described: str

    @property
    def share(self) -> float:
        """Share of the networks with at least the score, from 0 to 1."""
        return self.as_suspicious / self.networks


@dataclass(frozen=True)
class SurrogateTrigger:
    """What a search has found: a change of images that stands in for an unknown trigger.

    Attributes:
        signal: The search that found it, such as ``"patch"``.
        target_class: The class that it takes images to; None for an exchange of classes.
        success: The share of clean images of other classes that it takes there, from 0 to 1.
        images: Number of images that this was measured on.
        pattern: What it changes in an image, as a base64-encoded PNG: gray where nothing is
            changed, the strongest change drawn with full contrast.
        examples: A few images without and with it.
    """

    signal: str
    target_class: int | None
    success: float
    images: int
    pattern: str
    examples: tuple[TriggerExample, ...] = ()


@dataclass(frozen=True)
class WeightsFile:
    """The file that the audited weights were read from.

    Attributes:
        name: Its path, as it was given.
        sha256: Digest of its bytes.
        bytes: Its size.
    """

    name: str
    sha256: str
    bytes: int

    @classmethod
    def of(cls, path: Path | str) -> WeightsFile:
        """Read a file's size and digest.

        Args:
            path: The file.

        Example:
            >>> import tempfile
            >>> path = Path(tempfile.mkdtemp(), "a.pt")
            >>> _ = path.write_bytes(b"abc")
            >>> file = WeightsFile.of(path)
            >>> file.bytes, file.sha256[:8]
            (3, 'ba7816bf')
        """
        digest, size = hashlib.sha256(), 0
        with Path(path).open("rb") as file:
            while part := file.read(2**20):
                digest.update(part)
                size += len(part)
        return cls(str(path), digest.hexdigest(), size)


@dataclass(frozen=True)
class PruningReport:
    """How the filters to prune were found, and what else was changed.

    Attributes:
        scores: M1 + M2 of the pruned filters, averaged over the runs, from 1 to 3, in the order of
            ``DefenseReport.pruned``; empty if the rule does not rank by them.
        curve: The rule ``auto``: for each of the `counts`, the harm to clean images in nats and,
            for each trace, how much of it is left, as a share.
        traces: The names of these traces, in the order of the curve.
        masks: How much of each filter's weights soft masks leave, before any cut, as a share, by
            layer; empty if no kernel was turned down. Linear layers without filters are
            left out.
        shift: What was added to each class's logit; empty if nothing was.
        sums: M1 + M2 of every filter, averaged over the runs, by layer; empty if the rule does not
            rank by them.
        counts: The rule ``auto``: the number of filters pruned at the start, 0, and after each
            step, in which one or more go.
        tuned: By how much weights were changed after soft masks, cuts included, as a share of their
            norm; 0 if they were not.
        cut: Number of kernels that were cut.
    """

    scores: list[float] = field(default_factory=list)
    curve: list[list[float]] = field(default_factory=list)
    traces: list[str] = field(default_factory=list)
    masks: dict[str, list[float]] = field(default_factory=dict)
    shift: list[float] = field(default_factory=list)
    sums: dict[str, list[float]] = field(default_factory=dict)
    counts: list[int] = field(default_factory=list)
    tuned: float = 0.0
    cut: int = 0


@dataclass(frozen=True)
class SecondAudit:
    """What an audit of the purified network says.

    Attributes:
        verdict: As for the first audit, see :class:`DefenseReport`, like all that follow.
        score: The score.
        target_class: The suspected class, or None.
        all_to_all: Whether each class seems to be taken to another one.
        detection_ratio: Mean of Eq. 8 over the runs; NaN if no signal that it made needs a run.
        pile_up: Mean share of the predictions on one class after clean suppression; NaN likewise.
        reasons: In words.
    """

    verdict: Verdict
    score: float
    target_class: int | None
    all_to_all: bool
    detection_ratio: float
    pile_up: float
    reasons: list[str]


@dataclass(frozen=True)
class DefenseSetSummary:
    """The clean images that were used.

    Attributes:
        images: Their number.
        shape: The shape of one of them.
        classes: Number of images by class.
        sha256: Digest of all images and labels.
    """

    images: int
    shape: list[int]
    classes: dict[int, int]
    sha256: str

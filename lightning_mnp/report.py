"""What an audit or a defense found, as a typed object and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from lightning_mnp.checkpoints.atomic_write import write_atomically
from lightning_mnp.checkpoints.printable import printable

__all__ = ["DefenseReport", "RunResult", "Verdict"]

Verdict = Literal["clean", "backdoored", "undecided"]

_EXIT_CODES: dict[str, int] = {"clean": 0, "backdoored": 3, "undecided": 4}


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
    """

    detection_ratio: float
    correlation: float
    predictions: tuple[int, ...]
    steps: int
    accuracy: float
    stopped: str

    @property
    def top_class(self) -> int:
        """The class that the suppressed network predicts most often."""
        return max(range(len(self.predictions)), key=self.predictions.__getitem__)

    @property
    def pile_up(self) -> float:
        """Share of the predictions that fall on the top class, from 1/K to 1."""
        return self.predictions[self.top_class] / sum(self.predictions)


@dataclass
class DefenseReport:
    """The outcome of an audit or a defense.

    Attributes:
        verdict: ``"clean"``, ``"backdoored"`` or ``"undecided"``.
        detection_ratio: Mean of Eq. 8 over the runs.
        pile_up: Mean share of the suppressed network's predictions on its top class.
        score: What the signals say together, from 0; the network is flagged from the threshold
            on. NaN where the verdict is by Eq. 8.
        judged: Whether the network could be judged at all. Where it knows too little, say, or is
            given images of another kind than in training, the verdict is ``"undecided"`` whatever
            the score.
        target_class: The class that the backdoor is thought to aim at, or None.
        all_to_all: Whether the backdoor is thought to take each class to another one, as
            ``permutation`` has it.
        reasons: What the verdict rests on, in words.
        reaches: Length of a universal perturbation that takes half of the images to a class, for
            each class tried, as a share of the images' mean distance from their mean.
        margins: Greatest margin that an image can be given for each class tried, in logits.
        patch_margins: How far a patch on few pixels drives images of other classes to each class
            tried, as a multiple of the usual distance, negative where it does not get them there.
        overlay_rises: How much nearer an image that is blended in faintly brings images of other
            classes to each class tried, as a multiple of the usual distance.
        warp_rises: How much nearer a warp by half a pixel at most brings them; empty where images
            are not of shape (N, C, H, W).
        permutation: The class that one patch for all classes was made to take each class to.
        moved: The share of images that it does take there, from 0 to 1; None where not measured.
        handicaps: Classes that are predicted far too rarely on clean images, with what their logit
            lacks and was raised by for the audit.
        runs: The single suppression runs, from which the spread can be seen.
        pruned: Pairs (layer name, filter index) of the removed filters, worst first.
        scores: M1 + M2 of the removed filters, averaged over the runs, from 1 to 3; empty where
            the rule does not rank by them.
        masks: What the output of every filter is multiplied by, from 0 to 1, for each layer; empty
            where filters are pruned or left as they are.
        search: The automatic rule's curve, one entry for each number of filters from 0: harm
            to clean images in nats, and for each source the target's margin as a share of that
            at the start.
        filters: Number of filters that took part.
        accuracy_before: Accuracy on the defense set, evaluation mode.
        accuracy_after: The same after pruning, or None where nothing was pruned.
        shift: What was added to each class's logit after pruning; empty where nothing was.
        reaudit: What a second audit says of the pruned network: verdict, score, target class,
            whether all-to-all, pile-up, detection ratio, reasons; None where there was none.
        layers: One entry for each layer: name, filters, site, norm, note.
        skipped: Pairs (layer name, reason) of convolutions left alone.
        defense_set: Size, classes, shape and fingerprint of the clean images used.
        config: All options.
        seconds: Time spent in each stage.
        versions: Versions of the packages that matter.
        warnings: What the reader should know, in words.
        model: The purified copy, where one was made; not part of the JSON.

    Example:
        >>> report = DefenseReport(verdict="clean", detection_ratio=0.9, pile_up=0.2)
        >>> report.exit_code, report.pruned
        (0, [])
    """

    verdict: Verdict
    detection_ratio: float
    pile_up: float
    score: float = float("nan")
    judged: bool = True
    target_class: int | None = None
    all_to_all: bool = False
    reasons: list[str] = field(default_factory=list)
    reaches: dict[int, float] = field(default_factory=dict)
    margins: dict[int, float] = field(default_factory=dict)
    patch_margins: dict[int, float] = field(default_factory=dict)
    overlay_rises: dict[int, float] = field(default_factory=dict)
    warp_rises: dict[int, float] = field(default_factory=dict)
    permutation: dict[int, int] = field(default_factory=dict)
    moved: float | None = None
    handicaps: dict[int, float] = field(default_factory=dict)
    runs: list[RunResult] = field(default_factory=list)
    pruned: list[tuple[str, int]] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    masks: dict[str, list[float]] = field(default_factory=dict)
    search: list[list[float]] = field(default_factory=list)
    filters: int = 0
    accuracy_before: float = float("nan")
    accuracy_after: float | None = None
    shift: list[float] = field(default_factory=list)
    reaudit: dict[str, Any] | None = None
    layers: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    defense_set: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    model: nn.Module | None = field(default=None, repr=False, compare=False)

    @property
    def exit_code(self) -> int:
        """0 for clean, 3 for backdoored, 4 for undecided."""
        return _EXIT_CODES[self.verdict]

    @property
    def changes(self) -> bool:
        """Whether the purified network differs from the one that was audited."""
        return bool(self.pruned or self.masks)

    def to_dict(self) -> dict[str, Any]:
        """Give everything but the model as primitives; numbers that are not finite are None."""
        content = {
            name: value for name, value in vars(self).items() if name not in ("model", "runs")
        }
        content["runs"] = [
            {**asdict(run), "pile_up": run.pile_up, "top_class": run.top_class} for run in self.runs
        ]
        return dict(_primitive(content))

    def to_json(self) -> str:
        """Give everything but the model as JSON.

        Names of layers can hold anything. Control characters are escaped, as JSON has it, and so
        are those that mean something in HTML: the text can stand in a page or a terminal.
        """
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False)
        for letter in "<>&\x7f":
            text = text.replace(letter, f"\\u{ord(letter):04x}")
        return text

    def save(self, path: Path | str, *, argument: str = "path") -> None:
        """Write the JSON to a file, whole or not at all, replacing what was there.

        Args:
            path: The file; its folder is made where it is missing.
            argument: Name of the argument, for messages.

        Raises:
            OutputError: If it cannot be written; what was there is unharmed.
        """

        def write(partial: Path) -> None:
            partial.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(self.to_json() + "\n", encoding="utf-8")

        write_atomically(Path(path), write, argument=argument, replace=True)

    def metrics(self) -> dict[str, float]:
        """Give the numbers that loggers take, under the prefix ``mnp/``."""
        numbers = {
            "mnp/detection_ratio": self.detection_ratio,
            "mnp/pile_up": self.pile_up,
            "mnp/backdoored": float(self.verdict == "backdoored"),
            **({} if math.isnan(self.score) else {"mnp/score": self.score}),
            "mnp/pruned_filters": float(len(self.pruned)),
            "mnp/defense_accuracy_before": self.accuracy_before,
        }
        if self.accuracy_after is not None:
            numbers["mnp/defense_accuracy_after"] = self.accuracy_after
        return numbers

    def __str__(self) -> str:
        lines = [f"verdict: {self.verdict}"]
        if self.target_class is not None:
            lines.append(f"target class: {self.target_class}")
        elif self.all_to_all:
            pairs = (f"{index} to {goal}" for index, goal in self.permutation.items())
            lines.append(f"target classes: {', '.join(pairs)}")
        ratios = [run.detection_ratio for run in self.runs]
        spread = f" (runs: {min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
        if not math.isnan(self.score):
            lines.append(f"score: {self.score:.2f}")
        lines.append(f"detection ratio: {self.detection_ratio:.3f}{spread}")
        lines.append(f"pile-up on one class: {self.pile_up:.1%}")
        lines += [f"  - {reason}" for reason in self.reasons]
        lines.append(f"filters pruned: {len(self.pruned)} of {self.filters}")
        if self.masks:
            values = [value for part in self.masks.values() for value in part]
            down = sum(0 < value < 0.99 for value in values)
            mean = sum(values) / len(values)
            lines.append(f"filters turned down: {down}; mean factor of all {mean:.2f}")
        lines.append(f"accuracy on the defense set: {self.accuracy_before:.1%}")
        if self.accuracy_after is not None:
            lines[-1] += f", after pruning {self.accuracy_after:.1%}"
        if self.reaudit is not None:
            lines.append(f"audited again: {self.reaudit['verdict']}")
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(printable(line, 10_000) for line in lines)


def _primitive(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _primitive(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_primitive(item) for item in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value

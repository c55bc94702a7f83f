"""What an audit or a defense found: a typed object, written to JSON and read back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn

from lightning_mnp.checkpoints.atomic_write import write_atomically
from lightning_mnp.checkpoints.printable import printable
from lightning_mnp.report.parts import (
    DefenseSetSummary,
    PruningReport,
    ReferenceRate,
    RunResult,
    SecondAudit,
    Signal,
    SurrogateTrigger,
    Verdict,
    WeightsFile,
)
from lightning_mnp.report.primitives import primitive, read_fields
from lightning_mnp.report.text import text

__all__ = ["EXIT_CODES", "DefenseReport", "ReportError", "is_report"]

SCHEMA = 1
# Of the command line, by the verdict.
EXIT_CODES: dict[str, int] = {"clean": 0, "backdoored": 3, "undecided": 4}
# What tells a report from another program's; a later version may add names, but keeps these.
_IN_EVERY_VERSION = {"schema", "verdict", "detection_ratio", "reasons", "runs", "pruned"}
_MOST_LETTERS = 500  # of what is wrong in a file
_MOST_BYTES = 2**28  # a report of a network of 100,000 filters has a few million


class ReportError(ValueError):
    """A file that holds no report that this version can read."""


@dataclass
class DefenseReport:
    """The outcome of an audit or a defense.

    Attributes:
        verdict: ``"clean"``, ``"backdoored"`` or ``"undecided"``.
        judged: Whether the network could be judged at all. If it knows too little, say, the
            verdict is ``"undecided"`` whatever the score.
        target_class: The class that the backdoor is thought to aim at, or None.
        all_to_all: Whether the backdoor is thought to take each class to another one; the signal
            ``permutation`` says which.
        score: The strength of the strongest signal that decides, from 0; the network is flagged
            from the threshold on. NaN if the verdict is by Eq. 8.
        reference: How often clean networks of the reference population look as suspicious; None
            without a score that means something.
        detection_ratio: Mean of Eq. 8 over the runs.
        reasons: What the verdict rests on, in words.
        warnings: What the reader should know, in words.
        signals: What speaks for a backdoor, most believed first; empty if no trigger was
            searched for.
        triggers: Surrogate triggers that were found for the suspected class, with pictures.
        runs: The single suppression runs, from which the spread can be seen.
        rare_classes: Classes that are predicted far too rarely on clean images, with how much
            their logit was raised for the audit.
        accuracy_before: Accuracy on the defense set, evaluation mode.
        accuracy_after: The same after pruning, or None if there was no pruning.
        class_accuracy_before: The same for each class that has images, before pruning.
        class_accuracy_after: The same after pruning; empty if there was no pruning.
        pruned: Pairs (layer name, filter index) of the removed filters, worst first.
        pruning: How these were found, and what else was changed.
        reaudit: What a second audit says of the purified network; None if there was none.
        filters: Number of filters that took part.
        layers: One entry for each layer: name, filters, site, norm, note.
        skipped: Pairs (layer name, reason) of convolutions left alone.
        defense_set: The clean images that were used.
        class_names: Names of the classes, in their order; empty if they are not known.
        weights_file: The file that the weights came from; None if they came from memory.
        weights_sha256: Digest of the weights that were audited.
        config: All options.
        versions: Versions of the packages that matter.
        seconds: Time spent in each phase.
        passes: Images that went through the network in each phase; forward and backward of one
            image counts 1, forward alone a third. What a resumed run computes again counts again.
        date: When the report was made, in UTC.
        model: The purified copy, if one was made; not part of the JSON.

    Example:
        >>> report = DefenseReport(verdict="clean", detection_ratio=0.9)
        >>> report.exit_code, report.pruned
        (0, [])
    """

    verdict: Verdict
    judged: bool = True
    target_class: int | None = None
    all_to_all: bool = False
    score: float = math.nan
    reference: ReferenceRate | None = None
    detection_ratio: float = math.nan
    reasons: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    signals: list[Signal] = field(default_factory=list)
    triggers: list[SurrogateTrigger] = field(default_factory=list)
    runs: list[RunResult] = field(default_factory=list)
    rare_classes: dict[int, float] = field(default_factory=dict)
    accuracy_before: float = math.nan
    accuracy_after: float | None = None
    class_accuracy_before: dict[int, float] = field(default_factory=dict)
    class_accuracy_after: dict[int, float] = field(default_factory=dict)
    pruned: list[tuple[str, int]] = field(default_factory=list)
    pruning: PruningReport = field(default_factory=PruningReport)
    reaudit: SecondAudit | None = None
    filters: int = 0
    layers: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    defense_set: DefenseSetSummary | None = None
    class_names: list[str] = field(default_factory=list)
    weights_file: WeightsFile | None = None
    weights_sha256: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    passes: dict[str, float] = field(default_factory=dict)
    date: str = ""
    model: nn.Module | None = field(default=None, repr=False, compare=False)

    @property
    def verdict_after(self) -> Verdict:
        """The verdict on the network that comes out: the purified one, if there is one.

        That is the verdict of the second audit. Without a second audit, nobody has judged a
        changed network: it is undecided. A network that was not changed has the first verdict.

        Example:
            >>> report = DefenseReport("backdoored", pruned=[("conv1", 3)])
            >>> report.verdict, report.verdict_after
            ('backdoored', 'undecided')
        """
        if not self.changes:
            return self.verdict
        return "undecided" if self.reaudit is None else self.reaudit.verdict

    @property
    def exit_code(self) -> int:
        """0 if :attr:`verdict_after` is clean, 3 for backdoored, 4 for undecided."""
        return EXIT_CODES[self.verdict_after]

    @property
    def changes(self) -> bool:
        """Whether the purified network differs from the one that was audited."""
        return bool(self.pruned or self.pruning.masks or self.pruning.tuned)

    @property
    def turned_down(self) -> int:
        """Number of filters that lost more than 1% of their weights, but not all."""
        values = (value for part in self.pruning.masks.values() for value in part)
        return sum(0 < value < 0.99 for value in values)

    @property
    def pile_up(self) -> float:
        """Mean over the runs of the share of predictions on one class; NaN without a run."""
        return sum(run.pile_up for run in self.runs) / len(self.runs) if self.runs else math.nan

    def signal(self, name: str) -> Signal | None:
        """Return the signal of a name, or None if it was not measured.

        Args:
            name: The name, such as ``"patch"``.
        """
        return next((signal for signal in self.signals if signal.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the model as primitives; numbers that are not finite are None."""
        content = {each.name: getattr(self, each.name) for each in fields(self)}
        del content["model"]
        content["runs"] = [
            {**asdict(run), "pile_up": run.pile_up, "top_class": run.top_class} for run in self.runs
        ]
        content["signals"] = [
            {**asdict(signal), "counts": signal.counts} for signal in self.signals
        ]
        content["triggers"] = [asdict(trigger) for trigger in self.triggers]
        for name in ("reference", "pruning", "reaudit", "defense_set", "weights_file"):
            content[name] = None if content[name] is None else asdict(content[name])
        return {"schema": SCHEMA, **primitive(content)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> DefenseReport:
        """Make a report of what :meth:`to_dict` has returned, or JSON made of that.

        Args:
            content: The primitives.

        Raises:
            ReportError: If they are of another schema, or something is missing, of another type or
                out of range.

        Example:
            >>> report = DefenseReport("clean", score=0.5)
            >>> DefenseReport.from_dict(report.to_dict()).score
            0.5
        """
        schema = content.get("schema") if isinstance(content, Mapping) else None
        if schema != SCHEMA:
            found = "one without a schema" if schema is None else f"schema {schema!r}"
            raise ReportError(
                f"Expected a report of schema {SCHEMA}, as this version writes it, but got "
                f"{found}. Reports of earlier versions have another form: make the report anew."
            )
        try:
            return cls(
                **read_fields(content, [each.name for each in fields(cls) if each.name != "model"])
            )
        except KeyError as error:
            raise ReportError(
                f"Expected a whole report of schema {SCHEMA}, but it has no {error}. Make the "
                "report anew."
            ) from error
        except TypeError as error:
            raise ReportError(
                f"Expected a whole report of schema {SCHEMA}, but in this one something is "
                f"missing or wrong: {printable(str(error), _MOST_LETTERS)}. Make the report anew."
            ) from error

    def to_json(self) -> str:
        """Return everything but the model as JSON.

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
            path: The file; its folder is made if it is missing.
            argument: Name of the argument, for messages.

        Raises:
            OutputError: If it cannot be written; what was there is unharmed.
        """

        def write(partial: Path) -> None:
            partial.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(self.to_json() + "\n", encoding="utf-8")

        write_atomically(Path(path), write, argument=argument, replace=True)

    @classmethod
    def load(cls, path: Path | str, *, argument: str = "path") -> DefenseReport:
        """Read the file that :meth:`save` has written.

        Args:
            path: The file.
            argument: Name of the argument, for messages.

        Raises:
            ReportError: If there is no such file, or it holds no report of this schema.

        Example:
            >>> import tempfile
            >>> path = Path(tempfile.mkdtemp(), "report.json")
            >>> DefenseReport("backdoored", target_class=3).save(path)
            >>> DefenseReport.load(path).target_class
            3
        """
        path = Path(path)
        content = _read_json(path, argument)
        try:
            return cls.from_dict(content)
        except ReportError as error:
            raise ReportError(f"{printable(str(path))}: {error}") from error

    def metrics(self) -> dict[str, float]:
        """Return the finite numbers that loggers take, under the prefix ``mnp/``.

        ``mnp/backdoored`` and ``mnp/undecided`` are 1 or 0. Both are 0 for a clean network.
        ``mnp/target_class`` is there if one is suspected, ``mnp/strength/<signal>`` for each
        signal.

        Example:
            >>> numbers = DefenseReport("undecided").metrics()
            >>> numbers["mnp/backdoored"], numbers["mnp/undecided"]
            (0.0, 1.0)
        """
        numbers = {
            "mnp/detection_ratio": self.detection_ratio,
            "mnp/pile_up": self.pile_up,
            "mnp/backdoored": float(self.verdict == "backdoored"),
            "mnp/undecided": float(self.verdict == "undecided"),
            "mnp/judged": float(self.judged),
            "mnp/score": self.score,
            **{f"mnp/strength/{signal.name}": signal.strength for signal in self.signals},
            "mnp/pruned_filters": float(len(self.pruned)),
            "mnp/defense_accuracy_before": self.accuracy_before,
        }
        if self.target_class is not None:
            numbers["mnp/target_class"] = float(self.target_class)
        if self.accuracy_after is not None:
            numbers["mnp/defense_accuracy_after"] = self.accuracy_after
        return {name: value for name, value in numbers.items() if math.isfinite(value)}

    def __str__(self) -> str:
        return text(self)


def is_report(path: Path) -> bool:
    """Return whether a file holds a report, also one of a version that is not read here.

    It is told by names that every report has.

    Args:
        path: The file.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "report.json")
        >>> DefenseReport("clean").save(path)
        >>> is_report(path)
        True
    """
    try:
        content = _read_json(path, "path")
    except ReportError:
        return False
    return (
        isinstance(content, dict)
        and content.keys() >= _IN_EVERY_VERSION
        and type(content["schema"]) is int
        and content["verdict"] in list(EXIT_CODES)  # of a list, as it may be nothing to hash
    )


def _read_json(path: Path, argument: str) -> Any:
    """Read a file that should hold a report, or raise ReportError."""
    shown = printable(str(path))
    if not path.is_file():
        raise ReportError(
            f"Expected argument `{argument}` to be an existing file, but got {shown}. Check "
            "the name and the folder."
        )
    if path.stat().st_size > _MOST_BYTES:
        raise ReportError(
            f"Expected argument `{argument}` to be a report, but {shown} has "
            f"{path.stat().st_size:,} bytes. Check the name."
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ReportError(
            f"Expected argument `{argument}` to be a report as JSON, but {shown} is none: "
            f"{printable(str(error))}. Make the report anew."
        ) from error

"""A report as primitives, such as JSON has them, and back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from lightning_mnp.report.parts import (
    DefenseSetSummary,
    PruningReport,
    ReferenceRate,
    RunResult,
    SecondAudit,
    Signal,
    SurrogateTrigger,
    TriggerExample,
    Verdict,
    WeightsFile,
)

__all__ = ["primitive", "read_fields", "read_trigger"]


def primitive(value: Any) -> Any:
    """Return a value in dicts, lists, strings and numbers; None for a number that is not finite.

    Args:
        value: Made of dicts, lists, tuples, strings, numbers and None.

    Example:
        >>> primitive({1: (0.5, math.nan)})
        {'1': [0.5, None]}
    """
    if isinstance(value, dict):
        return {str(key): primitive(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [primitive(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _number(value: float | None) -> float:
    """Read a number; None stands for one that was not finite."""
    return math.nan if value is None else float(value)


def read_fields(content: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Read the fields of a report from primitives.

    Args:
        content: The primitives by name.
        names: The fields.

    Raises:
        KeyError: If a field is missing.
        TypeError: If a value is of another type.
        ValueError: If a value is out of range.
    """
    read = {name: content[name] for name in names}
    for name in ("score", "detection_ratio", "accuracy_before"):
        read[name] = _number(read[name])
    read["runs"] = [_read_run(run) for run in read["runs"]]
    read["signals"] = [_read_signal(signal) for signal in read["signals"]]
    read["triggers"] = [read_trigger(trigger) for trigger in read["triggers"]]
    read["class_names"] = [str(name) for name in read["class_names"]]
    for name in ("rare_classes", "class_accuracy_before", "class_accuracy_after"):
        read[name] = _by_class(read[name])
    read["pruned"] = [(str(name), int(index)) for name, index in read["pruned"]]
    read["skipped"] = [(str(name), str(reason)) for name, reason in read["skipped"]]
    pruning = read["pruning"]
    read["pruning"] = PruningReport(
        scores=[_number(value) for value in pruning["scores"]],
        curve=[[_number(value) for value in point] for point in pruning["curve"]],
        traces=[str(name) for name in pruning["traces"]],
        masks={n: [_number(value) for value in part] for n, part in pruning["masks"].items()},
        shift=[_number(value) for value in pruning["shift"]],
        sums={n: [_number(value) for value in part] for n, part in pruning["sums"].items()},
        counts=[int(count) for count in pruning["counts"]],
        # These two are not in reports of earlier versions.
        tuned=_number(pruning.get("tuned", 0.0)),
        cut=int(pruning.get("cut", 0)),
    )
    if read["reference"] is not None:
        read["reference"] = ReferenceRate(**read["reference"])
    if read["reaudit"] is not None:
        numbers = ("score", "detection_ratio", "pile_up")
        again = {name: _number(read["reaudit"][name]) for name in numbers}
        read["reaudit"] = SecondAudit(**{**read["reaudit"], **again})
    if read["defense_set"] is not None:
        counts = {int(index): int(n) for index, n in read["defense_set"]["classes"].items()}
        read["defense_set"] = DefenseSetSummary(**{**read["defense_set"], "classes": counts})
    if read["weights_file"] is not None:
        read["weights_file"] = WeightsFile(**read["weights_file"])
    for audit in (read["verdict"], read["reaudit"] and read["reaudit"].verdict):
        if audit is not None and audit not in get_args(Verdict):
            raise ValueError(f"the verdict {audit!r}")
    return read


def _read_run(content: Mapping[str, Any]) -> RunResult:
    numbers = ("detection_ratio", "correlation", "accuracy")
    return RunResult(
        **{name: _number(content[name]) for name in numbers},
        predictions=tuple(int(count) for count in content["predictions"]),
        steps=int(content["steps"]),
        stopped=str(content["stopped"]),
        curve=tuple(_number(value) for value in content["curve"]),
    )


def _read_signal(content: Mapping[str, Any]) -> Signal:
    return Signal(
        name=str(content["name"]),
        strength=_number(content["strength"]),
        target_class=content["target_class"],
        value=_number(content["value"]),
        threshold=_number(content["threshold"]),
        reason=str(content["reason"]),
        classes=_by_class(content["classes"]),
        decides=bool(content["decides"]),
    )


def read_trigger(content: Mapping[str, Any]) -> SurrogateTrigger:
    """Read a surrogate trigger from primitives.

    Args:
        content: The primitives by name.

    Raises:
        KeyError: If a field is missing.
        TypeError: If a value is of another type.

    Example:
        >>> from dataclasses import asdict
        >>> trigger = SurrogateTrigger("patch", 3, 0.9, 64, "")
        >>> read_trigger(asdict(trigger)) == trigger
        True
    """
    examples = tuple(TriggerExample(**example) for example in content["examples"])
    return SurrogateTrigger(
        **{**content, "success": _number(content["success"]), "examples": examples}
    )


def _by_class(values: Mapping[str, Any]) -> dict[int, float]:
    # Whole numbers stay whole: they are classes.
    return {
        int(index): value if isinstance(value, int) else _number(value)
        for index, value in values.items()
    }

"""A report as primitives, such as JSON has them, and back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from lightning_mnp.report.checked import (
    Reader,
    by_class,
    by_name,
    finite,
    flag,
    listed,
    mapping,
    number,
    one_of,
    optional,
    plain,
    record,
    share,
    text,
    whole,
    whole_from,
    wrong,
)
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


def read_fields(content: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Read the fields of a report from primitives.

    Args:
        content: The primitives by name.
        names: The fields.

    Raises:
        KeyError: If a field is missing.
        TypeError: If a value is of another type, or out of range.
    """
    return {name: _FIELDS[name](content[name], name) for name in names}


def read_trigger(content: Mapping[str, Any], place: str = "trigger") -> SurrogateTrigger:
    """Read a surrogate trigger from primitives.

    Args:
        content: The primitives by name.
        place: Where it is in the report, for messages.

    Raises:
        TypeError: If a field is missing, or a value is of another type or out of range.

    Example:
        >>> from dataclasses import asdict
        >>> trigger = SurrogateTrigger("patch", 3, 0.9, 64, "")
        >>> read_trigger(asdict(trigger)) == trigger
        True
    """
    return _trigger(content, place)


def _tuple(reader: Reader[list[Any]]) -> Reader[tuple[Any, ...]]:
    return lambda value, place: tuple(reader(value, place))


def _pair(first: Reader[Any], second: Reader[Any]) -> Reader[tuple[Any, Any]]:
    def read(value: Any, place: str) -> tuple[Any, Any]:
        if not isinstance(value, (list, tuple)) or len(value) != 2:
            raise wrong(place, "a list of two", value)
        return first(value[0], f"{place}[0]"), second(value[1], f"{place}[1]")

    return read


def _predictions(value: Any, place: str) -> tuple[int, ...]:
    counts = listed(whole)(value, place)
    if not any(counts):  # the share of the top class is by their sum
        raise wrong(place, "a list of numbers that are not all 0", value)
    return tuple(counts)


def _class_value(value: Any, place: str) -> float:
    # Whole numbers stay whole: they are classes.
    return whole_from(-(2**63))(value, place) if type(value) is int else number(value, place)


def _signal(value: Any, place: str) -> Signal:
    found = _any_signal(value, place)
    exchange = found.target_class is None or found.name == "permutation"
    if exchange and not all(map(math.isfinite, found.classes.values())):
        raise wrong(f"{place}.classes", "classes, each taken to another one", None)
    return found


def _pruning(value: Any, place: str) -> PruningReport:
    # These two are not in reports of earlier versions.
    return _whole_pruning({"tuned": 0.0, "cut": 0, **mapping(value, place)}, place)


def _options(value: Any, place: str) -> dict[str, Any]:
    """Read all options; what is told of a verdict rests on two of them."""
    options = dict(plain(mapping(value, place), place))
    verdict = mapping(options.get("verdict", {}), f"{place}.verdict")
    for name in ("threshold", "delta"):
        if name in verdict:
            finite(verdict[name], f"{place}.verdict.{name}")
    if verdict.get("threshold", 1) <= 0:
        raise wrong(f"{place}.verdict.threshold", "a number above 0", verdict["threshold"])
    return options


_class = optional(whole)
_verdict = one_of(get_args(Verdict))
_numbers = listed(number)
_run = record(
    RunResult,
    detection_ratio=number,
    correlation=number,
    predictions=_predictions,
    steps=whole,
    accuracy=share,
    stopped=text,
    curve=_tuple(listed(share)),
)
_any_signal = record(
    Signal,
    name=text,
    strength=number,
    target_class=_class,
    value=number,
    threshold=number,
    reason=text,
    classes=by_class(_class_value),
    decides=flag,
)
_example = record(
    TriggerExample, label=whole, before=whole, after=whole, clean=text, triggered=text
)
_trigger = record(
    SurrogateTrigger,
    signal=text,
    target_class=_class,
    success=share,
    images=whole,
    pattern=text,
    examples=_tuple(listed(_example)),
)
_whole_pruning = record(
    PruningReport,
    scores=_numbers,
    # A point holds the harm, then what is left of each trace.
    curve=listed(listed(number, least=1)),
    traces=listed(text),
    masks=by_name(listed(share)),
    shift=_numbers,
    sums=by_name(_numbers),
    counts=listed(whole),
    tuned=number,
    cut=whole,
)
_reference = record(
    ReferenceRate,
    networks=whole_from(1),
    as_suspicious=whole,
    low=share,
    high=share,
    described=text,
)
_second_audit = record(
    SecondAudit,
    verdict=_verdict,
    score=number,
    target_class=_class,
    all_to_all=flag,
    detection_ratio=number,
    pile_up=number,
    reasons=listed(text),
)
_defense_set = record(
    DefenseSetSummary,
    images=whole_from(1),
    shape=listed(whole_from(1)),
    classes=by_class(whole_from(1)),
    sha256=text,
)
# docs/reference/report-1.schema.json says the same to other programs.
_FIELDS: dict[str, Reader[Any]] = {
    "verdict": _verdict,
    "judged": flag,
    "target_class": _class,
    "all_to_all": flag,
    "score": number,
    "reference": optional(_reference),
    "detection_ratio": number,
    "reasons": listed(text),
    "warnings": listed(text),
    "signals": listed(_signal),
    "triggers": listed(_trigger),
    "runs": listed(_run),
    "rare_classes": by_class(number),
    "accuracy_before": share,
    "accuracy_after": optional(share),
    "class_accuracy_before": by_class(share),
    "class_accuracy_after": by_class(share),
    "pruned": listed(_pair(text, whole)),
    "pruning": _pruning,
    "reaudit": optional(_second_audit),
    "filters": whole,
    "layers": listed(lambda value, place: dict(plain(mapping(value, place), place))),
    "skipped": listed(_pair(text, text)),
    "defense_set": optional(_defense_set),
    "class_names": listed(text),
    "weights_file": optional(record(WeightsFile, name=text, sha256=text, bytes=whole)),
    "weights_sha256": text,
    "config": _options,
    "versions": by_name(text),
    "seconds": by_name(number),
    "passes": by_name(number),
    "date": text,
}

"""The state of a defense as tensors and primitives, from which it goes on as if never stopped."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from lightning_mnp.config.dotted import dotted
from lightning_mnp.engine.case import Case
from lightning_mnp.report import RunResult, SecondAudit
from lightning_mnp.report.primitives import read_trigger

__all__ = ["case_state", "check_state", "identity", "load_case"]

FORMAT = 20


def identity(case: Case) -> dict[str, Any]:
    """Return what a state belongs to: another model, defense set or option has another one.

    Args:
        case: The case.
    """
    return {
        "defense set": case.data.fingerprint,
        "options": case.config.to_dict(),
        "constants": case.constants.to_dict(),
        "searches": list(case.wanted_searches),
        "signals": None if case.measured is None else sorted(case.measured),
        "occasion": case.when,
        "layers": [[layer.name, layer.filters] for layer in case.layers],
        "weights": case.weights_sha256,
        "precision": case.masked.precision,
        "version": version("lightning-mnp"),
    }


def check_state(case: Case, state: Any) -> None:
    """Check that a state belongs to a case.

    Args:
        case: The case.
        state: What was read.

    Raises:
        ValueError: If the state is of another format, model, defense set or options.
    """
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise ValueError(
            f"Expected the state of a defense in format {FORMAT}, but got {found!r}. Remove the "
            "file to start anew."
        )
    for name, value in identity(case).items():
        found = state["identity"].get(name)
        if found != value:
            told = _difference(value, found)
            raise ValueError(
                f"Expected the state to belong to the same {name}, but {told}. Remove the file to "
                "start anew."
            )


def _difference(value: Any, found: Any) -> str:
    """Return in words how two values differ; of groups of options, only those that do."""
    if not (isinstance(value, dict) and isinstance(found, dict)):
        return f"it is {value!r} now, and {found!r} in the state"
    now, then = dotted(value), dotted(found)
    parts = [
        f"`{name}` is {now.get(name)!r} now, and {then.get(name)!r} in the state"
        for name in dict.fromkeys([*now, *then])
        if now.get(name) != then.get(name)
    ]
    return "; ".join(parts)


def case_state(case: Case) -> dict[str, Any]:
    """Return all that is known of a network, readable with ``weights_only=True``.

    Args:
        case: The case; the tensors in its state are its own, not copies.
    """
    begun = "suppression" in vars(case)  # stages are built when they are first used
    second = case.second_audit
    return {
        "runs": [_run_state(run) for run in case.runs],
        "tried": list(case.scene.tried),
        "rare_classes": dict(case.rare_classes),
        "correlation": case.correlation,
        "accuracy": case.accuracy,
        "class_accuracy": dict(case.class_accuracy),
        "doubts": list(case.doubts),
        "warnings": list(case.warnings),
        "suppression": case.suppression.state_dict() if begun else None,
        "suppressed": list(case.suppressed),
        "masks_sum": case.masks_sum,
        "masks_count": case.masks_count,
        "searches": {name: search.state_dict() for name, search in case.searches.items()},
        "found": {
            name: None if found is None else asdict(found) for name, found in case.found.items()
        },
        "judged": case.judgement is not None,
        "purification": case.purification.state_dict(),
        "second_audit": None if second is None else asdict(second),
    }


def _run_state(run: RunResult) -> dict[str, Any]:
    return {**asdict(run), "predictions": list(run.predictions), "curve": list(run.curve)}


def load_case(case: Case, state: dict[str, Any]) -> None:
    """Go on where :func:`case_state` was taken; the network does not run.

    Args:
        case: A new case of the same network, defense set and options.
        state: The state.
    """
    device = case.masked.device
    case.runs[:] = [
        RunResult(**{**run, **{name: tuple(run[name]) for name in ("predictions", "curve")}})
        for run in state["runs"]
    ]
    case.scene.tried = [int(index) for index in state["tried"]]
    rare = {int(index): float(value) for index, value in state["rare_classes"].items()}
    case.raise_rare_classes(rare)
    case.correlation = float(state["correlation"])
    case.accuracy = float(state["accuracy"])
    case.class_accuracy = {int(k): float(v) for k, v in state["class_accuracy"].items()}
    case.doubts = tuple(str(doubt) for doubt in state["doubts"])
    case.warnings = list(state["warnings"])
    if state["suppression"] is not None:
        case.suppression.load_state_dict(state["suppression"])
    case.suppressed = [
        {name: weight.to(device) for name, weight in weights.items()}
        for weights in state["suppressed"]
    ]
    case.masks_sum = state["masks_sum"].to(device, copy=True)
    case.masks_count = int(state["masks_count"])
    case.searches.clear()
    for name, part in state["searches"].items():
        case.search(str(name)).load_state_dict(part)
    case.found = {
        str(name): None if found is None else read_trigger(found)
        for name, found in state["found"].items()
    }
    case.judgement = case.judge() if state["judged"] else None
    purification = state["purification"]
    traces = [] if purification["greedy"] is None else case.traces()
    patch = None if purification["tuning"] is None else case.patch()
    case.purification.load_state_dict(purification, traces, patch)
    second = state["second_audit"]
    case.second_audit = None if second is None else SecondAudit(**second)

"""What the engine knows, as tensors and primitives: its state in between, its report at the end."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from lightning_mnp.report import DefenseReport, RunResult
from lightning_mnp.surgery.network import weights_digest

if TYPE_CHECKING:
    from lightning_mnp.engine.defense import MNPDefense

__all__ = ["dump_state", "load_state", "make_report"]

_FORMAT = 10


def dump_state(defense: MNPDefense) -> dict[str, Any]:
    """Give the whole state, readable with ``weights_only=True``.

    Args:
        defense: The engine; the tensors in its state are its own, not copies.
    """
    return {
        "format": _FORMAT,
        "identity": _identity(defense),
        "plan": [list(entry) for entry in defense.plan],
        "position": defense.position,
        "batches_done": defense.batches_done,
        "runs": [{**asdict(run), "predictions": list(run.predictions)} for run in defense.runs],
        "handicaps": dict(defense.handicaps),
        "suppressed": list(defense.suppressed),
        "correlation": defense.correlation,
        "accuracy_before": defense.accuracy_before,
        "seconds": dict(defense.seconds),
        "warnings": list(defense.warnings),
        "tally": defense.tally.state_dict(),
        "masks_sum": defense.masks_sum,
        "masks_count": defense.masks_count,
        "surrogates": defense.surrogates.state_dict(),
        "second": None if defense.second is None else dump_state(defense.second),
        "purification": defense.purification.state_dict(),
        "suppression": defense.suppression.state_dict(),
        "penalty": defense.penalty.state_dict(),
        "preserving": defense.preserving.state_dict(),
    }


def load_state(defense: MNPDefense, state: dict[str, Any]) -> None:
    """Go on where :func:`dump_state` left.

    Args:
        defense: A new engine for the same model, defense set and options.
        state: The state.

    Raises:
        ValueError: If the state is of another format, model, defense set or options.
    """
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise ValueError(
            f"Expected the state of a defense in format {_FORMAT}, but got {found!r}. Remove the "
            "file to start anew."
        )
    for name, value in _identity(defense).items():
        if state["identity"].get(name) != value:
            raise ValueError(
                f"Expected the state to belong to the same {name}, but it was {value!r} and "
                f"is {state['identity'].get(name)!r} in the state. Remove the file to start "
                "anew."
            )
    device = defense.masked.device
    defense.plan = [(phase, int(run)) for phase, run in state["plan"]]
    defense.position = int(state["position"])
    defense.batches_done = int(state["batches_done"])
    defense.runs = [
        RunResult(**{**run, "predictions": tuple(run["predictions"])}) for run in state["runs"]
    ]
    defense.balance({int(index): float(value) for index, value in state["handicaps"].items()})
    defense.suppressed = [
        {name: weight.to(device) for name, weight in weights.items()}
        for weights in state["suppressed"]
    ]
    defense.correlation = float(state["correlation"])
    defense.accuracy_before = float(state["accuracy_before"])
    defense.seconds = defaultdict(float, state["seconds"])
    defense.warnings = list(state["warnings"])
    defense.tally.load_state_dict(state["tally"])
    defense.masks_sum = state["masks_sum"].to(device, copy=True)
    defense.masks_count = int(state["masks_count"])
    defense.surrogates.load_state_dict(state["surrogates"])
    defense.suppression.load_state_dict(state["suppression"])
    defense.penalty.restart(defense.suppression.weights)
    defense.penalty.load_state_dict(state["penalty"])
    defense.preserving.load_state_dict(state["preserving"])
    if ("verdict", 0) in defense.plan[: defense.position]:
        defense.judgement = defense.judge()
    purification = state["purification"]
    sources = [] if purification["search"] is None else defense.new_sources()
    defense.purification.load_state_dict(purification, sources)
    defense.second = None
    if state["second"] is not None:
        defense.second = defense.new_second()
        load_state(defense.second, state["second"])


def make_report(defense: MNPDefense) -> DefenseReport:
    """Give the outcome of a finished engine, without a model."""
    purification = defense.purification
    search, shift = purification.search, purification.shift
    evidence = defense.surrogates.evidence
    scores: list[float] = []
    if defense.masks_count:
        scores = [float(defense.scores[int(position)]) for position in purification.removed]
    return DefenseReport(
        verdict=defense.judgement.verdict,
        detection_ratio=defense.judgement.detection_ratio,
        pile_up=defense.judgement.pile_up,
        score=defense.judgement.score,
        judged=defense.judgement.judged,
        target_class=defense.judgement.target_class,
        all_to_all=defense.judgement.all_to_all,
        reasons=list(defense.judgement.reasons),
        runs=list(defense.runs),
        reaches=dict(sorted(evidence.reaches.items())),
        margins=dict(sorted(evidence.margins.items())),
        patch_margins=dict(sorted(evidence.patch_margins.items())),
        overlay_rises=dict(sorted(evidence.overlay_rises.items())),
        warp_rises=dict(sorted(evidence.warp_rises.items())),
        permutation=dict(evidence.permutation),
        moved=evidence.moved,
        handicaps=dict(defense.handicaps),
        pruned=[defense.layers.locate(int(position)) for position in purification.removed],
        scores=scores,
        masks=_masks_of(defense),
        search=[] if search is None else [list(point) for point in search.curve],
        filters=defense.layers.total,
        accuracy_before=defense.accuracy_before,
        accuracy_after=purification.accuracy,
        shift=[] if shift is None else shift.values.tolist(),
        reaudit=_second_verdict(defense),
        layers=[asdict(layer) for layer in defense.layers],
        skipped=list(defense.layers.skipped),
        defense_set={
            "images": len(defense.data),
            "shape": list(defense.data.images.shape[1:]),
            "classes": defense.data.counts,
            "sha256": defense.data.fingerprint,
        },
        config=defense.config.to_dict(),
        seconds=dict(defense.seconds),
        versions={name: version(name) for name in ("lightning-mnp", "torch", "torchvision")},
        warnings=[*purification.warnings, *defense.warnings],
    )


def _masks_of(defense: MNPDefense) -> dict[str, list[float]]:
    if defense.purification.masks is None:
        return {}
    parts = defense.purification.masks.split(defense.layers.sizes)
    return {layer.name: part.tolist() for layer, part in zip(defense.layers, parts, strict=True)}


def _second_verdict(defense: MNPDefense) -> dict[str, Any] | None:
    if defense.second is None:
        return None
    judgement = defense.second.judgement
    return {
        "verdict": judgement.verdict,
        "score": judgement.score,
        "target_class": judgement.target_class,
        "all_to_all": judgement.all_to_all,
        "pile_up": judgement.pile_up,
        "detection_ratio": judgement.detection_ratio,
        "reasons": list(judgement.reasons),
    }


def _identity(defense: MNPDefense) -> dict[str, Any]:
    return {
        "defense set": defense.data.fingerprint,
        "options": defense.config.to_dict(),
        "occasion": defense.when,
        "layers": [[layer.name, layer.filters] for layer in defense.layers],
        "weights": weights_digest(defense.model),
        "precision": defense.masked.precision,
        "version": version("lightning-mnp"),
    }

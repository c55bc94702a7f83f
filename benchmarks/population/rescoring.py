"""Judge kept audits anew by the present rules, from what they measured; no network runs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from lightning_mnp import DefenseSet, MNPConfig
from lightning_mnp.report import RunResult
from lightning_mnp.signals.base import Scene, SignalSearch
from lightning_mnp.signals.margin import MarginSearch
from lightning_mnp.signals.patch import PatchSearch
from lightning_mnp.signals.permutation import PermutationSearch
from lightning_mnp.signals.pile_up import PileUp
from lightning_mnp.signals.reach import ReachSearch
from lightning_mnp.signals.verdict import judge, rank_signals, runs_wanted
from lightning_mnp.signals.warp import WarpSearch
from lightning_mnp.surgery.layers import find_filter_layers
from lightning_mnp.surgery.masked_network import MaskedNetwork

__all__ = ["rescored"]

# Searches whose signal is made of one figure for each class, and the attribute that holds these.
_FIGURES: dict[str, tuple[type[SignalSearch], str]] = {
    "margin": (MarginSearch, "margins"),
    "patch": (PatchSearch, "margins"),
    "warp": (WarpSearch, "rises"),
}


def rescored(audit: dict[str, Any]) -> dict[str, Any]:
    """Judge an audit anew by the present rules.

    What was measured for each class is taken as it stands. Of the suppression runs, only as many
    are read as the present rules ask for; those that were not made are not made up for.

    Args:
        audit: What :func:`~benchmarks.population.audits.audit_network` has kept.

    Returns:
        A copy with another verdict, class and score. A network that could not be judged stays so.
    """
    if not audit["judged"]:
        return dict(audit)
    scene = _scene(audit)
    measured = {signal["name"]: signal for signal in audit["signals"]}
    searches = [_search(name, signal, scene) for name, signal in measured.items()]
    made, wanted = list(scene.runs), min(1, len(scene.runs))
    options = scene.config.suppression
    while True:
        scene.runs[:] = made[:wanted]
        found = rank_signals([search.signal() for search in searches])
        more = min(runs_wanted(wanted, found, options, options.parts), len(made))
        if more == wanted:
            break
        wanted = more
    judgement = judge(
        scene.runs, 1.0, found, scene.config, audit["accuracy_before"], rare_classes=_rare(audit)
    )
    return {
        **audit,
        "verdict": judgement.verdict,
        "judged": judgement.judged,
        "score": judgement.score,
        "target_class": judgement.target_class,
        "all_to_all": judgement.all_to_all,
        "version": f"{audit['version']}, judged anew",
    }


def _rare(audit: dict[str, Any]) -> dict[int, float]:
    return {int(index): float(lack) for index, lack in audit["rare_classes"].items()}


def _scene(audit: dict[str, Any]) -> Scene:
    """A scene with the runs and the rare classes of an audit, around a network that never runs."""
    network = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(2, 2))
    data = DefenseSet(torch.zeros(4, 1, 2, 2), torch.arange(4) % 2)
    masked = MaskedNetwork(network, find_filter_layers(network, data.images))
    masked.raised = _rare(audit)
    keys = ("detection_ratio", "correlation", "steps", "accuracy", "stopped")
    runs = [
        RunResult(**{key: run[key] for key in keys}, predictions=tuple(run["predictions"]))
        for run in audit["runs"]
    ]
    classes = len(runs[0].predictions) if runs else 10
    return Scene(masked, data, MNPConfig(), classes, runs=runs)


def _search(name: str, signal: dict[str, Any], scene: Scene) -> SignalSearch:
    """A finished search of this name, with what was measured."""
    classes = {int(index): value for index, value in signal["classes"].items()}
    if name == "pile-up":
        return PileUp(scene)
    if name == "permutation":
        permutation = PermutationSearch(scene)
        permutation.permutation = {index: int(goal) for index, goal in classes.items()}
        permutation.moved = signal["value"]
        return permutation
    if name == "reach":
        reach = ReachSearch(scene)
        reach.reaches = {index: 1 / near if near else math.nan for index, near in classes.items()}
        return reach
    if name not in _FIGURES:
        raise ValueError(
            f"Expected a signal of an audit that is known here, but got {name!r} of "
            "another version. Audit the network anew."
        )
    kind, figures = _FIGURES[name]
    search = kind(scene)
    setattr(search, figures, classes)
    return search

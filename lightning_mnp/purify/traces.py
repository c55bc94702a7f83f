"""All traces of the suspected backdoor together: what pruning takes down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lightning_mnp.report import Signal
from lightning_mnp.signals.base import Scene, Search
from lightning_mnp.signals.patch import PatchSearch, PatchTrigger
from lightning_mnp.signals.pattern import PatternTrace
from lightning_mnp.signals.permutation import PermutationSearch
from lightning_mnp.signals.pile_up import SuppressedTrace
from lightning_mnp.signals.reach import ReachSearch
from lightning_mnp.signals.trace import Trace, TraceConstants
from lightning_mnp.surgery.masked_network import Weights

__all__ = ["find_patch", "find_traces"]


def find_traces(
    scene: Scene,
    suppressed: Sequence[Weights],
    believed: Signal,
    searches: Mapping[str, Search],
) -> list[Trace]:
    """Collect what shows the suspected backdoor.

    The suppressed network always does. Each search adds a trace if what it measured for the class
    is out of the ordinary. If none does, a patch and a universal perturbation help, as they are
    made for any class: a backdoor makes use of the ordinary ways to its class, too. The suppressed
    network decides on how long pruning goes on if the signal most believed is the pile-up, or the
    margin, with which the pile-up agrees, or if no search adds a trace: what is left of a pile-up
    need not be the backdoor otherwise.

    Args:
        scene: What the searches worked on.
        suppressed: The suppressed weights of the first runs and of the latest.
        believed: The signal most to be believed, which tells the suspected class, if it is one.
        searches: The searches by name, finished.
    """
    target, device = believed.target_class, scene.masked.device
    count = min(scene.constants.of(TraceConstants).images, scene.config.batch_size)
    found = [trace for each in searches.values() for trace in each.traces(target, searches)]
    if target is None:
        exchange = searches.get(believed.name)
        if not isinstance(exchange, PermutationSearch):
            raise ValueError(
                f"Expected a signal that points to a class, since only an exchange of classes by "
                f"one patch is known how to prune, but {believed.name!r} points to none. Give its "
                "signal a `target_class`."
            )
        images, goals = exchange.images(count)
        decides = False
    else:
        images, labels = scene.data.others(target, count, device, (scene.config.seed, "sources"))
        goals = torch.full_like(labels, target)
        decides = believed.name in ("margin", "pile-up") or not found
    pulled = SuppressedTrace(scene.masked, suppressed, images, goals, scene.constants, decides)
    return [pulled, *(found or _ordinary(target, searches))]


def find_patch(believed: Signal, searches: Mapping[str, Search]) -> PatchTrigger | None:
    """Begin a patch that does what the suspected backdoor does.

    Args:
        believed: The signal most to be believed, which tells the suspected class, if it is one.
        searches: The searches by name, finished.

    Returns:
        A patch to the suspected class, or one that exchanges classes; None if no patches were
        looked for.
    """
    if believed.target_class is None:
        exchange = searches.get(PermutationSearch.name)
        return exchange.trigger() if isinstance(exchange, PermutationSearch) else None
    patch = searches.get(PatchSearch.name)
    if not isinstance(patch, PatchSearch):
        return None
    return patch.trigger(believed.target_class, patch.scene.constants.of(TraceConstants).images)


def _ordinary(target: int | None, searches: Mapping[str, Search]) -> list[Trace]:
    """Ways to a class that do not stand out; that they are still there decides nothing."""
    patch, reach = searches.get(PatchSearch.name), searches.get(ReachSearch.name)
    found: list[Trace] = []
    if target is None:
        return found
    if isinstance(patch, PatchSearch):
        found.append(PatternTrace(patch.trigger(target)))
    # A class that only later runs suspect may be none of those that were searched.
    if isinstance(reach, ReachSearch) and target in reach.perturbations:
        found.append(reach.trace(target))
    for trace in found:
        trace.decides = False
    return found

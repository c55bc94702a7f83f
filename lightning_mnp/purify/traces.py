"""All traces of the suspected backdoor together: what pruning takes down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lightning_mnp.report import Signal
from lightning_mnp.signals.base import Scene, Search
from lightning_mnp.signals.permutation import PermutationSearch
from lightning_mnp.signals.pile_up import SuppressedTrace
from lightning_mnp.signals.trace import Trace, TraceConstants
from lightning_mnp.surgery.masked_network import Weights

__all__ = ["find_traces"]


def find_traces(
    scene: Scene,
    suppressed: Sequence[Weights],
    believed: Signal,
    searches: Mapping[str, Search],
) -> list[Trace]:
    """Collect what shows the suspected backdoor.

    The suppressed network always does. Each search adds a trace if what it measured for the class
    is out of the ordinary. The suppressed network decides on how long pruning goes on if
    the signal most believed is the pile-up, or the margin, with which the pile-up agrees, or if it
    is the only trace: what is left of a pile-up need not be the backdoor otherwise.

    Args:
        scene: What the searches worked on.
        suppressed: The suppressed weights of each run.
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
                f"one patch is known how to prune, but {believed.name!r} points to none."
            )
        images, goals = exchange.images(count)
        decides = False
    else:
        images, labels = scene.data.others(target, count, device, (scene.config.seed, "sources"))
        goals = torch.full_like(labels, target)
        decides = believed.name in ("margin", "pile-up") or not found
    pulled = SuppressedTrace(scene.masked, suppressed, images, goals, scene.constants, decides)
    return [pulled, *found]

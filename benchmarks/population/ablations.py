"""The default without one of its pieces, for networks to choose on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_mnp import Constants, MNPConfig
from lightning_mnp.benchmark.methods import Outcome
from lightning_mnp.defense_data.defense_set import DefenseSet
from lightning_mnp.engine.defense import MNPDefense
from lightning_mnp.engine.runner import run_defense
from lightning_mnp.purify.greedy import GreedyConstants
from lightning_mnp.signals.registry import register, registered, unregister

__all__ = ["ABLATIONS", "Ablation"]


@dataclass(frozen=True)
class Ablation:
    """The default, called like a defense, without some of its searches or stages.

    There is no second audit, which changes nothing in the network.

    Args:
        label: What it is, in words.
        without: Names of the searches that are not made.
        options: Options that differ from their defaults, by dotted name.
        constants: Constants that differ from their defaults.

    Example:
        >>> ABLATIONS["no-overlay"].label
        'default without the overlay'
    """

    label: str
    without: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    constants: Constants | None = None

    def defend(self, network: nn.Module, images: DefenseSet, seed: int) -> Outcome:
        """Remove a backdoor from a copy of a network, if the audit says that there is one.

        Args:
            network: The network; it stays as it is.
            images: Clean images.
            seed: Seed of all that is drawn.
        """
        config = MNPConfig(seed=seed).changed({"pruning.reaudit": False, **self.options})
        with _without(self.without):
            engine = MNPDefense(network, images, config, when="flagged", constants=self.constants)
            run_defense(engine)
        report = engine.report()
        report.model = engine.purified()
        return Outcome.of_report(report)


ABLATIONS = {
    "all-pieces": Ablation("default"),
    "no-reach": Ablation("default without the reach", ("reach",)),
    "no-overlay": Ablation("default without the overlay", ("overlay",)),
    "no-further-trace": Ablation("default without reach and overlay", ("reach", "overlay")),
    "no-masks": Ablation(
        "default without soft masks and cuts", options={"pruning.soft_mask_steps": 0}
    ),
    "no-tuning": Ablation("default without cuts and tuning", options={"pruning.tuning_steps": 0}),
    "no-greedy": Ablation(
        "default without greedy pruning",
        constants=Constants(GreedyConstants(candidates=0, rejected=0)),
    ),
}


@contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    """Take searches out for a while; they come back in their order."""
    known = registered()
    for name in names:
        unregister(name)
    try:
        yield
    finally:
        for name in registered():
            unregister(name)
        for search in known.values():
            register(search)

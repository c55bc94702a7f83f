"""The pile-up: after clean suppression, predictions fall on the target class.

Clean suppression leaves the filters of a backdoor as they are and breaks others. What then still
pulls clean images to one class are the filters looked for.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_mnp.config import Constants
from lightning_mnp.defense_data.defense_set import LEAST_BATCH
from lightning_mnp.report import RunResult, Signal
from lightning_mnp.signals.base import Scene, SignalSearch
from lightning_mnp.signals.logits import leads
from lightning_mnp.signals.standout import Standout, StandoutConstants, find_standout
from lightning_mnp.signals.trace import Trace
from lightning_mnp.surgery.masked_network import MaskedNetwork, Statistics, Weights

__all__ = ["PileUp", "PileUpConstants", "SuppressedTrace", "confirmed_signal"]


@dataclass(frozen=True)
class PileUpConstants:
    """When a pile-up counts.

    Attributes:
        counts_from: How far one class stands out, from where it counts fully, see
            :func:`~lightning_mnp.signals.standout.find_standout`.
        alone_from: The same for a pile-up that decides by itself, on a class that is rare.
        rare_from: What the logit of a class lacks on clean images, in nats, from where it is rare
            enough for that; see :func:`~lightning_mnp.signals.rare_classes.find_rare_classes`.
        least_share: Added to every share, so that one run without a single prediction on a class
            does not decide alone.
    """

    counts_from: float = 1.0
    alone_from: float = 2.0
    rare_from: float = 1.2
    least_share: float = 0.01


class PileUp(SignalSearch):
    """Reads the pile-up off the suppression runs; it takes no steps of its own.

    Args:
        scene: What it works on; its runs are read when the signal is asked for.

    Example:
        >>> from torch import nn
        >>> from lightning_mnp.config import MNPConfig
        >>> from lightning_mnp.defense_data.defense_set import DefenseSet
        >>> from lightning_mnp.surgery.layers import find_filter_layers
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> data = DefenseSet(torch.rand(8, 1, 2, 2), torch.arange(8) % 2)
        >>> masked = MaskedNetwork(network, find_filter_layers(network, data.images))
        >>> runs = [RunResult(0.5, 0.3, (30, 10), 9, 0.2, "")]
        >>> signal = PileUp(Scene(masked, data, MNPConfig(), 2, runs=runs)).signal()
        >>> signal.target_class, round(signal.value, 2)
        (0, 1.0)
    """

    name = "pile-up"

    @classmethod
    def all_steps(cls, scene: Scene) -> int:
        """Return 0: the suppression runs are made in any case."""
        return 0

    @property
    def finished(self) -> bool:
        """Always True."""
        return True

    def most_steps(self) -> int:
        """Return 0."""
        return 0

    def step(self) -> dict[str, float]:
        """Do nothing."""
        return {}

    @property
    def failed(self) -> bool:
        """Always False: counts of predictions always mean something."""
        return False

    @property
    def shares(self) -> dict[int, float]:
        """Share of the predictions on each class, over all runs."""
        least = self.scene.constants.of(PileUpConstants).least_share
        return dict(enumerate(_usual_shares(self.scene.runs, least)))

    def standout(self) -> Standout:
        """Return the class that predictions pile up on, and how far it stands out."""
        shares = self.shares
        return find_standout(shares, 1 / len(shares), self.scene.constants.of(StandoutConstants))

    def signal(self) -> Signal:
        """Return what the runs say together.

        The pile-up decides by itself only if its class is rare enough on clean images. An attack
        that leaves labels alone makes its target so, and yet that is what a suppressed network
        falls back to. A class that is rare for want of images is not: suppression unlearns it
        first. Otherwise the pile-up confirms other signals.
        """
        constants, found = self.scene.constants.of(PileUpConstants), self.standout()
        lack = self.scene.masked.raised.get(found.target_class, 0.0)
        decides = lack >= constants.rare_from
        counts_from = constants.alone_from if decides else constants.counts_from
        confirms = "the margin, the reach or the patch"
        what = f"counts from {constants.counts_from:g}, together with {confirms}"
        if decides:
            what += (
                f", and by itself from {counts_from:g}, since the class is rare on clean images: "
                f"its logit lacks {lack:.2f} nats"
            )
        shares, runs = self.shares, len(self.scene.runs)
        reason = (
            f"after clean suppression, {shares[found.target_class]:.0%} of the predictions fall on "
            f"class {found.target_class}, where the gap to the next class is {found.value:.2f} "
            f"times the spread of the others (mean of {runs} runs; {what})"
        )
        return Signal(
            self.name,
            found.value / counts_from,
            found.target_class,
            found.value,
            counts_from,
            reason,
            shares,
            decides=decides,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the runs are kept elsewhere."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing."""


def confirmed_signal(
    scene: Scene, name: str, values: dict[int, float], counts_from: float, claim: str
) -> Signal:
    """Return a signal that counts only if the pile-up points to the same class.

    Its strength is the lesser of both, and 0 if the pile-up points to another class.

    Args:
        scene: Its runs are read.
        name: The name of the signal.
        values: What was measured for each class, two classes or more; large for a backdoor.
        counts_from: How far one class has to stand out.
        claim: What the first class has before the others, in words, with ``{}`` for the class.
    """
    constants = scene.constants
    usual = statistics.median(abs(value) for value in values.values())
    found = find_standout(values, max(usual, 1e-12), constants.of(StandoutConstants))
    piled = PileUp(scene).standout()
    agree = piled.target_class == found.target_class
    confirmed = piled.value / constants.of(PileUpConstants).counts_from
    strength = min(found.value / counts_from, confirmed) if agree else 0.0
    points = "the same class" if agree else f"class {piled.target_class}"
    reason = (
        f"{claim.format(found.target_class)}, where the gap to the next class is "
        f"{found.value:.2f} times the spread of the others (counts from {counts_from:g}, together "
        f"with the pile-up, which points to {points})"
    )
    return Signal(name, strength, found.target_class, found.value, counts_from, reason, values)


def _usual_shares(runs: Sequence[RunResult], least: float) -> list[float]:
    """The geometric mean of each class's share: a backdoor's class is the same in every run."""
    logs = [
        [math.log(count / sum(run.predictions) + least) for count in run.predictions]
        for run in runs
    ]
    return [math.exp(sum(each) / len(runs)) - least for each in zip(*logs, strict=True)]


class SuppressedTrace(Trace):
    """Clean images in the suppressed network, whose predictions pile up on the target class.

    Args:
        masked: The network.
        weights: The suppressed weights of each run.
        images: Clean images, shape (N, C, ...), which the runs share.
        goals: The class, other than its own, that a backdoor takes each image to, shape (N,).
        constants: Constants that differ from their defaults.
        decides: Whether pruning goes on as long as predictions pile up.
    """

    name = "suppressed network"

    def __init__(
        self,
        masked: MaskedNetwork,
        weights: Sequence[Weights],
        images: Tensor,
        goals: Tensor,
        constants: Constants | None = None,
        decides: bool = True,
    ) -> None:
        super().__init__(constants or Constants(), decides)
        runs = max(1, min(len(weights), len(images) // LEAST_BATCH))
        self.masked = masked
        self.images = images
        self.goals = goals
        self.weights = [
            {name: weight.detach() for name, weight in each.items()} for each in weights[-runs:]
        ]

    def margins(self, masks: Tensor) -> Tensor:
        """Return the logit of the goal above all others together (their log-sum-exp), shape (N,).

        Args:
            masks: Filter masks, shape (total filters,).
        """
        parts = self.images.tensor_split(len(self.weights))
        few = len(self.images) < LEAST_BATCH  # to be normalized by their own statistics
        statistics: Statistics | None = "running" if few else None
        logits = torch.cat(
            [
                self.masked(part, weights=weights, masks=masks, statistics=statistics)
                for part, weights in zip(parts, self.weights, strict=True)
            ]
        )
        return leads(logits, self.goals)

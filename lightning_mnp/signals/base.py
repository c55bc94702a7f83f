"""The base of all signals: what a search works on, and what it has to offer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from lightning_mnp.config import Constants, MNPConfig
from lightning_mnp.defense_data.defense_set import DefenseSet, seeded_generator
from lightning_mnp.report import RunResult, Signal, SurrogateTrigger
from lightning_mnp.signals.population import Population, read_population
from lightning_mnp.signals.trace import Trace
from lightning_mnp.surgery.masked_network import MaskedNetwork

__all__ = ["Scene", "Search", "SignalSearch"]


@dataclass
class Scene:
    """What the searches of an audit share.

    Attributes:
        masked: The network, with the logits of rare classes raised.
        data: The defense set.
        config: Options.
        classes: Number of the network's classes.
        constants: Constants that differ from their defaults.
        runs: The suppression runs so far.
        tried: The classes that triggers are searched for; empty until they are chosen.
        population: Clean networks with which the score is compared.
    """

    masked: MaskedNetwork
    data: DefenseSet
    config: MNPConfig
    classes: int
    constants: Constants = field(default_factory=Constants)
    runs: list[RunResult] = field(default_factory=list)
    tried: list[int] = field(default_factory=list)
    population: Population = field(init=False)

    def __post_init__(self) -> None:
        self.population = read_population(self.config.verdict.reference)

    @property
    def most_tried(self) -> int:
        """Number of classes that triggers are searched for."""
        return min(self.classes, self.config.verdict.most_classes)

    def choose_classes(self, leading: Sequence[int] = ()) -> None:
        """Choose the classes to try, if they are not chosen yet.

        All of them in order, if there is room: then it makes no difference what the runs say.
        Otherwise those that predictions pile up on come first, then the leading ones, then drawn
        ones.

        Args:
            leading: Classes that have to be among them, as far as there is room.
        """
        if self.tried:
            return
        if self.classes <= self.most_tried:
            self.tried = list(range(self.classes))
            return
        generator = seeded_generator(self.config.seed, "classes")
        drawn = torch.randperm(self.classes, generator=generator).tolist()
        suspected = [run.top_class for run in self.runs]
        self.tried = list(dict.fromkeys([*suspected, *leading, *drawn]))[: self.most_tried]


class Search(ABC):
    """A search for one kind of trigger, which is made for pruning only.

    A search is built when the engine gets to it, and takes one step at a time.

    Args:
        scene: What it works on.

    Attributes:
        name: Name of the search and of the engine's phase.
    """

    name: ClassVar[str]

    def __init__(self, scene: Scene) -> None:
        self.scene = scene

    @classmethod
    def applies(cls, data: DefenseSet) -> bool:
        """Return whether it can be made on such images.

        Args:
            data: The defense set.
        """
        return True

    @classmethod
    @abstractmethod
    def all_steps(cls, scene: Scene) -> int:
        """Return the most steps that the whole search takes; 0 if it takes none.

        Args:
            scene: What it will work on.
        """

    @property
    @abstractmethod
    def finished(self) -> bool:
        """Whether all steps were taken."""

    @abstractmethod
    def most_steps(self) -> int:
        """Return the most steps that are left."""

    @abstractmethod
    def step(self) -> dict[str, float]:
        """Take one step.

        Returns:
            Numbers of this step, by name.
        """

    @property
    @abstractmethod
    def failed(self) -> bool:
        """Whether figures were met that have no meaning (NaN)."""

    def traces(self, target: int | None, searches: Mapping[str, Search]) -> list[Trace]:
        """Return what shows a backdoor of a class, for pruning; nothing if this search does not.

        Args:
            target: The suspected class; None for an exchange of classes.
            searches: All finished searches, by name.
        """
        return []

    def found(self) -> SurrogateTrigger | None:
        """Return the trigger that the finished search has found; None if it has none to show."""
        return None

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and primitives."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""


class SignalSearch(Search):
    """A search that is part of every audit, and the signal that it gives."""

    @abstractmethod
    def signal(self) -> Signal:
        """Return what the finished search says."""

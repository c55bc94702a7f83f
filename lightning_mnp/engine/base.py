"""The base of all phases: the protocol by which the engine runs them, a batch at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from lightning_mnp.engine.case import Case
from lightning_mnp.mnp.updates import Updates
from lightning_mnp.report import DefenseReport

__all__ = ["Entry", "OneStepPhase", "Phase"]

Entry = tuple[str, int]  # name of a phase, number of the suppression run that it belongs to


class Phase(ABC):
    """One phase of a defense, built when the engine reaches it.

    A phase keeps what only it needs; what others need goes into the case. So a phase can be built
    anew at any time, to go on from its state or to add to the report.

    Args:
        case: What is known of the network.
        run: The suppression run that it belongs to, from 0.

    Attributes:
        name: Its name, in the plan, in messages and in the report's ``seconds``.
        steps: Steps taken.
    """

    name: str

    def __init__(self, case: Case, run: int = 0) -> None:
        self.case = case
        self.run = run
        self.steps = 0

    @property
    @abstractmethod
    def done(self) -> bool:
        """Whether no step is left."""

    @abstractmethod
    def most_steps(self) -> int:
        """Return an upper bound on the steps that are left."""

    @abstractmethod
    def step(self, updates: Updates) -> dict[str, float]:
        """Take one step.

        Args:
            updates: Does backward passes and optimizer steps.

        Returns:
            Numbers of this step, by name.
        """

    def then(self) -> list[Entry]:
        """Return what has to be done next because of what this phase has found."""
        return []

    def report(self, report: DefenseReport) -> None:  # noqa: B027 (most phases add nothing)
        """Write what the phase has found into a report; called once for all runs of its name.

        Args:
            report: The report.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what only this phase needs, as tensors and primitives."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.steps = int(state["steps"])


class OneStepPhase(Phase):
    """A phase of a single step."""

    @property
    def done(self) -> bool:
        """Whether the step was taken."""
        return self.steps > 0

    def most_steps(self) -> int:
        """Return the step, if it is left."""
        return int(not self.steps)

"""The engine: runs the phases of a plan one step at a time, and can be stopped at any."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Set
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from lightning_mnp.config import Constants, MNPConfig, require_config
from lightning_mnp.defense_data.defense_set import DefenseSet
from lightning_mnp.engine.base import Phase
from lightning_mnp.engine.case import When, open_case
from lightning_mnp.engine.plan import Plan
from lightning_mnp.engine.state import FORMAT, case_state, check_state, identity, load_case
from lightning_mnp.mnp.updates import PlainUpdates, Updates
from lightning_mnp.purify.purification import Purification
from lightning_mnp.report import DefenseReport
from lightning_mnp.signals.verdict import Judgement, signals_to_repeat
from lightning_mnp.surgery.forward import Forward
from lightning_mnp.surgery.prune import Pruning

__all__ = ["MNPDefense", "When"]


class MNPDefense:
    """Audits a network and finds the filters to prune, one batch a step.

    It runs the phases of a plan one after the other: ``reference``; ``suppression`` and
    ``saliency``; a search for each signal; ``verdict``, which may ask for further runs; searches
    that only pruning needs; ``masks``, ``pruning``, ``soft_masks``, ``tuning``,
    ``check`` and ``reaudit``.

    The model is not changed. Every random choice follows from the seed and the place in this
    order, so a run that was stopped goes on from its state as if it had not been.

    Args:
        model: The model, on its device.
        data: The defense set.
        config: Options.
        when: ``"never"`` audits only, ``"flagged"`` prunes if the verdict is ``"backdoored"``,
            ``"always"`` prunes in any case.
        network: Dotted name of the submodule that classifies, if the model has no ``forward``.
        forward: How that is called, see :func:`~lightning_mnp.surgery.forward.call_network`.
        autocast: Makes the context in which the network runs, for lower precision.
        constants: Constants of the method that differ from their defaults, for studies.
        signals: Names of the signals that are made; all if None.

    Raises:
        ValueError: If the model and the defense set do not fit each other or the options.
        TypeError: If the model's output holds no logits.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> data = DefenseSet(torch.rand(8, 1, 2, 2), torch.arange(8) % 2)
        >>> config = MNPConfig().changed({"suppression.runs": 1})
        >>> defense = MNPDefense(network, data, config, when="never")
        >>> while not defense.finished:
        ...     metrics = defense.step()
        >>> len(defense.report().runs)
        1
    """

    def __init__(
        self,
        model: nn.Module,
        data: DefenseSet,
        config: MNPConfig | None = None,
        *,
        when: When = "always",
        network: str | None = None,
        forward: Forward | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        constants: Constants | None = None,
        signals: Set[str] | None = None,
    ) -> None:
        config, own = require_config(config), constants or Constants()
        self.case = open_case(model, data, config, when, network, forward, autocast, own, signals)
        self.plan = Plan(self.case, self._audit_of)
        self.position = 0
        self.cost = {name: defaultdict[str, float](float) for name in ("seconds", "passes")}
        self._current: Phase | None = None

    def _audit_of(self, model: nn.Module) -> MNPDefense:
        """Make the engine that audits a purified copy, by the signals that spoke."""
        case, limit = self.case, self.case.config.verdict.threshold
        again = None
        if case.judges_by_signals:
            again = signals_to_repeat(case.signals(), limit, case.constants)
        return MNPDefense(
            model,
            case.data,
            case.config.changed({"pruning.reaudit": False}),
            when="never",
            network="",  # the function descends to the network by itself
            forward=case.masked.forward,
            autocast=case.masked.autocast,
            constants=case.constants,
            signals=again,
        )

    @property
    def current(self) -> Phase:
        """The phase that the next step belongs to, built when it is first asked for."""
        if self._current is None:
            self._current = self.plan.build(self.plan.entries[self.position])
        return self._current

    @property
    def phase(self) -> str:
        """Its name, or ``"finished"``."""
        return "finished" if self.finished else self.plan.entries[self.position][0]

    @property
    def run(self) -> int:
        """The suppression run that the next step belongs to, from 0."""
        return self.plan.entries[min(self.position, len(self.plan.entries) - 1)][1]

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.position >= len(self.plan.entries)

    @property
    def place(self) -> tuple[str, int, int]:
        """Name and run of the phase, and the steps that it has taken."""
        return self.phase, self.run, 0 if self.finished else self.current.steps

    def most_steps(self) -> int:
        """Return an upper bound on the steps still to do, to which a verdict may add."""
        if self.finished:
            return 0
        later = self.plan.entries[self.position + 1 :]
        return self.current.most_steps() + sum(self.plan.build(e).most_steps() for e in later)

    def step(self, updates: Updates | None = None) -> dict[str, float]:
        """Do the next step.

        Args:
            updates: Does backward passes and optimizer steps; plainly, if None.

        Returns:
            Numbers by name.

        Raises:
            RuntimeError: If the defense has finished.
            torch.OutOfMemoryError: If a batch is too large. Smaller ones are not tried: what is
                found would then depend on how much memory was free.
        """
        if self.finished:
            raise RuntimeError("The defense has finished; there is no step left.")
        started = time.perf_counter()
        where = f"in phase {self.phase!r}, run {self.run + 1}"
        with self.case.protected(where), torch.enable_grad():
            phase = self.current
            # Done already, if an interrupt came between the last step and the next phase.
            metrics = {} if phase.done else phase.step(updates or PlainUpdates())
            if phase.done:
                self.plan.entries[self.position + 1 : self.position + 1] = phase.then()
                self.position += 1
                self._current = None
        self.cost["seconds"][phase.name] += time.perf_counter() - started
        self.cost["passes"][phase.name] += self.case.masked.seen.take()
        return metrics

    @property
    def judgement(self) -> Judgement:
        """The verdict, once it is given."""
        assert self.case.judgement is not None, "the verdict has not been given yet"
        return self.case.judgement

    @property
    def purification(self) -> Purification:
        """What is changed in the network."""
        return self.case.purification

    @property
    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """The optimizers of all stages."""
        return self.case.optimizers

    def prune_(self) -> Pruning:
        """Prune the model itself.

        Returns:
            What was removed; its ``undo`` puts it back.

        Raises:
            RuntimeError: If the defense has not finished.
        """
        self._require_finished()
        return self.purification.changes.apply(self.case.model)

    def purified(self) -> nn.Module:
        """Return a pruned copy of the model.

        Raises:
            RuntimeError: If the defense has not finished.
        """
        self._require_finished()
        return self.purification.purified()

    def report(self) -> DefenseReport:
        """Return the outcome, without a model.

        Raises:
            RuntimeError: If the defense has not finished.
        """
        self._require_finished()
        report = self.case.new_report()
        report.seconds, report.passes = map(dict, self.cost.values())
        for entry in dict(self.plan.entries).items():  # each name once, with its last run
            self.plan.build(entry).report(report)
        return report

    def _require_finished(self) -> None:
        if not self.finished:
            raise RuntimeError(
                f"The defense is in phase {self.phase!r}; it has a result when it has finished."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state as tensors and primitives, readable with ``weights_only=True``."""
        return {
            "format": FORMAT,
            "identity": identity(self.case),
            "plan": [list(entry) for entry in self.plan.entries],
            "position": self.position,
            "case": case_state(self.case),
            "phase": None if self.finished else self.current.state_dict(),
            "cost": {name: dict(each) for name, each in self.cost.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            ValueError: If the state is of another format, model, defense set or options.
        """
        check_state(self.case, state)
        self.plan.entries = [(str(name), int(run)) for name, run in state["plan"]]
        self.position = int(state["position"])
        for name, each in state["cost"].items():
            self.cost[name] = defaultdict(float, each)
        self._current = None
        load_case(self.case, state["case"])
        if state["phase"] is not None:
            self.current.load_state_dict(state["phase"])

"""The plan: which phases a defense goes through, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import nn

from lightning_mnp.engine.base import Entry, Phase
from lightning_mnp.engine.case import Case
from lightning_mnp.engine.phases import (
    MaskPhase,
    ReferencePhase,
    SaliencyPhase,
    SearchPhase,
    SuppressionPhase,
    VerdictPhase,
)
from lightning_mnp.engine.purify_phases import (
    CheckPhase,
    GreedyPhase,
    ReauditPhase,
    SecondEngine,
    SoftMaskPhase,
    ThresholdPhase,
    TuningPhase,
)
from lightning_mnp.signals.base import Search
from lightning_mnp.signals.screening import Screening

__all__ = ["Plan"]


class Plan:
    """Knows the phases of a case by name, and their order.

    Args:
        case: What is known of the network.
        audit: Makes an engine that audits another network, for the second audit.

    Attributes:
        entries: The phases, each with the suppression run that it belongs to.
    """

    def __init__(self, case: Case, audit: Callable[[nn.Module], SecondEngine]) -> None:
        self.case = case
        self._audit = audit
        self.entries = [("reference", 0), *self._runs(case.first_runs, case.when == "always")]
        if case.wanted_signals:
            self.entries += self._searches({Screening.name: Screening})
        self.entries += self._searches(case.wanted_signals)
        self.entries.append(("verdict", 0))
        if case.when == "always":
            self.entries += self._pruning()

    def _runs(self, count: int, masks: bool) -> list[Entry]:
        """The first suppression runs, with the dual masks if pruning needs them."""
        names = ["suppression", "saliency", "masks"]
        if not (masks and self.case.ranks_by_masks):
            names.remove("masks")
        return [(name, run) for run in range(count) for name in names]

    def _searches(self, wanted: Mapping[str, type[Search]]) -> list[Entry]:
        """The searches that take steps."""
        return [(name, 0) for name, kind in wanted.items() if kind.all_steps(self.case.scene)]

    def _pruning(self) -> list[Entry]:
        options = self.case.config.pruning
        after = {"soft_masks": options.soft_mask_steps, "tuning": options.tuning_steps}
        further = [name for name, steps in after.items() if options.rule == "auto" and steps > 0]
        names = ["pruning", *further, "check"]
        phases = [(name, 0) for name in (*names, *(["reaudit"] if options.reaudit else []))]
        return [*self._searches(self.case.wanted_traces), *phases]

    def _pruning_if_flagged(self) -> list[Entry]:
        """What follows a verdict: dual masks, on runs that are repeated exactly, and pruning."""
        if self.case.when != "flagged":
            return []
        runs = self.case.config.suppression.runs
        repeated = self._runs(runs, masks=True) if self.case.ranks_by_masks else []
        return [*repeated, *self._pruning()]

    def build(self, entry: Entry) -> Phase:
        """Build a phase, which takes no work.

        Args:
            entry: Its name and its run.
        """
        name, run = entry
        pruning = ThresholdPhase if self.case.ranks_by_masks else GreedyPhase
        kinds: dict[str, Callable[[Case, int], Phase]] = {
            "reference": ReferencePhase,
            "suppression": SuppressionPhase,
            "saliency": SaliencyPhase,
            "masks": MaskPhase,
            "verdict": partial(VerdictPhase, pruning=self._pruning_if_flagged()),
            "pruning": pruning,
            "soft_masks": SoftMaskPhase,
            "tuning": TuningPhase,
            "check": CheckPhase,
            "reaudit": partial(ReauditPhase, audit=self._audit, usual_steps=self._audit_steps),
        }
        return kinds.get(name, partial(SearchPhase, name=name))(self.case, run)

    def _audit_steps(self) -> int:
        """An upper bound on the steps of an audit, without further runs."""
        case = self.case
        runs = 1 if case.judges_by_signals else case.config.suppression.runs
        run = SuppressionPhase(case).most_steps() + case.passes
        searches = 0
        if case.judges_by_signals:
            kinds: list[type[Search]] = [Screening, *case.wanted_signals.values()]
            searches = sum(kind.all_steps(case.scene) for kind in kinds)
        return case.passes + runs * run + searches + 1

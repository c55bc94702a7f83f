"""The phases that change a network: pruning, soft masks, tuning, the check, a second audit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from lightning_mnp.engine.base import OneStepPhase, Phase
from lightning_mnp.engine.case import Case
from lightning_mnp.mnp.thresholds import choose_filters, pruned_count
from lightning_mnp.mnp.updates import Updates
from lightning_mnp.report import DefenseReport, PruningReport, SecondAudit
from lightning_mnp.signals.verdict import Judgement

__all__ = [
    "CheckPhase",
    "GreedyPhase",
    "ReauditPhase",
    "SecondEngine",
    "SoftMaskPhase",
    "ThresholdPhase",
    "TuningPhase",
]


class _Pruning(Phase):
    """What both ways of pruning write into the report."""

    name = "pruning"

    def report(self, report: DefenseReport) -> None:
        case, changes = self.case, self.case.purification.changes
        removed = [int(position) for position in changes.removed]
        report.pruned = [case.layers.locate(position) for position in removed]
        scores, ranked = case.scores, bool(case.masks_count)
        greedy, shift = case.purification.greedy, changes.shift
        report.pruning = PruningReport(
            scores=[float(scores[position]) for position in removed] if ranked else [],
            counts=[] if greedy is None else list(greedy.counts),
            curve=[] if greedy is None else [list(point) for point in greedy.curve],
            traces=[] if greedy is None else [trace.name for trace in greedy.traces],
            masks=changes.left(),
            tuned=changes.tuned_by,
            cut=len(changes.cut),
            shift=[] if shift is None else shift.values.tolist(),
            sums=self._by_layer(scores if ranked else None),
        )

    def _by_layer(self, values: Tensor | None) -> dict[str, list[float]]:
        """Return one value for each filter, by layer; empty if there are none."""
        if values is None:
            return {}
        layers = self.case.layers
        pairs = zip(layers, values.split(layers.sizes), strict=True)
        return {layer.name: part.tolist() for layer, part in pairs}


class ThresholdPhase(_Pruning, OneStepPhase):
    """Pruning of the lowest M1 + M2 (line 14 of Algorithm 1)."""

    def step(self, updates: Updates) -> dict[str, float]:
        """Choose all filters at once."""
        scores, options = self.case.scores, self.case.config.pruning
        choice = choose_filters(scores, self.case.layers.sizes, options.rule, options.amount)
        purification, count = self.case.purification, len(choice.pruned)
        purification.remove(choice.pruned)
        purification.spare(choice.spared)
        wanted = pruned_count(scores, options.rule, options.amount)
        if options.rule != "threshold" and count < wanted:
            self.case.warnings.append(
                f"`pruning.amount` asks for {wanted} filters, of which only {count} can go: each "
                "layer keeps one"
            )
        self.steps += 1
        return {"filters": float(count)}


class GreedyPhase(_Pruning):
    """Greedy pruning along traces, one or more filters a step."""

    @property
    def done(self) -> bool:
        """Whether it has stopped."""
        greedy = self.case.purification.greedy
        return greedy is not None and bool(greedy.stopped)

    def most_steps(self) -> int:
        """Return a step for each filter that may go at most, one to begin and one to stop."""
        return 0 if self.done else self.case.purification.most_filters + 2

    def step(self, updates: Updates) -> dict[str, float]:
        """Begin, or take one or more filters."""
        purification = self.case.purification
        if purification.greedy is None:
            purification.begin(self.case.traces())
        self.steps += 1
        return purification.greedy_step()


class SoftMaskPhase(Phase):
    """Soft masks for the kernels that are left."""

    name = "soft_masks"

    @property
    def done(self) -> bool:
        """Whether they have come to their end."""
        return self.case.purification.settled

    def most_steps(self) -> int:
        """Return the steps that are left."""
        return 0 if self.done else self.case.config.pruning.soft_mask_steps - self.steps

    def step(self, updates: Updates) -> dict[str, float]:
        """Turn kernels down by one step."""
        self.steps += 1
        return self.case.purification.soft_mask_step()


class TuningPhase(Phase):
    """Kernels that are cut, and weights that are tuned to win back what that costs."""

    name = "tuning"

    @property
    def done(self) -> bool:
        """Whether it has come to its end."""
        return self.case.purification.ended

    def most_steps(self) -> int:
        """Return the steps that are left."""
        return 0 if self.done else self.case.config.pruning.tuning_steps - self.steps

    def step(self, updates: Updates) -> dict[str, float]:
        """Tune weights by one step."""
        self.steps += 1
        purification = self.case.purification
        return purification.tuning_step(None if purification.tuning else self.case.patch())


class CheckPhase(OneStepPhase):
    """The repair of the logits, and the accuracy after all that."""

    name = "check"

    def step(self, updates: Updates) -> dict[str, float]:
        """Fit the repair and measure the accuracy."""
        assert self.case.judgement is not None
        found = self.case.purification.check(self.case.judgement.suspect)
        self.steps += 1  # last, so that an interrupt does not skip the repair
        return {"accuracy": found}

    def report(self, report: DefenseReport) -> None:
        """Write the accuracy."""
        report.accuracy_after = self.case.purification.accuracy
        report.class_accuracy_after = dict(self.case.purification.class_accuracy)


class SecondEngine(Protocol):
    """What the second audit needs of the engine that it runs."""

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""

    @property
    def judgement(self) -> Judgement:
        """The verdict."""

    def step(self) -> dict[str, float]:
        """Do the next step."""

    def most_steps(self) -> int:
        """Return an upper bound on the steps that are left."""

    def report(self) -> DefenseReport:
        """Return the outcome."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was taken."""


class ReauditPhase(Phase):
    """An audit of the purified copy, by an engine of its own.

    Args:
        case: What is known of the network.
        run: Not used.
        audit: Makes an engine that audits a network.
        usual_steps: Returns the steps that an audit takes at most, before that engine is made.
    """

    name = "reaudit"

    def __init__(
        self,
        case: Case,
        run: int = 0,
        *,
        audit: Callable[[nn.Module], SecondEngine],
        usual_steps: Callable[[], int],
    ) -> None:
        super().__init__(case, run)
        self._audit = audit
        self._usual_steps = usual_steps
        self.second: SecondEngine | None = None

    @property
    def done(self) -> bool:
        """Whether the second audit has finished, or there is nothing to audit again."""
        if not self.case.purification.changes.any:
            return self.steps > 0
        return self.case.second_audit is not None

    def most_steps(self) -> int:
        """Return the steps that are left."""
        if self.done:
            return 0
        return self._usual_steps() if self.second is None else self.second.most_steps()

    def step(self, updates: Updates) -> dict[str, float]:
        """Take one step of the second audit."""
        self.steps += 1
        if not self.case.purification.changes.any:
            return {}
        # The second engine's optimizers are its own: no Trainer knows of them.
        self.second = self.second or self._audit(self.case.purification.purified())
        metrics = {} if self.second.finished else self.second.step()
        if self.second.finished:
            judgement, report = self.second.judgement, self.second.report()
            self.case.masked.seen.add(sum(report.passes.values()))
            self.case.second_audit = SecondAudit(
                verdict=judgement.verdict,
                score=judgement.score,
                target_class=judgement.target_class,
                all_to_all=judgement.all_to_all,
                detection_ratio=judgement.detection_ratio,
                pile_up=report.pile_up,
                reasons=list(judgement.reasons),
            )
            if judgement.verdict != "clean":
                why = judgement.reasons[0 if judgement.judged else -1]
                self.case.warnings.append(
                    f"audited again after pruning, the network is {judgement.verdict}: {why}"
                )
        return metrics

    def report(self, report: DefenseReport) -> None:
        """Write what the second audit says."""
        report.reaudit = self.case.second_audit

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the second engine."""
        second = None if self.second is None else self.second.state_dict()
        return {**super().state_dict(), "second": second}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        super().load_state_dict(state)
        self.second = None
        if state["second"] is not None:
            self.second = self._audit(self.case.purification.purified())
            self.second.load_state_dict(state["second"])

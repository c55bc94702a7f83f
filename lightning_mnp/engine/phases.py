"""The phases of an audit: reference, suppression, saliency, masks, searches, verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from lightning_mnp.defense_data.evaluation import class_accuracy
from lightning_mnp.engine.base import Entry, OneStepPhase, Phase
from lightning_mnp.engine.case import Case
from lightning_mnp.engine.pass_tally import PassTally
from lightning_mnp.mnp.detection_ratio import LITERAL_WARNING, detection_ratio
from lightning_mnp.mnp.saliency import batch_clc
from lightning_mnp.mnp.suppression import RunImages, suppression_parts
from lightning_mnp.mnp.updates import Updates
from lightning_mnp.report import DefenseReport, DefenseSetSummary, RunResult
from lightning_mnp.signals.abstention import find_doubts
from lightning_mnp.signals.rare_classes import RareClassConstants, find_rare_classes
from lightning_mnp.signals.screening import Screening
from lightning_mnp.signals.verdict import runs_wanted

__all__ = [
    "MaskPhase",
    "ReferencePhase",
    "SaliencyPhase",
    "SearchPhase",
    "SuppressionPhase",
    "VerdictPhase",
]


class _Pass(Phase):
    """A phase of one pass over the defense set in stored order, which adds up saliency."""

    def __init__(self, case: Case, run: int = 0) -> None:
        super().__init__(case, run)
        self.form = case.config.verdict.saliency
        self.tally = PassTally(case.masked, case.classes, self.form)

    @property
    def done(self) -> bool:
        return self.steps >= self.case.passes

    def most_steps(self) -> int:
        return self.case.passes - self.steps

    def batch(self) -> tuple[Tensor, Tensor]:
        case = self.case
        return case.data.batch(self.steps, case.config.batch_size, case.masked.device)

    @property
    def seen(self) -> int:
        """Number of images in the batches before this step; batches differ by one at most."""
        size, larger = divmod(len(self.case.data), self.case.passes)
        return self.steps * size + min(self.steps, larger)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "tally": self.tally.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.tally.load_state_dict(state["tally"])


class ReferencePhase(_Pass):
    """Saliency, accuracy and rare classes of the network as it is, and whether it can be judged."""

    name = "reference"

    def step(self, updates: Updates) -> dict[str, float]:
        """Look at one batch."""
        case, (images, labels) = self.case, self.batch()
        weights = case.masked.weights()
        changes, logits = batch_clc(case.masked, weights, images, labels, self.form)
        if self.form == "weight":  # on the way to which the statistics may be those of the batch
            with torch.no_grad():
                logits = case.masked(images, statistics="running")
        self.tally.add(changes, logits, labels, self.seen)
        if self.most_steps() > 1:
            self.steps += 1
            return {}
        case.correlation = self.tally.correlation(weights)
        case.accuracy = self.tally.accuracy
        case.class_accuracy = class_accuracy(self.tally.logits, self.tally.labels)
        size, logits = case.config.batch_size, self.tally.logits
        case.doubts = find_doubts(case.masked, case.data, logits, size, case.constants)
        if case.config.verdict.raise_rare_classes:
            constants = case.constants.of(RareClassConstants)
            rare = find_rare_classes(self.tally.logits, self.tally.labels, constants)
            case.raise_rare_classes(rare)
        self.steps += 1  # last, so that an interrupt loses no result
        return {"correlation": case.correlation, "accuracy": case.accuracy}

    def report(self, report: DefenseReport) -> None:
        """Write accuracy, rare classes, layers and the defense set."""
        case = self.case
        if self.form == "weight":
            report.warnings.append(LITERAL_WARNING)
        report.accuracy_before = case.accuracy
        report.class_accuracy_before = dict(case.class_accuracy)
        report.rare_classes = dict(case.rare_classes)
        report.filters = case.layers.total
        report.layers = [asdict(layer) for layer in case.layers]
        report.skipped = list(case.layers.skipped)
        shape = list(case.data.images.shape[1:])
        counts, digest = case.data.counts, case.data.fingerprint
        report.defense_set = DefenseSetSummary(len(case.data), shape, counts, digest)


class SuppressionPhase(Phase):
    """One run of clean suppression (Eq. 6)."""

    name = "suppression"

    def __init__(self, case: Case, run: int = 0) -> None:
        super().__init__(case, run)
        self._images = RunImages(case.data, case.config, run)

    @property
    def done(self) -> bool:
        """Whether the run has stopped."""
        return self.steps > 0 and bool(self.case.suppression.stopped)

    def most_steps(self) -> int:
        """Return the steps of all passes that are left."""
        return self._images.most_steps - self.steps

    def _keep_for_pruning(self) -> None:
        """Keep the weights of the run before this one, if pruning may look at them.

        Once: an interrupted first step is taken again.
        """
        case, most = self.case, self.case.config.suppression.runs - 1
        if case.may_prune_greedily and len(case.suppressed) < min(most, self.run):
            weights = case.suppression.weights
            case.suppressed.append({name: weight.clone() for name, weight in weights.items()})

    def step(self, updates: Updates) -> dict[str, float]:
        """Climb the clean loss by one step."""
        suppression, seen = self.case.suppression, self._images
        if self.steps == 0:
            self._keep_for_pruning()
            suppression.restart()
        images, labels = seen.batch(self.steps, self.case.masked.device)
        metrics = suppression.step(images, labels, seen.size, updates)
        self.steps += 1
        if self.steps >= seen.most_steps:
            suppression.finish("all passes were made")
        if suppression.stopped:
            suppression.finish("")
        return metrics


class SaliencyPhase(_Pass):
    """Saliency and predictions of the suppressed network: the result of a run."""

    name = "saliency"

    def step(self, updates: Updates) -> dict[str, float]:
        """Look at one batch."""
        case, (images, labels) = self.case, self.batch()
        suppression = case.suppression
        weights = {name: weight.detach() for name, weight in suppression.weights.items()}
        found = batch_clc(case.raised, weights, images, labels, self.form, suppressed=True)
        self.tally.add(*found, labels, self.seen)
        if self.most_steps() > 1:
            self.steps += 1
            return {}
        correlation = self.tally.correlation(weights)
        result = RunResult(
            detection_ratio=detection_ratio(correlation, case.correlation),
            correlation=correlation,
            predictions=tuple(self.tally.predictions.tolist()),
            steps=suppression.steps,
            accuracy=suppression.accuracy,
            stopped=suppression.stopped,
            curve=tuple(suppression.curve),
        )
        if self.run == len(case.runs):  # a repeated run is known already
            case.runs.append(result)
        self.steps += 1
        return {"detection_ratio": result.detection_ratio, "pile_up": result.pile_up}

    def report(self, report: DefenseReport) -> None:
        """Write the runs."""
        report.runs = list(self.case.runs)


class MaskPhase(Phase):
    """The dual masks M1 and M2 of one run (Eq. 5 and 7)."""

    name = "masks"

    @property
    def done(self) -> bool:
        """Whether all passes were made."""
        return self.most_steps() <= 0

    def most_steps(self) -> int:
        """Return the steps of all passes that are left."""
        return self.case.passes * self.case.config.masks.epochs - self.steps

    def step(self, updates: Updates) -> dict[str, float]:
        """Take one step of both masks on the same batch."""
        case, config = self.case, self.case.config
        if self.steps == 0:
            case.penalty.restart(case.suppression.weights)
            case.preserving.restart(case.masked.weights())
        epoch, index = divmod(self.steps, case.passes)
        key = (config.seed, "masks", self.run, epoch)
        device = case.masked.device
        images, labels = case.data.batch(index, config.batch_size, device, config.augment, key)
        first = case.penalty.step(images, labels, updates)
        second = case.preserving.step(images, labels, updates)
        if self.most_steps() <= 1:
            case.masks_sum += case.penalty.values.detach() + case.preserving.values.detach()
            case.masks_count += 1
            for name, mask in (("M1", case.penalty), ("M2", case.preserving)):
                if mask.stopped:
                    number = case.masks_count
                    case.warnings.append(f"{name} of run {number} stopped early: {mask.stopped}")
        self.steps += 1
        return {
            "penalty_loss": first["loss"],
            "preserving_loss": second["loss"],
            "accuracy": first["accuracy"],
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the steps and, once there are any, the masks."""
        state = super().state_dict()
        if self.steps:
            state["penalty"] = self.case.penalty.state_dict()
            state["preserving"] = self.case.preserving.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        super().load_state_dict(state)
        if self.steps:
            self.case.penalty.restart(self.case.suppression.weights)
            self.case.penalty.load_state_dict(state["penalty"])
            self.case.preserving.restart(self.case.masked.weights())
            self.case.preserving.load_state_dict(state["preserving"])


class SearchPhase(Phase):
    """One search for a trigger, by the name of which it goes.

    Args:
        case: What is known of the network.
        run: Not used.
        name: The search.
    """

    def __init__(self, case: Case, run: int = 0, name: str = "") -> None:
        super().__init__(case, run)
        self.name = name

    @property
    def done(self) -> bool:
        """Whether the search has finished, or is not worth while."""
        case = self.case
        if case.doubts and case.when != "always":  # the network will not be judged, nor pruned
            return True
        return self.name in case.found

    def most_steps(self) -> int:
        """Return the steps that are left, or all of them before the search is built."""
        if self.done:
            return 0
        if self.name in self.case.searches:
            return self.case.search(self.name).most_steps()
        return self.case.wanted_searches[self.name].all_steps(self.case.scene)

    def step(self, updates: Updates) -> dict[str, float]:
        """Take one step of the search."""
        case = self.case
        if self.name != Screening.name:
            case.scene.choose_classes()
        search = case.search(self.name)
        # Finished already, if an interrupt came before what was found was drawn.
        metrics = {} if search.finished else search.step()
        if search.finished:
            case.found[self.name] = search.found()
        if self.name == Screening.name and self.done:
            case.warnings.append(
                f"triggers were searched for in {len(case.scene.tried)} of {case.classes} classes: "
                "those that stood out in a short look at all of them, and drawn ones; raise "
                "`verdict.most_classes` to search more"
            )
        self.steps += 1
        return metrics


class VerdictPhase(OneStepPhase):
    """The verdict, which may ask for further suppression runs, or for pruning.

    Args:
        case: What is known of the network.
        run: Not used.
        pruning: What is to be done with a flagged network.
    """

    name = "verdict"

    def __init__(self, case: Case, run: int = 0, pruning: Sequence[Entry] = ()) -> None:
        super().__init__(case, run)
        self._pruning = list(pruning)

    def step(self, updates: Updates) -> dict[str, float]:
        """Judge the network."""
        case = self.case
        case.judgement = case.judge()
        self.steps += 1
        return {
            "backdoored": float(case.judgement.verdict == "backdoored"),
            "detection_ratio": case.judgement.detection_ratio,
            "pile_up": mean(run.pile_up for run in case.runs) if case.runs else math.nan,
        }

    def then(self) -> list[Entry]:
        """Return further runs and another verdict, or the pruning of a flagged network."""
        further = self._further_runs()
        if further:
            entries = [(name, run) for run in further for name in ("suppression", "saliency")]
            return [*entries, ("verdict", 0)]
        assert self.case.judgement is not None
        flagged = self.case.judgement.verdict == "backdoored"
        return self._pruning if flagged and self.case.when == "flagged" else []

    def _further_runs(self) -> range:
        """The runs to make before the next verdict."""
        case, made = self.case, len(self.case.runs)
        # Of a network that is not judged in any case, more runs would say nothing.
        if not case.judges_by_signals or case.doubts:
            return range(0)
        parts = suppression_parts(case.data, case.config)
        found, options = case.signals(), case.config.suppression
        return range(made, runs_wanted(made, found, options, parts, case.constants))

    def report(self, report: DefenseReport) -> None:
        """Write the verdict with its signals and reasons."""
        judgement = self.case.judgement
        assert judgement is not None
        report.verdict = judgement.verdict
        report.judged = judgement.judged
        report.target_class = judgement.target_class
        report.all_to_all = judgement.all_to_all
        report.score = judgement.score
        if judgement.judged:
            report.reference = self.case.scene.population.rate(judgement.score)
        report.detection_ratio = judgement.detection_ratio
        report.reasons = list(judgement.reasons)
        report.signals = self.case.signals()
        ranked = dict.fromkeys([*(signal.name for signal in report.signals), *self.case.found])
        found = [self.case.found.get(name) for name in ranked]
        suspect = judgement.suspect
        report.triggers = [each for each in found if each and each.target_class == suspect]

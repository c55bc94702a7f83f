"""The engine: a resumable state machine over the stages, fed from the defense set."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_mnp.config import MNPConfig, require_config
from lightning_mnp.defense_data.defense_set import DefenseSet
from lightning_mnp.engine.pass_tally import PassTally
from lightning_mnp.engine.state import dump_state, load_state, make_report
from lightning_mnp.hosting.memory import explain_out_of_memory
from lightning_mnp.mnp.dual_masks import DualMask
from lightning_mnp.mnp.saliency import batch_clc
from lightning_mnp.mnp.suppression import CleanSuppression, RunImages, suppression_parts
from lightning_mnp.mnp.thresholds import pruned_count, pruning_order
from lightning_mnp.mnp.updates import PlainUpdates, Updates
from lightning_mnp.purify.purification import Purification
from lightning_mnp.purify.traces import Source, find_sources
from lightning_mnp.report import DefenseReport, RunResult
from lightning_mnp.signals.margin import MarginSearch
from lightning_mnp.signals.pattern import PatternSearch
from lightning_mnp.signals.permutation import PermutationSearch
from lightning_mnp.signals.rare_classes import find_handicaps
from lightning_mnp.signals.registry import Surrogates
from lightning_mnp.signals.verdict import Judgement, Signal, in_doubt, judge, signals
from lightning_mnp.surgery.forward import Forward
from lightning_mnp.surgery.guards import (
    refuse_scripts,
    refuse_wrappers,
    running_alone,
    unchanged_on_error,
)
from lightning_mnp.surgery.layers import find_filter_layers
from lightning_mnp.surgery.masked_network import MaskedNetwork, Weights
from lightning_mnp.surgery.network import check_copy, check_network, network_forward
from lightning_mnp.surgery.prune import Pruning

__all__ = ["MNPDefense", "Phase", "When"]

When = Literal["never", "flagged", "always"]
Phase = Literal[
    "reference",
    "suppression",
    "saliency",
    "masks",
    "reach",
    "margin",
    "patch",
    "overlay",
    "warp",
    "permutation",
    "verdict",
    "pruning",
    "attenuation",
    "check",
    "reaudit",
    "finished",
]


class MNPDefense:
    """Audits a network and finds the filters to prune, one batch a step.

    The phases: ``reference`` (saliency and accuracy of the network as it is); for every run
    ``suppression``, ``saliency`` of the suppressed weights and, if the pruning rule ranks by them,
    ``masks``; ``reach`` of the classes, their greatest ``margin``, how far a ``patch``, an
    ``overlay`` and a ``warp`` drive images to them, and whether a patch exchanges them
    (``permutation``); ``verdict``, which asks for further ``suppression`` and ``saliency`` where it
    hangs on an unclear pile-up, and then for another ``verdict``; ``pruning``; by the automatic
    rule, ``attenuation`` of the filters that are left; ``check`` (accuracy after that); where
    anything was done, ``reaudit`` of the purified copy. With ``when="flagged"``, masks come after
    the verdict, on runs that are repeated exactly.

    The model is not changed. Every random choice follows from the seed and the place in this
    order, so the state is tensors and primitives, and a run that was stopped goes on as if it
    had not been.

    Args:
        model: The model, on its device.
        data: The defense set.
        config: Options.
        when: ``"never"`` audits only, ``"flagged"`` prunes if the verdict is ``"backdoored"``,
            ``"always"`` prunes in any case.
        network: Dotted name of the submodule that classifies, where the model has no ``forward``.
        forward: How that is called, see :func:`~lightning_mnp.surgery.forward.call_network`.
        autocast: Makes the context in which the network runs, for lower precision.

    Raises:
        ValueError: If the model and the defense set do not fit each other or the options.
        TypeError: If the model's output holds no logits.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> data = DefenseSet(torch.rand(8, 1, 2, 2), torch.arange(8) % 2)
        >>> defense = MNPDefense(network, data, MNPConfig(runs=1, mask_epochs=2), when="never")
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
    ) -> None:
        if when not in get_args(When):
            raise ValueError(
                f"Expected argument `when` to be one of {get_args(When)}, but got {when!r}."
            )
        self.config = require_config(config)
        self.model = model
        self.data = data
        self.when = when
        call = network_forward(model, network, forward)
        parameter = next(model.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        sample = data.images[:2].to(device)
        remedy = "The model needs more than there is even for so few."
        refuse_wrappers(model)
        refuse_scripts(model)
        told = explain_out_of_memory(f"on {len(sample)} images", remedy)
        with told, unchanged_on_error(model), running_alone(model):
            if when != "never" and self.config.reaudit:
                check_copy(model)
            self.classes = check_network(model, sample, data.labels, call)
            self.layers = find_filter_layers(
                model,
                sample,
                forward=call,
                site=self.config.site,
                include=self.config.include,
                exclude=self.config.exclude,
            )
        statistics = self.config.statistics
        self.masked = MaskedNetwork(model, self.layers, call, statistics, autocast)
        # The same network, with the logits of starved classes raised once these are known.
        self.balanced = self.masked.with_raised({})
        self.suppression = CleanSuppression(self.balanced, self.config)
        self.penalty = DualMask(self.balanced, self.suppression.weights, self.config, False)
        self.preserving = DualMask(self.masked, self.masked.weights(), self.config, True)
        if self.config.rule != "auto":
            pruned_count(torch.ones(self.layers.total), self.config.rule, self.config.amount)
        self.surrogates = Surrogates(self.balanced, data, self.config)
        self.purification = Purification(self.masked, data, self.config, self.balanced)
        self.second: MNPDefense | None = None
        self.optimizers = (
            self.suppression.optimizer,
            self.penalty.optimizer,
            self.preserving.optimizer,
        )
        self.plan = self._first_plan()
        self.position = 0
        self.batches_done = 0
        self.runs: list[RunResult] = []
        self.suppressed: list[Weights] = []
        self.judgement: Judgement
        self.accuracy_before = float("nan")
        self.correlation = float("nan")
        self.warnings: list[str] = [*_coarse_weights(model)]
        self.seconds: dict[str, float] = defaultdict(float)
        self.masks_sum = torch.zeros(self.layers.total, device=device)
        self.masks_count = 0
        self.tally = PassTally(self.masked, self.classes)

    def _first_plan(self) -> list[tuple[Phase, int]]:
        plan: list[tuple[Phase, int]] = [("reference", 0)]
        for run in range(self.config.runs):
            plan += [("suppression", run), ("saliency", run)]
            if self.when == "always" and self._ranks_by_masks:
                plan.append(("masks", run))
        if self.config.verdict == "signals" or self._searches:
            searches = [phase for phase in get_args(Phase) if phase in self.surrogates.names]
            plan += [(phase, 0) for phase in searches]
        plan.append(("verdict", 0))
        if self.when == "always":
            plan += self._last_plan()
        return plan

    def _last_plan(self) -> list[tuple[Phase, int]]:
        phases: list[Phase] = ["pruning", "check"]
        if self.config.rule == "auto" and self.config.attenuation_steps:
            phases.insert(1, "attenuation")
        if self.config.reaudit:
            phases.append("reaudit")
        return [(phase, 0) for phase in phases]

    @property
    def _ranks_by_masks(self) -> bool:
        return self.config.rule != "auto"

    @property
    def _searches(self) -> bool:
        """Whether filters may have to be searched for."""
        return self.config.rule == "auto" and self.when != "never"

    @property
    def phase(self) -> Phase:
        """The phase that the next step belongs to."""
        return self.plan[self.position][0] if not self.finished else "finished"

    @property
    def run(self) -> int:
        """The suppression run that the next step belongs to, from 0."""
        return self.plan[min(self.position, len(self.plan) - 1)][1]

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.position >= len(self.plan)

    @property
    def passes(self) -> int:
        """Number of batches in one pass over the defense set."""
        return self.data.passes(self.config.batch_size)

    def most_steps(self) -> int:
        """An upper bound on the steps still to do, for progress bars.

        A verdict may add to them: pruning with ``when="flagged"``, and further runs.
        """
        lengths: dict[str, int] = {
            "reference": self.passes,
            "suppression": RunImages(self.data, self.config, 0).most_steps,  # none has more
            "saliency": self.passes,
            "masks": self.passes * self.config.mask_epochs,
            "verdict": 1,
            **self.surrogates.most_steps(self.classes),
            "pruning": 1 if self._ranks_by_masks else self.purification.most_filters + 2,
            "attenuation": self.config.attenuation_steps,
            "check": 1,
        }
        lengths["reaudit"] = self.batches_done
        if self.second is not None:
            lengths["reaudit"] += self.second.most_steps()
        else:
            audit = ("reference", *("suppression", "saliency") * self.config.runs, "verdict")
            lengths["reaudit"] += sum(lengths[phase] for phase in audit)
            if self.config.verdict == "signals":
                lengths["reaudit"] += sum(self.surrogates.all_steps(self.classes).values())
        left = sum(lengths[phase] for phase, _ in self.plan[self.position :])
        return left - self.batches_done

    def step(self, updates: Updates | None = None) -> dict[str, float]:
        """Do the next step.

        Args:
            updates: Does backward passes and optimizer steps; plainly, where None.

        Returns:
            Numbers of this step, by name.

        Raises:
            RuntimeError: If the defense has finished.
            torch.OutOfMemoryError: If a batch is too large. Smaller ones are not tried by
                themselves: what is found would then depend on how much memory was free.
        """
        if self.finished:
            raise RuntimeError("The defense has finished; there is no step left.")
        phase, started = self.phase, time.perf_counter()
        action = getattr(self, f"_{phase}")
        with self._protected(), torch.enable_grad():
            metrics: dict[str, float] = action(updates or PlainUpdates())
        self.seconds[phase] += time.perf_counter() - started
        return metrics

    def _protected(self) -> AbstractContextManager[Any]:
        """Leave the model as it is, wherever the step is interrupted; tell of a lack of memory."""
        images = -(-len(self.data) // self.passes)
        where = (
            f"in phase {self.phase!r}, run {self.run + 1}, in a batch of {images} images "
            f"(`batch_size` is {self.config.batch_size})"
        )
        remedy = (
            f"The model is unchanged. Choose a smaller `batch_size`, for example "
            f"{max(3, images // 2)}; a `state_file` of the larger one cannot be used then."
        )
        stack = ExitStack()
        stack.enter_context(explain_out_of_memory(where, remedy))
        stack.enter_context(unchanged_on_error(self.model))
        stack.enter_context(running_alone(self.model))
        return stack

    def _batch(self, augment: bool = False) -> tuple[Tensor, Tensor]:
        """The batch of the current step: in stored order, or shuffled and augmented."""
        size, device = self.config.batch_size, self.masked.device
        epoch, index = divmod(self.batches_done, self.passes)
        if not augment:
            return self.data.batch(index, size, device)
        key = (self.config.seed, self.phase, self.run, epoch)
        return self.data.batch(index, size, device, self.config.augment, key)

    def _count_batch(self, epochs: int = 1) -> bool:
        """Count the step; True, and on to the next phase, where it was the phase's last."""
        self.batches_done += 1
        if self.batches_done < self.passes * epochs:
            return False
        self._advance()
        return True

    def _advance(self) -> None:
        self.position += 1
        self.batches_done = 0

    def _reference(self, updates: Updates) -> dict[str, float]:
        images, labels = self._batch()
        weights = self.masked.weights()
        changes, _ = batch_clc(self.masked, weights, images, labels)
        self.tally.add(changes, self._evaluate(images, None), labels)
        if self._count_batch():
            self.correlation = self.tally.correlation(weights)
            self.accuracy_before = self.tally.accuracy
            if self.config.balance:
                self.balance(find_handicaps(self.tally.logits, self.tally.labels))
            self.tally.reset()
            return {"correlation": self.correlation, "accuracy": self.accuracy_before}
        return {}

    def balance(self, handicaps: dict[int, float]) -> None:
        """Raise the logits of some classes in everything that looks for a backdoor.

        Args:
            handicaps: By how much, for each of these classes.
        """
        self.balanced.raised = dict(handicaps)

    @property
    def handicaps(self) -> dict[int, float]:
        """By how much the logits of some classes are raised, for each of these."""
        return self.balanced.raised

    def _suppression(self, updates: Updates) -> dict[str, float]:
        if self.batches_done == 0:
            self.suppression.restart()
        seen = RunImages(self.data, self.config, self.run)
        images, labels = seen.batch(self.batches_done, self.masked.device)
        metrics = self.suppression.step(images, labels, seen.size, updates)
        self.batches_done += 1
        if self.batches_done >= seen.most_steps:
            self.suppression.finish("all passes were made")
        if self.suppression.stopped:
            self.suppression.finish("")
            self._advance()
        return metrics

    def _saliency(self, updates: Updates) -> dict[str, float]:
        run = self.run
        images, labels = self._batch()
        weights = {name: weight.detach() for name, weight in self.suppression.weights.items()}
        self.tally.add(*batch_clc(self.balanced, weights, images, labels), labels)
        if not self._count_batch():
            return {}
        correlation = self.tally.correlation(weights)
        result = RunResult(
            detection_ratio=correlation / self.correlation if self.correlation else float("nan"),
            correlation=correlation,
            predictions=tuple(self.tally.predictions.tolist()),
            steps=self.suppression.steps,
            accuracy=self.suppression.accuracy,
            stopped=self.suppression.stopped,
        )
        self.tally.reset()
        if run == len(self.runs):  # a repeated run is known already
            self.runs.append(result)
        if self._searches and len(self.suppressed) < self.config.runs - 1:
            self.suppressed.append({name: weight.clone() for name, weight in weights.items()})
        if self._ranks_by_masks:
            self.penalty.restart(weights)
            self.preserving.restart(self.masked.weights())
        return {"detection_ratio": result.detection_ratio, "pile_up": result.pile_up}

    def _masks(self, updates: Updates) -> dict[str, float]:
        images, labels = self._batch(augment=True)
        first = self.penalty.step(images, labels, updates)
        second = self.preserving.step(images, labels, updates)
        if self._count_batch(self.config.mask_epochs):
            self.masks_sum += self.penalty.values.detach() + self.preserving.values.detach()
            self.masks_count += 1
            for name, mask in (("M1", self.penalty), ("M2", self.preserving)):
                if mask.stopped:
                    number = self.masks_count
                    self.warnings.append(f"{name} of run {number} stopped early: {mask.stopped}")
        return {
            "penalty_loss": first["loss"],
            "preserving_loss": second["loss"],
            "accuracy": first["accuracy"],
        }

    def _verdict(self, updates: Updates) -> dict[str, float]:
        self.judgement = self.judge()
        self._advance()
        further = self._further_runs()
        if further:
            phases: list[tuple[Phase, int]] = []
            for run in further:
                phases += [("suppression", run), ("saliency", run)]
            self.plan[self.position : self.position] = [*phases, ("verdict", 0)]
        elif self.when == "flagged" and self.judgement.verdict == "backdoored":
            for run in range(self.config.runs if self._ranks_by_masks else 0):
                self.plan += [("suppression", run), ("saliency", run), ("masks", run)]
            self.plan += self._last_plan()
        return {
            "backdoored": float(self.judgement.verdict == "backdoored"),
            "detection_ratio": self.judgement.detection_ratio,
            "pile_up": self.judgement.pile_up,
        }

    def _further_runs(self) -> range:
        """The runs to make before a verdict that hangs on an unclear pile-up: one for each part."""
        config, made = self.config, len(self.runs)
        parts = suppression_parts(self.data, config)
        unclear = config.verdict == "signals" and in_doubt(self.signals())
        most = config.runs + config.more_runs
        return range(made, min(made + parts, most) if unclear else made)

    def _reach(self, updates: Updates) -> dict[str, float]:
        reach = self.surrogates.reach
        if not reach.classes:
            self.surrogates.choose_classes([run.top_class for run in self.runs], self.classes)
            if len(reach.classes) < self.classes:
                self.warnings.append(
                    f"what stands in for a trigger was tried for {len(reach.classes)} of "
                    f"{self.classes} classes, those that predictions pile up on among them: a "
                    "target among the others shows in the pile-up only; raise `most_classes` to "
                    "try more"
                )
        size, device = self.config.batch_size, self.masked.device
        epoch, index = divmod(reach.steps_in_class, self.passes)
        key = (self.config.seed, "reach", reach.current, epoch)
        metrics = reach.step(*self.data.batch(index, size, device, key=key))
        if reach.finished:
            self._advance()
        return metrics

    def _margin(self, updates: Updates) -> dict[str, float]:
        return self._search(self.surrogates.margin)

    def _patch(self, updates: Updates) -> dict[str, float]:
        return self._search(self.surrogates.patch)

    def _overlay(self, updates: Updates) -> dict[str, float]:
        return self._search(self.surrogates.overlay)

    def _warp(self, updates: Updates) -> dict[str, float]:
        assert self.surrogates.warp is not None  # the phase is left out then
        return self._search(self.surrogates.warp)

    def _permutation(self, updates: Updates) -> dict[str, float]:
        return self._search(self.surrogates.permutation)

    def _search(
        self, search: MarginSearch | PatternSearch[Any] | PermutationSearch
    ) -> dict[str, float]:
        metrics = search.step()
        if search.finished:
            self._advance()
        return metrics

    def judge(self) -> Judgement:
        """Give the verdict on the signals so far."""
        return judge(
            self.runs,
            self.correlation,
            self.surrogates.evidence,
            self.config,
            self.accuracy_before,
            self.handicaps,
        )

    def signals(self) -> list[Signal]:
        """Give what speaks for a backdoor so far, what is most to be believed first."""
        return signals(self.runs, self.surrogates.evidence, self.config.threshold)

    @property
    def scores(self) -> Tensor:
        """M1 + M2 averaged over the runs so far, shape (total filters,)."""
        return self.masks_sum / max(1, self.masks_count)

    def _pruning(self, updates: Updates) -> dict[str, float]:
        purification = self.purification
        if self._ranks_by_masks:
            count = pruned_count(self.scores, self.config.rule, self.config.amount)
            purification.remove(pruning_order(self.scores)[:count])
            self._advance()
            return {"filters": float(count)}
        if purification.search is None:
            purification.begin(self.new_sources())
        metrics = purification.search_step()
        if purification.search is not None and purification.search.stopped:
            self._advance()
        return metrics

    def new_sources(self) -> list[Source]:
        """Collect what shows the backdoor of the suspected class."""
        return find_sources(
            self.balanced,
            self.data,
            [*self.suppressed, self.suppression.weights],
            self.signals()[0],
            self.surrogates,
            self.config,
        )

    def _attenuation(self, updates: Updates) -> dict[str, float]:
        metrics = self.purification.attenuation_step()
        self.batches_done += 1
        if self.purification.attenuation is not None and self.purification.attenuation.finished:
            self._advance()
        return metrics

    def _check(self, updates: Updates) -> dict[str, float]:
        found = self.purification.check(self.judgement.suspect)
        self._advance()
        return {"accuracy": found}

    def _reaudit(self, updates: Updates) -> dict[str, float]:
        if not self.purification.changes:
            self._advance()
            return {}
        # The second engine's optimizers are its own: no Trainer knows of them.
        self.second = self.second or self.new_second()
        metrics = self.second.step()
        self.batches_done += 1
        if self.second.finished:
            judgement = self.second.judgement
            if judgement.verdict != "clean":
                self.warnings.append(
                    f"audited again after pruning, the network is {judgement.verdict}: "
                    f"{judgement.reasons[0]}"
                )
            self._advance()
        return metrics

    def new_second(self) -> MNPDefense:
        """Make the engine that audits the pruned copy."""
        return MNPDefense(
            self.purification.purified(),
            self.data,
            replace(self.config, reaudit=False),
            when="never",
            network="",  # the function descends to the network by itself
            forward=self.masked.forward,
            autocast=self.masked.autocast,
        )

    @torch.no_grad()
    def _evaluate(self, images: Tensor, masks: Tensor | None) -> Tensor:
        return self.masked(images, masks=masks, statistics="running")

    def prune_(self) -> Pruning:
        """Prune the model itself.

        Returns:
            What was removed; its ``undo`` puts it back.

        Raises:
            RuntimeError: If the defense has not finished.
        """
        self._require_finished()
        return self.purification.apply(self.model)

    def purified(self) -> nn.Module:
        """Give a pruned copy of the model.

        Raises:
            RuntimeError: If the defense has not finished.
        """
        self._require_finished()
        return self.purification.purified()

    def report(self) -> DefenseReport:
        """Give the outcome, without a model.

        Raises:
            RuntimeError: If the defense has not finished.
        """
        self._require_finished()
        return make_report(self)

    def _require_finished(self) -> None:
        if not self.finished:
            raise RuntimeError(
                f"The defense is in phase {self.phase!r}; it has a result when it has finished."
            )

    def state_dict(self) -> dict[str, Any]:
        """Give the whole state as tensors and primitives, readable with ``weights_only=True``."""
        return dump_state(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            ValueError: If the state is of another format, model, defense set or options.
        """
        load_state(self, state)


def _coarse_weights(model: nn.Module) -> Iterator[str]:
    """Warn of weights in which small steps of unlearning are lost."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.element_size() < 4:
            yield (
                f"weights are {str(parameter.dtype).removeprefix('torch.')} ({name!r}), in which "
                "small steps are lost to rounding: signals are weaker, and figures are not those "
                "of float32; call `model.float()` before"
            )
            return

"""The case: a network under audit, with all that is known of it so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import datetime, timezone
from functools import cached_property
from importlib.metadata import version
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_mnp.config import Constants, MNPConfig
from lightning_mnp.defense_data.defense_set import DefenseSet
from lightning_mnp.hosting.memory import explain_out_of_memory
from lightning_mnp.mnp.dual_masks import DualMask
from lightning_mnp.mnp.suppression import CleanSuppression
from lightning_mnp.mnp.thresholds import pruned_count
from lightning_mnp.purify.purification import Purification
from lightning_mnp.purify.traces import find_patch, find_traces
from lightning_mnp.report import DefenseReport, RunResult, SecondAudit, Signal, SurrogateTrigger
from lightning_mnp.signals.base import Scene, Search, SignalSearch
from lightning_mnp.signals.patch import PatchTrigger
from lightning_mnp.signals.pile_up import PileUp
from lightning_mnp.signals.registry import complete_signals, registered
from lightning_mnp.signals.screening import Screening
from lightning_mnp.signals.trace import Trace
from lightning_mnp.signals.verdict import Judgement, judge, rank_signals
from lightning_mnp.surgery.forward import Forward
from lightning_mnp.surgery.guards import (
    refuse_quantized,
    refuse_scripts,
    refuse_wrappers,
    require_module,
    running_alone,
    unchanged_on_error,
)
from lightning_mnp.surgery.layers import FilterLayers, find_filter_layers
from lightning_mnp.surgery.masked_network import MaskedNetwork, Statistics, Weights
from lightning_mnp.surgery.masks import undone_masks
from lightning_mnp.surgery.network import (
    check_copy,
    check_network,
    network_forward,
    weights_digest,
)

__all__ = ["Case", "When", "open_case"]

When = Literal["never", "flagged", "always"]


class Case:
    """What the phases of a defense read and write.

    Stages with weights or optimizers of their own are built when they are first used.

    Args:
        model: The model, on its device.
        data: The defense set.
        config: Options.
        when: See :class:`~lightning_mnp.engine.defense.MNPDefense`.
        layers: The layers with filters.
        forward: How the model is called.
        classes: Number of its classes.
        autocast: Makes the context in which the network runs.
        constants: Constants that differ from their defaults.
        measured: Names of the signals that are made; None for all.

    Attributes:
        masked: The network as it is, with weights and masks that can be exchanged.
        raised: The same network with the logits of rare classes raised, once these are known.
        scene: What the searches share; it holds the suppression runs.
        searches: The searches that have been reached, by name.
        found: What the finished searches have to show, by name; None if nothing.
        correlation: Rank correlation of magnitude and saliency of the network as it is.
        accuracy: Its accuracy on the defense set.
        class_accuracy: The same for each class that has images.
        doubts: Why it cannot be judged, in words; empty if it can.
        suppressed: Suppressed weights of the runs before the latest, as far as pruning needs them.
        masks_sum: Sum of M1 + M2 over the runs so far.
        masks_count: Number of these runs.
        judgement: The latest verdict, or None.
        purification: What is changed, and how it is found.
        second_audit: What an audit of the purified copy says, or None.
        weights_sha256: Digest of the model's weights as they were given.
        warnings: What the reader of the report should know, in words.
    """

    def __init__(
        self,
        model: nn.Module,
        data: DefenseSet,
        config: MNPConfig,
        when: When,
        layers: FilterLayers,
        forward: Forward,
        classes: int,
        autocast: Callable[[], AbstractContextManager[Any]],
        constants: Constants,
        measured: Set[str] | None = None,
    ) -> None:
        self.model = model
        self.data = data
        self.config = config
        self.when = when
        self.layers = layers
        self.classes = classes
        self.constants = constants
        self.measured = measured
        self.masked = MaskedNetwork(model, layers, forward, config.filters.statistics, autocast)
        self.raised = self.masked.with_raised({})
        self.scene = Scene(self.raised, data, config, classes, constants)
        self.searches: dict[str, Search] = {}
        self.found: dict[str, SurrogateTrigger | None] = {}
        self.correlation = math.nan
        self.accuracy = math.nan
        self.class_accuracy: dict[int, float] = {}
        self.doubts: tuple[str, ...] = ()
        self.suppressed: list[Weights] = []
        self.masks_sum = torch.zeros(layers.total, device=self.masked.device)
        self.masks_count = 0
        self.judgement: Judgement | None = None
        self.purification = Purification(self.masked, data, config, self.raised, constants)
        self.second_audit: SecondAudit | None = None
        self.weights_sha256 = weights_digest(model)  # before anything is pruned
        self.warnings = [*_coarse_weights(model)]

    @contextmanager
    def protected(self, where: str) -> Iterator[None]:
        """Leave the model as it is, wherever work is interrupted; tell of a lack of memory.

        Args:
            where: The place in the plan, for the message.
        """
        images, passes = len(self.data), self.passes
        size = (images + passes - 1) // passes
        batch = f"in a batch of {size} images (`batch_size` is {self.config.batch_size})"
        remedy = (
            f"The model is unchanged. Choose a smaller `batch_size`, for example "
            f"{max(3, size // 2)}; a `state_file` of the larger one cannot be used then."
        )
        with ExitStack() as stack:
            stack.enter_context(explain_out_of_memory(f"{where}, {batch}", remedy))
            stack.enter_context(unchanged_on_error(self.model))
            stack.enter_context(running_alone(self.model))
            yield

    @cached_property
    def suppression(self) -> CleanSuppression:
        """Clean suppression, on a copy of the weights."""
        return CleanSuppression(self.raised, self.config)

    @cached_property
    def penalty(self) -> DualMask:
        """The mask M1, on the suppressed weights."""
        return DualMask(self.raised, self.suppression.weights, self.config, preserving=False)

    @cached_property
    def preserving(self) -> DualMask:
        """The mask M2, on the network's own weights."""
        return DualMask(self.masked, self.masked.weights(), self.config, preserving=True)

    @property
    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """The optimizers that a Trainer has to know of; builds their stages."""
        return self.suppression.optimizer, self.penalty.optimizer, self.preserving.optimizer

    @property
    def runs(self) -> list[RunResult]:
        """The suppression runs so far."""
        return self.scene.runs

    @property
    def passes(self) -> int:
        """Number of batches in one pass over the defense set."""
        return self.data.passes(self.config.batch_size)

    @property
    def ranks_by_masks(self) -> bool:
        """Whether filters are ranked by M1 + M2."""
        return self.config.pruning.rule != "auto"

    @property
    def judges_by_signals(self) -> bool:
        """Whether the verdict is by signals, not by Eq. 8."""
        return self.config.verdict.rule == "signals"

    @property
    def first_runs(self) -> int:
        """Number of suppression runs before the first verdict.

        One is enough for a verdict by signals if no filters are ranked by masks: the others are
        made when that verdict needs them. None is made if none of the signals needs one.
        """
        if self.judges_by_signals and not (self.measured is None or PileUp.name in self.measured):
            return 0
        waits = self.when == "never" or not self.ranks_by_masks
        return 1 if self.judges_by_signals and waits else self.config.suppression.runs

    @property
    def may_prune_greedily(self) -> bool:
        """Whether filters may have to be taken step by step, along traces."""
        return not self.ranks_by_masks and self.when != "never"

    @property
    def wanted_searches(self) -> dict[str, type[Search]]:
        """All searches that may be made, by name; none if neither verdict nor pruning needs one."""
        if not self.judges_by_signals and not self.may_prune_greedily:
            return {}
        known: dict[str, type[Search]] = {Screening.name: Screening, **registered()}
        return {name: kind for name, kind in known.items() if kind.applies(self.data)}

    @property
    def wanted_signals(self) -> dict[str, type[SignalSearch]]:
        """Those that are made for the verdict."""
        return {
            name: kind
            for name, kind in self.wanted_searches.items()
            if issubclass(kind, SignalSearch) and (self.measured is None or name in self.measured)
        }

    @property
    def wanted_traces(self) -> dict[str, type[Search]]:
        """Those that are made for pruning only."""
        if not self.may_prune_greedily:
            return {}
        others = {Screening.name, *self.wanted_signals}
        return {name: kind for name, kind in self.wanted_searches.items() if name not in others}

    @property
    def scores(self) -> Tensor:
        """M1 + M2 averaged over the runs so far, shape (total filters,)."""
        return self.masks_sum / max(1, self.masks_count)

    def raise_rare_classes(self, values: dict[int, float]) -> None:
        """Raise the logits of some classes in everything that looks for a backdoor.

        Args:
            values: By how much, for each of these classes.
        """
        self.raised.raised = dict(values)

    @property
    def rare_classes(self) -> dict[int, float]:
        """By how much the logits of some classes are raised, for each of these."""
        return self.raised.raised

    def search(self, name: str) -> Search:
        """Return the search of a name; it is built when it is first asked for.

        Args:
            name: The name of a search.
        """
        if name not in self.searches:
            self.searches[name] = self.wanted_searches[name](self.scene)
        return self.searches[name]

    def signals(self) -> list[Signal]:
        """Return what speaks for a backdoor, most believed first; nothing before all is known."""
        found = []
        for name, kind in self.wanted_signals.items():
            reached = name in self.searches or kind.all_steps(self.scene) == 0
            search = self.search(name) if reached else None
            if not (isinstance(search, SignalSearch) and search.finished):
                return []
            found.append(search.signal())
        return rank_signals(found, self.config.verdict.threshold)

    def judge(self) -> Judgement:
        """Return the verdict on what is known so far."""
        found = self.signals()
        judging = [name for name in self.wanted_signals if name in self.searches]
        failed = [name for name in judging if found and self.searches[name].failed]
        return judge(
            self.runs,
            self.correlation,
            found,
            self.config,
            self.accuracy,
            doubts=self.doubts,
            failed=failed,
            rare_classes=self.rare_classes,
            constants=self.constants,
        )

    def new_report(self) -> DefenseReport:
        """Begin a report, to which the phases add what they have found."""
        assert self.judgement is not None, "the verdict comes first"
        return DefenseReport(
            verdict=self.judgement.verdict,
            warnings=[*self.purification.warnings, *self.warnings],
            class_names=list(self.data.class_names),
            weights_sha256=self.weights_sha256,
            config=self.config.to_dict(),
            versions={name: version(name) for name in ("lightning-mnp", "torch", "torchvision")},
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )

    def traces(self) -> list[Trace]:
        """Collect what shows the backdoor of the suspected class."""
        suppressed = [*self.suppressed, self.suppression.weights]
        return find_traces(self.scene, suppressed, self.signals()[0], self.searches)

    def patch(self) -> PatchTrigger | None:
        """Begin a patch that does what the suspected backdoor does, if any is known."""
        return find_patch(self.signals()[0], self.searches)


def open_case(
    model: nn.Module,
    data: DefenseSet,
    config: MNPConfig,
    when: When,
    network: str | None,
    forward: Forward | None,
    autocast: Callable[[], AbstractContextManager[Any]],
    constants: Constants,
    measured: Set[str] | None = None,
) -> Case:
    """Check model, defense set and options against each other, before any work.

    Args:
        model: The model, on its device.
        data: The defense set.
        config: Options.
        when: See :class:`~lightning_mnp.engine.defense.MNPDefense`, like all that follow.
        network: Dotted name of the submodule that classifies.
        forward: How that is called.
        autocast: Makes the context in which the network runs.
        constants: Constants that differ from their defaults.
        measured: Names of the signals that are made; None for all.

    Raises:
        ValueError: If they do not fit each other.
        TypeError: If the model's output holds no logits.
    """
    if when not in get_args(When):
        raise ValueError(
            f"Expected argument `when` to be one of {get_args(When)}, but got {when!r}."
        )
    require_module(model)
    filters, pruning = config.filters, config.pruning
    call = network_forward(model, network, forward)
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    sample = data.images[:2].to(device)
    remedy = "The model needs more than there is even for so few."
    refuse_wrappers(model)
    refuse_scripts(model)
    refuse_quantized(model)
    told = explain_out_of_memory(f"on {len(sample)} images", remedy)
    with told, unchanged_on_error(model), running_alone(model):
        if when != "never" and pruning.reaudit:
            check_copy(model)
        classes = check_network(model, sample, data.labels, call)
        layers = find_filter_layers(
            model,
            sample,
            forward=call,
            site=filters.site,
            include=filters.include,
            exclude=filters.exclude,
            linear=filters.linear,
        )
    if measured is not None:
        measured = complete_signals(measured)
    if pruning.rule != "auto":
        pruned_count(torch.ones(layers.total), pruning.rule, pruning.amount)
        if when != "never" and filters.site == "filter":
            _refuse_undone_masks(model, layers, filters.statistics)
    return Case(model, data, config, when, layers, call, classes, autocast, constants, measured)


def _refuse_undone_masks(model: nn.Module, layers: FilterLayers, statistics: Statistics) -> None:
    """Raise if M1 and M2 would act where normalization undoes them.

    Running such masks on stored statistics by itself would be another method than the options
    say: suppression runs on those of the batch, and the suppressed weights fit no others.
    """
    undone = undone_masks(model, layers, statistics == "running")
    if not undone:
        return
    remedy = "Set `filters.site` to 'norm'"
    if statistics == "batch" and not undone_masks(model, layers, running=True):
        remedy += ", or `filters.statistics` to 'running'"
    raise ValueError(
        f"Expected normalization behind masks on filters to go by stored statistics, but got "
        f"`filters.site` = 'filter', `filters.statistics` = {statistics!r}, and {len(undone)} of "
        f"{len(layers)} layers, {undone[0]!r} the first, where the scale of a filter is undone by "
        f"that of the images at hand: M1 and M2 would have no gradient. {remedy}."
    )


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

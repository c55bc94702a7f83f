"""What is done to a flagged network: its filters, kernels, weights and logits are changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mnp.config import Constants, MNPConfig
from lightning_mnp.defense_data.defense_set import DefenseSet
from lightning_mnp.defense_data.evaluation import accuracy, class_accuracy, clean_logits
from lightning_mnp.defense_data.views import Views, make_views, recognized_views
from lightning_mnp.purify.allowance import harmless_share
from lightning_mnp.purify.changes import Changes
from lightning_mnp.purify.cuts import CutConstants, choose_cuts
from lightning_mnp.purify.greedy import GreedyPruning
from lightning_mnp.purify.harm import CleanHarm, HarmConstants
from lightning_mnp.purify.soft_masks import SoftMaskConstants, SoftMasks
from lightning_mnp.purify.tuning import Tuning, TuningConstants
from lightning_mnp.signals.patch import PatchTrigger
from lightning_mnp.signals.trace import Trace
from lightning_mnp.surgery.logit_shift import LogitShift, find_logit_bias, repair_shift
from lightning_mnp.surgery.masked_network import MaskedNetwork
from lightning_mnp.surgery.network import copy_network

__all__ = ["Purification"]


class Purification:
    """Finds what to change in a network, and changes it.

    Filters are named from outside (:meth:`remove`) or taken step by step
    (:meth:`begin`, :meth:`greedy_step`). Kernels are then turned down (:meth:`soft_mask_step`);
    some of them are cut, and weights are tuned (:meth:`tuning_step`). :meth:`check` measures what
    is left and fits the repair. The network itself does not change, see :meth:`Changes.apply`.

    Args:
        masked: The network as it is, on its device.
        data: The defense set.
        config: Options.
        raised: The same network with the logits of rare classes raised, by which filters are
            pruned and kernels turned down: else those of the backdoor would be kept for the little
            that they do for such a class. None for the network as it is.
        constants: Constants that differ from their defaults.

    Attributes:
        changes: What was found so far.
        accuracy: Accuracy on the defense set after all that, or None before :meth:`check`.
        class_accuracy: The same for each class that has images; empty before :meth:`check`.
        greedy: What takes filters step by step, once it has begun.
        soft: What turns kernels down, once it has begun.
        settled: Whether soft masks have come to their end, and the masks are known.
        tuning: What tunes weights, once it has begun.
        ended: Whether tuning has come to its end.
        warnings: What the reader of the report should know, in words.

    Example:
        >>> from lightning_mnp.surgery.layers import find_filter_layers
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> data = DefenseSet(torch.rand(8, 1, 2, 2), torch.arange(8) % 2)
        >>> masked = MaskedNetwork(network, find_filter_layers(network, data.images))
        >>> purification = Purification(masked, data, MNPConfig())
        >>> purification.remove(torch.tensor([2]))
        >>> accuracy = purification.check(target=0)
        >>> bool((purification.purified()[0].weight[2] == 0).all()), purification.changes.any
        (True, True)
    """

    def __init__(
        self,
        masked: MaskedNetwork,
        data: DefenseSet,
        config: MNPConfig,
        raised: MaskedNetwork | None = None,
        constants: Constants | None = None,
    ) -> None:
        self.masked = masked
        self.raised = masked if raised is None else raised
        self.constants = constants or Constants()
        self.data = data
        self.config = config
        self.changes = Changes(masked, config.pruning.removes == "filter")
        self.accuracy: float | None = None
        self.class_accuracy: dict[int, float] = {}
        self.greedy: GreedyPruning | None = None
        self.soft: SoftMasks | None = None
        self.settled = False
        self.tuning: Tuning | None = None
        self.ended = False
        self.warnings: list[str] = []
        self._known: Views | None = None

    @property
    def most_filters(self) -> int:
        """The most filters that the automatic rule prunes."""
        share = self.config.pruning.amount * self.masked.layers.total
        return max(1, math.floor(share + 1e-9))  # 0.29 times 100 is not quite 29

    def remove(self, positions: Tensor) -> None:
        """Name the filters to prune.

        Args:
            positions: Their positions among all filters, worst first.
        """
        self.changes.removed = positions.to(self.masked.device)

    def spare(self, positions: Sequence[int]) -> None:
        """Warn of filters that would go, but stay as the last of their layers.

        Args:
            positions: Their positions among all filters.
        """
        names = [repr(self.masked.layers.locate(position)[0]) for position in positions]
        if names:
            self.warnings.append(
                f"one filter stays in each of these layers, although it was to be pruned: "
                f"{', '.join(names)}; a layer without filters would pass nothing on"
            )

    def begin(self, traces: Sequence[Trace]) -> None:
        """Begin greedy pruning.

        Args:
            traces: Where the backdoor shows.
        """
        self.greedy = GreedyPruning(
            self.raised,
            self._clean.sets,
            traces,
            self.most_filters,
            self.config.pruning.harm,
            self.config.batch_size,
            self.config.seed,
            self.config.pruning.impurity,
            self.constants,
        )

    def greedy_step(self) -> dict[str, float]:
        """Take one or more filters; it is over when ``greedy.stopped`` says why.

        Returns:
            Numbers of this step, see :meth:`GreedyPruning.step`.
        """
        greedy = self._begun
        metrics = greedy.step()
        if greedy.stopped:
            self.remove(torch.tensor(greedy.taken, dtype=torch.long))
            self.spare(greedy.spared)
        return metrics

    def soft_mask_step(self) -> dict[str, float]:
        """Turn kernels down by one step, until ``settled``; takes none if the traces are gone.

        Returns:
            Numbers of this step, see :meth:`SoftMasks.step`.
        """
        if self.soft is None and self._begun.gone:
            self.settled = True
            return {}
        self.soft = self.soft or self._new_soft_masks()
        metrics = {} if self.soft.finished else self.soft.step()
        if self.soft.finished:
            self.changes.kernel_masks = self._harmless(self.soft.masks)
            self.settled = True
        return metrics

    def tuning_step(self, patch: PatchTrigger | None) -> dict[str, float]:
        """Tune weights by one step, until ``ended``; cut kernels before the first.

        Args:
            patch: The patch to unlearn, which has not been made yet; None to take no step. It
                counts at the first step only. Nor is a step taken where nothing was pruned and soft
                masks had nothing to do, since nothing is to be won back there.

        Returns:
            Numbers of this step, see :meth:`Tuning.step`.
        """
        changes = self.changes
        if self.tuning is None:
            if patch is None or not (len(changes.removed) or self.soft):
                self.ended = True
                return {}
            if self.config.pruning.tuning_steps > 0:
                changes.cut = self._cuts(patch)
            self.tuning = self._new_tuning(patch)
        metrics = {} if self.tuning.finished else self.tuning.step()
        if self.tuning.finished:
            share = self._harmless_tuning(self.tuning)
            # Not a share of 0, which would let NaN through.
            found = self.tuning.changes(share) if share else None
            changes.tuned_by = 0.0 if found is None else self.tuning.moved(found)
            changes.tuned = found if changes.tuned_by else None
            if share < 1:
                changes.cut = changes.cut[:0]
            self.ended = True
        return metrics

    @property
    def _begun(self) -> GreedyPruning:
        if self.greedy is None:
            raise RuntimeError("Greedy pruning has not begun; call `begin` first.")
        return self.greedy

    @property
    def _clean(self) -> Views:
        """The images by which harm and repair are measured."""
        config = self.config
        if self._known is None:
            self._known = recognized_views(
                self.masked, self.data, config.augment, config.batch_size, config.seed
            )
        return self._known

    def _new_soft_masks(self) -> SoftMasks:
        greedy, config = self._begun, self.config
        return SoftMasks(
            self.raised,
            self.data,
            greedy.traces,
            greedy.references,
            greedy.masks(),
            self._clean.augment,
            config.pruning.soft_mask_steps,
            config.batch_size,
            config.seed,
            config.pruning.impurity,
            self.constants,
        )

    def _new_tuning(self, patch: PatchTrigger) -> Tuning:
        config, changes = self.config, self.changes
        return Tuning(
            self.raised,
            changes.turned_down(),
            self.data,
            patch,
            changes.filter_masks(),
            self._clean.augment,
            config.pruning.tuning_steps,
            config.batch_size,
            config.seed,
            changes.cut,
            config.pruning.impurity,
            self.constants,
        )

    def _cuts(self, patch: PatchTrigger) -> Tensor:
        """The kernels to cut."""
        if self.soft is None:
            return self.changes.cut
        found, constants = self.soft.masks, self.constants.of(CutConstants)
        below, times = constants.below, constants.harm
        if not self._patch_margin(patch) > constants.far:  # NaN is not near
            below, times = constants.far_below, constants.far_harm
        softened = self.changes.kernel_masks
        softened = torch.ones_like(found) if softened is None else softened

        def harm(positions: Tensor) -> float:
            return self._harm_beyond_pruning(softened.index_fill(0, positions, 0.0))

        return choose_cuts(found, harm, below, times * self.config.pruning.harm)

    def _patch_margin(self, patch: PatchTrigger) -> float:
        """How far a patch takes images to its class after soft masks, in logits."""
        filters = self.changes.filter_masks()
        patch.masked = self.raised.with_weights(self.changes.turned_down())
        patch.approach(filters)
        with torch.no_grad():
            return float(patch.margins(filters).mean())

    def _harmless_tuning(self, tuning: Tuning) -> float:
        """How much of cuts and tuning may stay, from 0 to 1, for the harm that they do."""
        config, filters, softened = self.config, self.changes.filter_masks(), tuning.softened
        limits = self.constants.of(HarmConstants)
        given = self._clean.sets, config.batch_size, config.pruning.impurity, limits
        measure = CleanHarm(softened, *given)
        measure.compare_with(self.raised, torch.ones_like(filters))
        # Tuning goes back to the former predictions, so that it may do less than masks have done.
        done = measure.of(filters)

        def harm(share: float) -> float:
            changed = {**softened.weights(), **tuning.changes(share)}
            measure.masked = softened.with_weights(changed)
            return measure.of(filters) - done

        return self._allowed_share(
            harm,
            self.constants.of(TuningConstants),
            "weights were changed",
            "weights were not tuned",
            "more harm than pruning and masks",
        )

    def _allowed_share(
        self,
        harm: Callable[[float], float],
        constants: SoftMaskConstants | TuningConstants,
        done: str,
        undone: str,
        what: str,
    ) -> float:
        """Return how much of a change may stay, from 0 to 1, and warn if that is not all.

        Args:
            harm: The harm of a share, in nats.
            constants: How much harm is allowed, and how exactly the share is found.
            done: What was done, for the warning.
            undone: The same if nothing may stay.
            what: What the nats are of.
        """
        most = constants.harm * self.config.pruning.harm
        share, whole = harmless_share(harm, most, constants.halvings)
        if share == 1:
            return share
        told = f"{done} by {share:.0%} of what was found" if share else undone
        self.warnings.append(
            f"{told}: all of it did {whole:.3g} nats {what}, and {most:g}, {constants.harm} times "
            "`pruning.harm`, is allowed"
        )
        return share

    def _harm_beyond_pruning(self, kernel_masks: Tensor) -> float:
        greedy = self._begun
        with self.raised.masking_kernels(kernel_masks):
            return greedy.harm_of(greedy.masks()) - greedy.curve[-1][0]

    def _harmless(self, masks: Tensor) -> Tensor | None:
        """The masks, turned back as far as they do more harm than is allowed.

        None if nothing is left of them.
        """
        begun = torch.ones_like(masks)
        share = self._allowed_share(
            lambda share: self._harm_beyond_pruning(begun.lerp(masks, share)),
            self.constants.of(SoftMaskConstants),
            "kernels were turned down",
            "kernels were not turned down",
            "more harm than pruning",
        )
        return begun.lerp(masks, share) if share else None

    def check(self, target: int | None) -> float:
        """Fit the repair, if one is wanted, and measure what is left.

        Args:
            target: The class whose logit stays as it is, unless it is rare; None for none.

        Returns:
            The accuracy on the defense set, from 0 to 1.
        """
        changes, size = self.changes, self.config.batch_size
        changed = changes.call()
        if self.config.pruning.repair and changes.any:
            # With rare classes raised: a target among them is to get back what pruning took from
            # it, but not, as clean images would have it, what it never had.
            passed = [clean_logits(self.raised, data, size, **changed) for data in self._clean.sets]
            seen, classes = (torch.cat(parts) for parts in zip(*passed, strict=True))
            fixed = None if target in self.raised.raised else target
            changes.shift = self._shift_of(repair_shift(seen, classes, fixed))
        logits, labels = clean_logits(self.masked, self.data, size, **changed)
        if changes.shift is not None:
            logits = logits + changes.shift.values.to(logits)
        self.class_accuracy = class_accuracy(logits, labels)
        self.accuracy = accuracy(logits, labels)
        return self.accuracy

    def _shift_of(self, values: Tensor) -> LogitShift | None:
        """Make a shift of this network's logits; None if it has no bias for that."""
        sample = self.data.images[:2].to(self.masked.device)
        name = find_logit_bias(self.masked.network, sample, self.masked.forward)
        return None if name is None else LogitShift(name, values)

    def purified(self) -> nn.Module:
        """Return a changed copy of the network."""
        network = copy_network(self.masked.network)
        self.changes.apply(network)
        return network

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and primitives."""
        return {
            **self.changes.state_dict(),
            "ended": self.ended,
            "augment": None if self._known is None else self._known.augment,
            "accuracy": self.accuracy,
            "class_accuracy": dict(self.class_accuracy),
            "settled": self.settled,
            "warnings": list(self.warnings),
            "greedy": None if self.greedy is None else self.greedy.state_dict(),
            "soft": None if self.soft is None else self.soft.state_dict(),
            "tuning": None if self.tuning is None else self.tuning.state_dict(),
        }

    def load_state_dict(
        self, state: dict[str, Any], traces: Sequence[Trace], patch: PatchTrigger | None = None
    ) -> None:
        """Go on where :meth:`state_dict` was taken; the network does not run.

        Args:
            state: The state.
            traces: Those of greedy pruning, made anew; of no account if it had not begun.
            patch: That of tuning, made anew; of no account if it had not begun.
        """
        self.changes.load_state_dict(state)
        self.ended = bool(state["ended"])
        self._known = None
        if state["augment"] is not None:
            self._known = make_views(self.data, state["augment"], self.config.seed)
        self.accuracy = state["accuracy"]
        self.class_accuracy = {int(k): float(v) for k, v in state["class_accuracy"].items()}
        self.settled = bool(state["settled"])
        self.warnings = list(state["warnings"])
        self.greedy = self.soft = self.tuning = None
        if state["greedy"] is not None:
            self.begin(traces)
            self._begun.load_state_dict(state["greedy"])
        if state["soft"] is not None:
            self.soft = self._new_soft_masks()
            self.soft.load_state_dict(state["soft"])
        if state["tuning"] is not None and patch is not None:
            self.tuning = self._new_tuning(patch)
            self.tuning.load_state_dict(state["tuning"])

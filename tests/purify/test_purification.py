from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from helpers import (
    goals_of,
    images_and_labels,
    pulled_to_one,
    quick_config,
    same,
    snapshot,
    trained_network,
)
from torch.nn import functional as F

from lightning_mnp.config import Constants
from lightning_mnp.defense_data.defense_set import DefenseSet, value_range
from lightning_mnp.defense_data.evaluation import clean_logits
from lightning_mnp.purify.cuts import CutConstants
from lightning_mnp.purify.greedy import GreedyConstants
from lightning_mnp.purify.harm import CleanHarm
from lightning_mnp.purify.purification import Purification
from lightning_mnp.purify.tuning import TuningConstants
from lightning_mnp.signals.patch import PatchTrigger
from lightning_mnp.signals.pile_up import SuppressedTrace
from lightning_mnp.signals.trace import Trace
from lightning_mnp.surgery.layers import find_filter_layers
from lightning_mnp.surgery.logit_shift import repair_shift
from lightning_mnp.surgery.masked_network import MaskedNetwork

AUTO: dict[str, Any] = {"rule": "auto", "amount": 0.04, "harm": 50.0}
# No trace is ever gone, so that kernels are turned down; after so few steps, masks are high.
TURNING = Constants(
    GreedyConstants(gone_at=0.0), CutConstants(below=0.99, far_below=0.99, harm=50, far_harm=50)
)


def new_purification(constants: Constants | None = None, **changes: Any) -> Purification:
    network = trained_network()
    data = DefenseSet(*images_and_labels())
    masked = MaskedNetwork(network, find_filter_layers(network, data.images[:2]))
    config = quick_config(**{**AUTO, **changes})
    return Purification(masked, data, config, constants=constants)


def traces_of(purification: Purification) -> list[Trace]:
    masked, data = purification.raised, purification.data
    images = data.images[data.labels != 1]
    constants = purification.constants
    weights = [pulled_to_one(masked)]
    return [SuppressedTrace(masked, weights, images, goals_of(images), constants)]


def patch_of(purification: Purification) -> PatchTrigger:
    masked, data = purification.raised, purification.data
    others = data.labels != 1
    images, (low, high) = data.images[others], value_range(data.images)
    return PatchTrigger(masked, images, data.labels[others], goals_of(images), low, high)


def steps_of(purification: Purification) -> list[Any]:
    """Every step that is left, in order."""

    def choosing() -> bool:
        return purification.greedy is None or not purification.greedy.stopped

    taken = []
    while choosing():
        taken.append(purification.greedy_step())
    while not purification.settled:
        taken.append(purification.soft_mask_step())
    while not purification.ended:
        taken.append(purification.tuning_step(patch_of(purification)))
    return taken


@pytest.mark.parametrize("level", [0.05, 0.2, math.nan])
def test_kernels_are_turned_down_unless_the_traces_are_gone(level: float) -> None:
    purification = new_purification(soft_mask_steps=3)
    purification.begin(traces_of(purification))
    while not purification._begun.stopped:
        purification.greedy_step()
    purification._begun.curve[-1] = (0.0, level)
    steps = steps_of(purification)
    assert len(steps) == (1 if level == 0.05 else 3) + 4  # the last ones are those of tuning
    assert (steps[0] == {}) == (level == 0.05)
    assert (purification.changes.kernel_masks is None) == (level == 0.05)


def test_greedy_pruning_must_have_begun() -> None:
    purification = new_purification()
    with pytest.raises(RuntimeError, match=r"Greedy pruning has not begun; call `begin` first\."):
        purification.greedy_step()
    with pytest.raises(RuntimeError, match=r"Greedy pruning has not begun; call `begin` first\."):
        purification.soft_mask_step()


def test_filters_are_taken_and_turned_down_with_the_logits_of_rare_classes_raised() -> None:
    plain = new_purification(augment="none", soft_mask_steps=1, batch_size=40)
    masked, data = plain.masked, plain.data
    balanced = MaskedNetwork(masked.network, masked.layers)
    balanced.raised = {1: 3.0}
    raised = Purification(masked, data, plain.config, balanced)
    for purification in (plain, raised):
        purification.begin(traces_of(purification))
        while not purification.greedy_step() or not purification._begun.stopped:
            pass
    for purification, lack in ((plain, 0.0), (raised, 3.0)):
        offset = torch.tensor([0.0, lack, 0.0, 0.0])
        masks = purification._begun.masks()
        with torch.no_grad():
            before = F.cross_entropy(
                masked(data.images, statistics="running") + offset, data.labels
            )
            logits = masked(data.images, masks=masks, statistics="running")
            after = F.cross_entropy(logits + offset, data.labels)
        share = len(data) / 2500
        harm = CleanHarm(purification.raised, [data], 40)
        assert purification._begun.harm_of(masks) == pytest.approx(harm.of(masks), abs=1e-5)
        assert harm.of(masks) >= share * float(after - before) - 1e-5  # the rest is a divergence
        assert purification.soft_mask_step()["loss"] == pytest.approx(float(after), rel=1e-4)


def test_harm_of_kernel_masks_is_measured_against_the_network_as_it_was() -> None:
    """Also where no harm was measured before: after a resume, or if nothing could be pruned."""
    purification = new_purification(TURNING)
    purification.begin(traces_of(purification))
    purification._begun.curve, purification._begun.counts = [(0.25, 1.0)], [0]
    kernel_masks = torch.full((purification.masked.kernels.total,), 0.9)
    found = purification._harm_beyond_pruning(kernel_masks)
    measure = CleanHarm(purification.masked, purification._clean.sets, 16)
    filters = purification.changes.filter_masks()
    assert measure.of(filters) == 0
    with purification.masked.masking_kernels(kernel_masks):
        assert found == pytest.approx(measure.of(filters) - 0.25, rel=1e-4)
    assert found > -0.24


@pytest.mark.parametrize(
    ("harm", "share"), [(200.0, 1.0), (316.0, 0.625), (1e9, 0.0), (math.nan, 0)]
)
def test_kernels_that_do_too_much_harm_are_turned_back(
    harm: float, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    purification = new_purification(TURNING)
    purification.begin(traces_of(purification))
    while not purification._begun.stopped:
        purification.greedy_step()
    purification.soft_mask_step()
    soft = purification.soft
    assert soft is not None
    soft.masks = torch.linspace(0.2, 0.8, len(soft.masks))

    def beyond_pruning(masks: torch.Tensor) -> float:  # in proportion to the change
        return harm * float((1 - masks).norm() / (1 - soft.masks).norm())

    monkeypatch.setattr(purification, "_harm_beyond_pruning", beyond_pruning)
    monkeypatch.setattr(type(soft), "finished", True)
    purification.soft_mask_step()

    masks = purification.changes.kernel_masks
    if share == 1.0:
        assert purification.warnings == []
    else:
        done = "were turned down by 62% of what was found" if share else "were not turned down"
        assert purification.warnings == [
            f"kernels {done}: all of it did {harm:.3g} nats more harm than pruning, and 200, 4 "
            "times `pruning.harm`, is allowed"
        ]
    if share:
        assert masks is not None
        torch.testing.assert_close(masks, 1 - share * (1 - soft.masks))
    else:
        assert masks is None


def as_purified(purification: Purification, images: torch.Tensor) -> torch.Tensor:
    """The logits before the repair, with masks attached to filters in place of zeros."""
    filters, weights = purification.changes.filter_masks(), purification.masked.weights()
    if purification.changes.kernel_masks is not None:
        weights = purification.masked.kernels.scaled(weights, purification.changes.kernel_masks)
    weights.update(purification.changes.tuned or {})
    return purification.masked(images, weights=weights, masks=filters, statistics="running")


def test_purified_copy_gives_what_the_masks_and_the_shift_say() -> None:
    purification = new_purification(TURNING)
    network, before = purification.masked.network, snapshot(purification.masked.network)
    purification.begin(traces_of(purification))
    steps_of(purification)
    found = purification.check(target=1)
    images, labels = purification.data.images, purification.data.labels
    logits = as_purified(purification, images)
    assert purification.changes.kernel_masks is not None
    assert purification.changes.shift is not None
    expected = logits + purification.changes.shift.values
    purified = purification.purified()
    torch.testing.assert_close(purified(images), expected, rtol=1e-4, atol=1e-4)
    hits = (expected.argmax(1) == labels).float().mean()
    assert found == purification.accuracy == pytest.approx(float(hits))
    by_class = {
        index: float((expected[labels == index].argmax(1) == index).float().mean())
        for index in range(4)
    }
    assert purification.class_accuracy == pytest.approx(by_class)
    assert same(before, snapshot(network))


def test_repair_gives_a_rare_target_back_what_pruning_took_and_no_more() -> None:
    plain = new_purification()
    images, labels = plain.data.images, plain.data.labels
    rare = Purification(plain.masked, plain.data, plain.config, plain.masked.with_raised({1: 3.0}))
    for purification, fixed in ((plain, 1), (rare, None)):
        purification.remove(torch.tensor([0, 5]))
        purification.check(target=1)
        assert purification.changes.shift is not None
        sets = purification._clean.sets
        masks = purification.changes.filter_masks()
        passed = [clean_logits(purification.raised, data, 128, masks=masks) for data in sets]
        logits, classes = (torch.cat(parts) for parts in zip(*passed, strict=True))
        expected = repair_shift(logits, classes, fixed)
        torch.testing.assert_close(purification.changes.shift.values, expected)
        assert (purification.changes.shift.values[1] == 0) == (fixed == 1)
        # Accuracy is that of the network as it is given back: no logit is raised in it.
        given = purification.purified()(images)
        assert purification.accuracy == pytest.approx(
            float((given.argmax(1) == labels).float().mean())
        )


def test_nothing_changed_needs_no_repair() -> None:
    purification = new_purification()
    assert purification.check(target=1) > 0.5
    assert purification.changes.shift is None


def not_to_be_run(*arguments: Any) -> None:
    """Resuming is no step, and no step's guards are around it."""
    raise AssertionError("the network was run")


@pytest.mark.parametrize("stop", [0, 1, 3, 5, 6, 8, 10, 12])
def test_resumed_purification_ends_the_same(stop: int) -> None:
    reference = new_purification(TURNING)
    reference.begin(traces_of(reference))
    steps_of(reference)
    reference.check(target=1)
    first, second = new_purification(TURNING), new_purification(TURNING)
    first.begin(traces_of(first))
    for _ in range(stop):
        if first.greedy is not None and not first.greedy.stopped:
            first.greedy_step()
        elif not first.settled:
            first.soft_mask_step()
        elif not first.ended:
            first.tuning_step(patch_of(first))
    second.load_state_dict(first.state_dict(), traces_of(second), patch_of(second))
    steps_of(second)
    second.check(target=1)
    assert len(reference.changes.cut) > 0
    assert second.changes.cut.equal(reference.changes.cut)
    assert second.changes.removed.equal(reference.changes.removed)
    assert second.changes.kernel_masks is not None
    assert reference.changes.kernel_masks is not None
    assert second.changes.kernel_masks.equal(reference.changes.kernel_masks)
    assert second.changes.tuned is not None
    assert reference.changes.tuned is not None
    assert all(
        weight.equal(reference.changes.tuned[name]) for name, weight in second.changes.tuned.items()
    )
    assert second.accuracy == reference.accuracy
    finished = new_purification(TURNING)
    finished.masked.network.register_forward_pre_hook(not_to_be_run)
    finished.load_state_dict(second.state_dict(), traces_of(finished), patch_of(finished))
    assert finished.changes.shift is not None
    assert reference.changes.shift is not None
    assert finished.changes.shift.values.equal(reference.changes.shift.values)
    assert finished.accuracy == reference.accuracy


def test_weights_are_tuned_after_pruning_and_written_into_the_network() -> None:
    purification = new_purification(TURNING, soft_mask_steps=2, tuning_steps=3, repair=False)
    purification.begin(traces_of(purification))
    while not purification.settled:
        purification.soft_mask_step() if purification._begun.stopped else purification.greedy_step()
    turned, filters = purification.changes.turned_down(), purification.changes.filter_masks()
    assert purification.changes.tuned_by == 0.0
    while not purification.ended:
        purification.tuning_step(patch_of(purification))
    assert purification.changes.tuned is not None
    assert set(purification.changes.tuned) == {
        each.weight for each in purification.masked.kernels.layers
    }
    before = torch.cat([turned[name].flatten() for name in purification.changes.tuned])
    after = torch.cat([weight.flatten() for weight in purification.changes.tuned.values()])
    expected = float((after - before).norm() / before.norm())
    assert purification.changes.tuned_by == pytest.approx(expected, rel=1e-4)
    assert 0 < expected < 0.05
    accuracy = purification.check(target=1)
    images, labels = purification.data.images, purification.data.labels
    with torch.no_grad():
        weights = {**turned, **purification.changes.tuned}
        given = {"weights": weights, "masks": filters, "statistics": "running"}
        logits = purification.masked(images, **given)
        torch.testing.assert_close(purification.purified()(images), logits, rtol=1e-4, atol=1e-4)
    assert accuracy == float((logits.argmax(1) == labels).float().mean())


def turned_down(purification: Purification) -> Purification:
    """Prune, and turn kernels down."""
    purification.begin(traces_of(purification))
    while not purification.settled:
        purification.soft_mask_step() if purification._begun.stopped else purification.greedy_step()
    return purification


@pytest.mark.parametrize("allowed", [0, 1, 3, 100])
@pytest.mark.parametrize(
    ("margin", "order", "most"),
    [
        (-0.9, [9, 4, 50, 30], 650.0),  # 13 times `harm`
        (-1.1, [9, 4, 50, 30, 7], 1000.0),  # 20 times `harm`
        (math.nan, [9, 4, 50, 30, 7], 1000.0),
    ],
)
def test_the_lowest_kernels_are_cut_as_far_as_harm_allows(
    margin: float, order: list[int], most: float, allowed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    turning = Constants(GreedyConstants(gone_at=0.0))
    purification = turned_down(new_purification(turning, soft_mask_steps=2, tuning_steps=1))
    softened_weights = purification.changes.turned_down()

    def margins(patch: PatchTrigger, masks: torch.Tensor) -> torch.Tensor:
        shown = patch.masked.weights()
        assert all(weight.equal(softened_weights[name]) for name, weight in shown.items())
        assert bool((patch.pattern != 0).any())
        return torch.tensor([margin - 1, margin + 1])

    monkeypatch.setattr(PatchTrigger, "margins", margins)
    assert purification.soft is not None
    assert purification.changes.kernel_masks is not None
    softened, found = (
        purification.changes.kernel_masks.clone(),
        torch.ones_like(purification.soft.masks),
    )
    found[[4, 9, 30, 7, 50]] = torch.tensor([0.5, 0.2, 0.79, 0.81, 0.6])
    purification.soft.masks = found

    def harm(masks: torch.Tensor) -> float:
        cut = masks == 0
        assert masks[~cut].equal(softened[~cut])
        return most if int(cut.sum()) <= allowed else most + 1

    monkeypatch.setattr(purification, "_harm_beyond_pruning", harm)
    assert purification._cuts(patch_of(purification)).tolist() == order[:allowed]
    purification.tuning_step(patch_of(purification))
    assert purification.changes.tuned is not None
    assert purification.changes.cut.tolist() == order[:allowed]
    left = torch.ones_like(softened)
    left[purification.changes.cut] = 0.0
    zeros = purification.masked.kernels.scaled(purification.masked.weights(), left)
    for name, weight in purification.changes.tuned.items():
        assert bool((weight[zeros[name] == 0] == 0).all())
    assert purification.changes.kernel_masks.equal(softened)


def test_nothing_is_cut_without_soft_masks() -> None:
    purification = new_purification()
    purification.remove(torch.tensor([3]))
    purification.tuning_step(patch_of(purification))
    assert purification.tuning is not None
    assert purification.changes.cut.tolist() == []


def test_without_a_patch_nothing_is_tuned() -> None:
    purification = new_purification()
    assert purification.tuning_step(None) == {}
    assert purification.ended
    assert purification.changes.tuned is None
    assert not purification.changes.any


def test_tuning_that_changes_nothing_is_none() -> None:
    purification = new_purification(Constants(TuningConstants(step=0.0)))
    purification.remove(torch.tensor([3]))
    while not purification.ended:
        purification.tuning_step(patch_of(purification))
    assert purification.tuning is not None
    assert purification.tuning.taken == 4
    assert purification.changes.tuned is None


def test_nothing_is_tuned_where_nothing_was_pruned_or_turned_down() -> None:
    purification = new_purification()
    assert purification.tuning_step(patch_of(purification)) == {}
    again = new_purification()
    again.load_state_dict(purification.state_dict(), [], patch_of(again))
    for each in (purification, again):
        assert each.ended
        assert each.changes.tuned is None
        assert not each.changes.any


@pytest.mark.parametrize(("harm", "share"), [(0.0, 1.0), (316.0, 0.625), (1e9, 0.0), (math.nan, 0)])
def test_tuning_that_does_too_much_harm_is_turned_back(
    harm: float, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    purification = new_purification(tuning_steps=3)
    purification.remove(torch.tensor([3]))
    purification.tuning_step(patch_of(purification))
    tuning = purification.tuning
    assert tuning is not None
    purification.changes.cut = torch.tensor([5])

    def of(measure: CleanHarm, masks: torch.Tensor) -> float:  # in proportion to the change
        assert measure._before is not None
        images = measure.clean[0].images
        with torch.no_grad():
            logits = purification.raised(images, statistics="running")
        torch.testing.assert_close(measure._before[: len(images)], logits.log_softmax(1))
        whole, before = tuning.changes()["fc.weight"], tuning.softened.weights()["fc.weight"]
        found = measure.masked.weights()["fc.weight"]
        share = float((found - before).norm() / (whole - before).norm())
        return 7.0 + harm * share  # pruning and masks have done 7

    monkeypatch.setattr(CleanHarm, "of", of)
    while not purification.ended:
        purification.tuning_step(None)
    if share == 1.0:
        assert purification.warnings == []
    else:
        done = "were changed by 62% of what was found" if share else "were not tuned"
        assert purification.warnings == [
            f"weights {done}: all of it did {harm:.3g} nats more harm than pruning and "
            "masks, and 200, 4 times `pruning.harm`, is allowed"
        ]
    assert (purification.changes.tuned is not None) == (share > 0)
    assert purification.changes.cut.tolist() == ([5] if share == 1 else [])
    if share:
        assert purification.changes.tuned is not None
        expected = tuning.changes(share)
        assert all(
            weight.equal(expected[name]) for name, weight in purification.changes.tuned.items()
        )


def test_tuning_that_ends_in_nan_leaves_the_weights_as_they_were() -> None:
    purification = new_purification(tuning_steps=1)
    purification.remove(torch.tensor([3]))
    before = purification.changes.turned_down()
    purification.tuning = purification._new_tuning(patch_of(purification))
    for weight in purification.tuning._weights.values():
        weight.fill_(math.nan)
    purification.tuning.taken = 1
    purification.tuning._show()
    purification.tuning_step(None)
    assert purification.changes.tuned is None
    assert purification.changes.tuned_by == 0.0
    assert all(weight.equal(before[n]) for n, weight in purification.changes.turned_down().items())
    assert "weights were not tuned" in purification.warnings[0]


def test_weights_alone_are_removed_to_the_letter() -> None:
    purification = new_purification(rule="count", amount=2, removes="filter", repair=True)
    network = purification.masked.network
    positions = torch.tensor([1, 50])
    purification.remove(positions)
    found = purification.check(target=None)
    purified, expected = purification.purified(), copy.deepcopy(network)
    for name, index in (purification.masked.layers.locate(int(p)) for p in positions):
        expected.get_submodule(name).weight.data[index] = 0.0
    state = {**expected.state_dict(), "fc.bias": purified.state_dict()["fc.bias"]}
    assert all(torch.equal(tensor, state[name]) for name, tensor in purified.state_dict().items())
    assert not torch.equal(state["fc.bias"], network.state_dict()["fc.bias"])  # the repair
    images, labels = purification.data.images, purification.data.labels
    with torch.no_grad():
        assert found == float((purified(images).argmax(1) == labels).float().mean())


def test_filters_that_are_spared_are_told() -> None:
    purification = new_purification()
    purification.spare([])
    assert purification.warnings == []
    purification.spare([0, 87])
    [warning] = purification.warnings
    assert "one filter stays in each of these layers" in warning
    assert "although it was to be pruned: 'conv1', 'layer2.conv2'; a layer" in warning


@pytest.mark.parametrize(
    ("amount", "filters", "most"), [(0.29, 100, 29), (0.295, 100, 29), (0.001, 100, 1)]
)
def test_the_most_filters_are_a_share_of_all(
    amount: float, filters: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    purification = new_purification(amount=amount)
    monkeypatch.setattr(type(purification.masked.layers), "total", filters)
    assert purification.most_filters == most

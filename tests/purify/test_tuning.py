from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from helpers import goals_of, images_and_labels, same, snapshot, trained_network
from torch import Tensor

from lightning_mnp.config import Constants
from lightning_mnp.defense_data.defense_set import DefenseSet, value_range
from lightning_mnp.purify.tuning import Tuning, TuningConstants, disagreement, held_down
from lightning_mnp.signals.patch import PatchTrigger
from lightning_mnp.surgery.layers import find_filter_layers
from lightning_mnp.surgery.masked_network import MaskedNetwork


def new_tuning(
    steps: int = 6,
    pruned: tuple[int, ...] = (),
    seed: int = 0,
    exclude: list[str] | None = None,
    weights: dict[str, Tensor] | None = None,
    cut: tuple[int, ...] = (),
    impurity: float = 0.0,
    **changes: Any,
) -> Tuning:
    network, data = trained_network(), DefenseSet(*images_and_labels())
    layers = find_filter_layers(network, data.images[:2], exclude=exclude or [])
    masked = MaskedNetwork(network, layers)
    others = data.labels != 1
    images, labels = data.images[others], data.labels[others]
    low, high = value_range(data.images)
    patch = PatchTrigger(masked, images, labels, goals_of(images), low, high)
    filters = torch.ones(layers.total)
    filters[list(pruned)] = 0.0
    given = masked.weights() if weights is None else weights
    constants, zeros = Constants(TuningConstants(**changes)), torch.tensor(cut, dtype=torch.long)
    return Tuning(
        masked, given, data, patch, filters, "none", steps, 40, seed, zeros, impurity, constants
    )


def finish(tuning: Tuning) -> list[dict[str, float]]:
    taken = []
    while not tuning.finished:
        taken.append(tuning.step())
    return taken


def test_disagreement_is_the_divergence_at_a_temperature() -> None:
    logits, wanted = torch.randn(3, 4), torch.randn(3, 4)
    expected = []
    for found, other in zip(logits.tolist(), wanted.tolist(), strict=True):
        p, q = (
            [math.exp(v / 2.0) / sum(math.exp(w / 2.0) for w in row) for v in row]
            for row in (other, found)
        )
        expected.append(4 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    assert disagreement(logits, wanted, 2.0).tolist() == pytest.approx(expected, rel=1e-4)


def test_a_class_is_held_down_to_the_lesser_lead() -> None:
    torch.manual_seed(3)
    logits, limit = 3 * torch.randn(8, 5), 3 * torch.randn(8, 5)
    goals = torch.tensor([0, 1, 2, 3, 4, 2, -1, -1])
    found = held_down(logits, limit, goals)

    def odds(row: list[float], place: int) -> float:
        return math.exp(row[place]) / sum(math.exp(v) for i, v in enumerate(row) if i != place)

    lowered = 0
    for image, goal in enumerate(goals.tolist()):
        own, other, new = (each[image].tolist() for each in (logits, limit, found))
        if goal < 0:
            assert new == own
            continue
        wanted = min(odds(own, goal), odds(other, goal))
        lowered += wanted < odds(own, goal)
        assert odds(new, goal) == pytest.approx(wanted, rel=1e-4)
        rest = [place for place in range(5) if place != goal]
        assert [new[place] for place in rest] == [own[place] for place in rest]
    assert 0 < lowered < 6


def test_a_patch_takes_images_less_far_and_clean_predictions_stay() -> None:
    tuning = new_tuning(steps=30, weight=1.0, step=0.02)
    network, images = tuning.before.network, tuning.data.images
    before = snapshot(network)
    tuning.patch.masked = tuning.before
    tuning.patch.approach()
    reached = float(tuning.patch.margins().mean())
    tuning.patch.masked = tuning.masked
    finish(tuning)
    tuning.patch.approach()
    assert float(tuning.patch.margins().mean()) < reached - 0.5
    with torch.no_grad():
        wanted = tuning.before(images, statistics="running")
        found = tuning.masked(images, statistics="running")
    assert float((wanted.argmax(1) == found.argmax(1)).float().mean()) > 0.9
    assert same(before, snapshot(network))


def test_the_first_step_is_that_of_adam_along_both_disagreements() -> None:
    tuning = new_tuning(weight=0.5, step=0.01)
    reference = copy.deepcopy(tuning.before.network)
    tuning.patch.approach()
    tuning._begun = True
    patched = tuning.patch.applied(tuning.patch.images, tuning.patch.pattern)
    clean = tuning.data.images
    with torch.no_grad():
        kept = [reference(images) for images in (clean, tuning.patch.images)]
    reference.zero_grad()
    # On clean images nothing has changed yet, so that there is no slope.
    loss = 0.5 * disagreement(reference(patched), kept[1], 2.0).mean()
    loss.backward()
    with torch.no_grad():
        assert float(disagreement(reference(clean), kept[0], 2.0).max()) < 1e-5
    found = tuning.step()
    assert found["disagreement"] == pytest.approx(float(loss.detach()), rel=1e-4)
    before = tuning.before.weights()
    for name, weight in tuning.changes().items():
        slope = reference.get_parameter(name).grad
        assert slope is not None
        length = 0.01 * float(before[name].square().mean().sqrt())
        sure = slope.abs() > 1e-5
        assert bool(sure.any())
        expected = before[name] - length * slope.sign()
        torch.testing.assert_close(weight[sure], expected[sure], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("impurity", "left_out"), [(0.0, 0), (0.1, 4)])
def test_a_step_wins_back_the_former_predictions_with_the_suspected_class_held_down(
    impurity: float, left_out: int
) -> None:
    """Against a reference of its own: one network before, one cut, one tuned."""
    cut = (5, 17, 40)
    tuning = new_tuning(weight=0.5, own=2.0, step=0.01, cut=cut, pruned=(2,), impurity=impurity)
    former, filters = tuning.former.network, tuning._filters
    zeros = torch.ones(tuning.masked.kernels.total)
    zeros[list(cut)] = 0.0
    weights = tuning.masked.kernels.scaled(tuning.former.weights(), zeros)
    images, labels = tuning.data.images, tuning.data.labels
    tuning.patch.approach(filters)
    tuning._begun = True
    others = tuning.patch.images
    patched = tuning.patch.applied(others, tuning.patch.pattern)
    given = {"masks": filters, "statistics": "running"}
    with torch.no_grad():
        goals = torch.where(labels == 1, -1, 1)
        wanted = held_down(
            former(images) / 2, tuning.former(images, weights=weights, **given) / 2, goals
        )
        ones = torch.ones(len(others), dtype=torch.long)
        kept = held_down(
            former(others) / 2, tuning.former(others, weights=weights, **given) / 2, ones
        )
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    clean = tuning.former(images, weights=leaves, **given)
    shown = tuning.former(patched, weights=leaves, **given)
    each = torch.where(labels == 1, 2.0, 1.0) * disagreement(clean, 2 * wanted, 2.0)
    each = each.sort().values[: len(each) - left_out]
    loss = each.mean() + 0.5 * disagreement(shown, 2 * kept, 2.0).mean()
    slopes = torch.autograd.grad(loss, [leaves[name] for name in tuning.changes()])
    assert tuning.step()["disagreement"] == pytest.approx(float(loss.detach()), rel=1e-4)
    for (name, weight), slope in zip(tuning.changes().items(), slopes, strict=True):
        length = 0.01 * float(weights[name].square().mean().sqrt())
        sure = (slope.abs() > 1e-5) & (weights[name] != 0)
        expected = weights[name] - length * slope.sign()
        torch.testing.assert_close(weight[sure], expected[sure], rtol=1e-3, atol=1e-4)


def test_kernels_that_were_cut_stay_at_zero() -> None:
    cut = (0, 3, 200)
    tuning = new_tuning(cut=cut)
    finish(tuning)
    zeros = torch.ones(tuning.masked.kernels.total)
    zeros[list(cut)] = 0.0
    left = tuning.masked.kernels.scaled(tuning.former.weights(), zeros)
    changed, other = tuning.changes(), 0
    for name, weight in changed.items():
        gone = (left[name] == 0) & (tuning.former.weights()[name] != 0)
        other += int(gone.sum())
        assert bool((weight[gone] == 0).all())
        assert bool((tuning.changes(0.5)[name][gone] != 0).all())  # half of the way back
    assert other > 0


def test_images_of_the_suspected_class_may_lean_to_it() -> None:
    tuning = new_tuning()
    assert tuning._goals(torch.tensor([0, 1, 2, 3])).tolist() == [1, -1, 1, 1]


def test_each_class_has_a_goal_of_its_own_where_classes_are_exchanged() -> None:
    tuning = new_tuning()
    tuning.patch.labels = torch.tensor([0, 2, 3])
    tuning.patch.goals = torch.tensor([1, 3, 0])
    assert tuning._goals(torch.tensor([0, 1, 2, 3, 0])).tolist() == [1, -1, 3, 0, 1]
    assert tuning._goals(torch.tensor([1])).tolist() == [-1]


def test_steps_get_shorter_down_to_nothing() -> None:
    tuning = new_tuning(steps=8)
    lengths = []
    while not tuning.finished:
        tuning.step()
        lengths.append(tuning._optimizer.param_groups[0]["lr"] / tuning._lengths[0])
    wanted = [0.5 * (1 + math.cos(math.pi * taken / 8)) for taken in range(8)]
    assert lengths == pytest.approx(wanted)


def test_the_patch_follows_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    tuning, followed = new_tuning(steps=10), []
    monkeypatch.setattr(tuning.patch, "follow", lambda masks: followed.append(tuning.taken))
    finish(tuning)
    assert followed == [5]
    assert tuning.taken == 10


def test_pruned_filters_and_layers_that_are_left_out_stay() -> None:
    tuning = new_tuning(pruned=(0, 5), exclude=["layer2.conv2"])
    finish(tuning)
    before, changed = tuning.before.weights(), tuning.changes()
    first = tuning.masked.layers[0]
    assert "layer2.conv2.weight" not in changed
    weight = changed[f"{first.name}.weight"]
    assert weight[[0, 5]].equal(before[f"{first.name}.weight"][[0, 5]])
    assert not weight[1].equal(before[f"{first.name}.weight"][1])


def test_a_share_of_the_change() -> None:
    tuning = new_tuning()
    finish(tuning)
    before = tuning.before.weights()
    whole, half = tuning.changes(), tuning.changes(0.5)
    for name, weight in half.items():
        torch.testing.assert_close(weight, (before[name] + whole[name]) / 2)


def test_weights_to_begin_with_need_not_be_those_of_the_network() -> None:
    given = {name: weight / 2 for name, weight in new_tuning().before.weights().items()}
    tuning = new_tuning(weights=given)
    finish(tuning)
    for name, weight in tuning.changes().items():
        assert float((weight - given[name]).abs().max()) < 0.1 * float(given[name].abs().max())
        assert not weight.equal(given[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_gives_finite_weights_of_its_own_type(dtype: torch.dtype) -> None:
    tuning = new_tuning()
    network = tuning.before.network.to(dtype)
    layers = tuning.before.layers
    masked = MaskedNetwork(network, layers)
    data = DefenseSet(tuning.data.images.to(dtype), tuning.data.labels)
    images, labels = tuning.patch.images.to(dtype), tuning.patch.labels
    low, high = value_range(data.images)
    patch = PatchTrigger(masked, images, labels, goals_of(images), low, high)
    filters = torch.ones(layers.total)
    filters[[0, 5]] = 0.0
    constants = Constants(TuningConstants(step=0.05))
    given = (masked.weights(), data, patch, filters, "none", 4, 40, 0)
    tuning = Tuning(masked, *given, constants=constants)
    finish(tuning)
    for name, weight in tuning.changes().items():
        assert weight.dtype == dtype
        assert bool(weight.isfinite().all())
        assert not weight.equal(masked.weights()[name])


def test_a_layer_that_is_not_called_stays() -> None:
    tuning = new_tuning()
    network = tuning.before.network
    network.add_module("idle", torch.nn.Conv2d(1, 2, 1))
    masked = MaskedNetwork(network, tuning.before.layers)
    given = (tuning.data, tuning.patch, torch.ones(masked.layers.total), "none", 3, 40, 0)
    again = Tuning(masked, masked.weights(), *given)
    finish(again)
    changes, before = again.changes(), masked.weights()
    assert changes["idle.weight"].equal(before["idle.weight"])
    assert not changes["conv1.weight"].equal(before["conv1.weight"])


@pytest.mark.parametrize("stop", [0, 1, 3, 6])
def test_resumed_tuning_ends_the_same(stop: int) -> None:
    given: dict[str, Any] = {"cut": (5, 17, 40), "impurity": 0.1}
    reference, first, second = (new_tuning(**given) for _ in range(3))
    finish(reference)
    for _ in range(stop):
        first.step()
    state = first.state_dict()
    finish(first)  # which must not reach into the state
    second.load_state_dict(state)
    finish(second)
    wanted: dict[str, Any] = reference.changes()
    assert all(weight.equal(wanted[name]) for name, weight in second.changes().items())
    assert second.patch.pattern.equal(reference.patch.pattern)


def test_seed_decides() -> None:
    one, same_one, other = (new_tuning(seed=seed) for seed in (0, 0, 1))
    for tuning in (one, same_one, other):
        tuning.batch_size = 8
        finish(tuning)
    name = next(iter(one.changes()))
    assert one.changes()[name].equal(same_one.changes()[name])
    assert not one.changes()[name].equal(other.changes()[name])


def test_never_more_images_than_a_batch_or_the_constant() -> None:
    assert new_tuning().batch_size == 40
    assert new_tuning(images=5).batch_size == 5

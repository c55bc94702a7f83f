from __future__ import annotations

import math

import pytest
import torch
from helpers import images_and_labels, same, snapshot, trained_network
from torch import nn

from lightning_mnp.signals.reach import (
    ReachSearch,
    SurrogateTrigger,
    _crossing,
    goal_margins,
    image_scale,
    least_positive,
    push_loss,
    reach_ratio,
)
from lightning_mnp.surgery.layers import find_filter_layers
from lightning_mnp.surgery.masked_network import MaskedNetwork


def masked_of(network: nn.Module) -> MaskedNetwork:
    return MaskedNetwork(network, find_filter_layers(network, images_and_labels()[0][:2]))


def others(target: int) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = images_and_labels()
    return images[labels != target], labels[labels != target]


def test_scale_is_the_mean_distance_from_the_mean() -> None:
    images = images_and_labels()[0]
    mean = sum(images) / len(images)
    expected = sum(float((image - mean).square().sum().sqrt()) for image in images) / len(images)
    assert image_scale(images) == pytest.approx(expected, rel=1e-5)


def test_steps_have_their_length_and_the_limit_holds() -> None:
    masked = masked_of(trained_network())
    images, labels = others(2)
    trigger = SurrogateTrigger(masked, 2, torch.zeros(1, 1, 8, 8), limit=1.0)
    trigger.ascend(images, labels, 0.4)
    assert float(trigger.perturbation.norm()) == pytest.approx(0.4, rel=1e-4)
    for _ in range(5):
        trigger.ascend(images, labels, 0.4)
    assert float(trigger.perturbation.norm()) <= 1.0 + 1e-5


def test_trigger_learns_the_way_to_its_class() -> None:
    masked = masked_of(trained_network())
    images, labels = others(1)
    trigger = SurrogateTrigger(masked, 1, torch.zeros(1, 1, 8, 8), limit=20.0)

    def success() -> float:
        return float((trigger.logits(images).argmax(1) == 1).float().mean())

    before = trigger.margin(images, labels), success()
    for _ in range(15):
        trigger.ascend(images, labels, 1.0)
    assert trigger.margin(images, labels) > before[0]
    assert success() > max(before[1], 0.9)


@pytest.mark.parametrize(("arrived", "by_margin"), [(10, True), (9, False), (0, False)])
def test_images_are_pushed_by_cross_entropy_until_most_have_arrived(
    arrived: int, by_margin: bool
) -> None:
    logits, labels = torch.zeros(10, 3), torch.zeros(10, dtype=torch.long)
    logits[:arrived, 2] = 4.0
    logits[arrived:, 0] = 1.0
    log_sums = [math.log(sum(math.exp(value) for value in row)) for row in logits.tolist()]
    entropy = sum(log_sums) / 10 - float(logits[:, 2].mean())
    expected = -float((logits[:, 2] - logits[:, 0]).mean()) if by_margin else entropy
    assert float(push_loss(logits, labels, torch.full_like(labels, 2))) == pytest.approx(
        expected, rel=1e-5
    )


def test_margins_are_goal_minus_own() -> None:
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 3, 0, 1, 3])
    goals = torch.tensor([2, 2, 2, 1, 0, 2])
    rows = zip(logits, labels, goals, strict=True)
    expected = [float(row[goal] - row[label]) for row, label, goal in rows]
    assert goal_margins(logits, labels, goals).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_least_positive_number_can_be_divided_by(dtype: torch.dtype) -> None:
    zero = torch.zeros(1, dtype=dtype)
    least = zero.clamp_min(least_positive(zero))
    assert float(least) > 0
    assert float(zero / least) == 0


def test_reach_search_visits_every_class_and_touches_nothing() -> None:
    network = trained_network()
    before = snapshot(network)
    images, labels = images_and_labels()
    search = ReachSearch(masked_of(network), image_scale(images), [2, 0, 1, 3], seed=0)
    most, steps = search.most_steps(), 0
    while not search.finished:
        search.step(images, labels)
        steps += 1
    assert steps <= most == 4 * 21
    assert sorted(search.reaches) == [0, 1, 2, 3]
    assert all(reach > 0 for reach in search.reaches.values())
    assert same(before, snapshot(network))


def test_reach_search_resumes_to_the_same() -> None:
    images, labels = images_and_labels()

    def fresh() -> ReachSearch:
        return ReachSearch(masked_of(trained_network()), image_scale(images), [2, 0, 1], seed=0)

    reference = fresh()
    while not reference.finished:
        reference.step(images, labels)
    search = fresh()
    for _ in range(4):
        search.step(images, labels)
    again = fresh()
    again.load_state_dict(search.state_dict())
    while not again.finished:
        again.step(images, labels)
    assert again.reaches == reference.reaches


@pytest.mark.parametrize(
    ("trace", "expected"),
    [
        ([(0.0, 0.0), (0.02, 0.25), (0.04, 0.75)], 0.03),
        ([(0.0, 0.6)], 0.0),
        ([(0.0, 0.1), (0.02, 0.2)], math.inf),
    ],
)
def test_crossing_is_by_a_straight_line(trace: list[tuple[float, float]], expected: float) -> None:
    assert _crossing(trace) == pytest.approx(expected)


def test_ratio_is_of_the_soonest_to_the_median_of_the_others() -> None:
    suspect, ratio, median = reach_ratio({0: 0.2, 1: 0.05, 2: 0.1, 3: 0.3})
    assert (suspect, ratio, median) == (1, pytest.approx(0.25), 0.2)
    longest = sum(0.02 * 1.1**step for step in range(20))
    assert reach_ratio({0: 0.01, 1: math.inf, 2: math.inf})[2] == pytest.approx(longest)


def test_suspected_classes_come_first_and_none_twice() -> None:
    chosen = ReachSearch.choose_classes([5, 2, 5], 12, 10, seed=3)
    assert chosen[:2] == [5, 2]
    assert len(set(chosen)) == 10
    assert chosen == ReachSearch.choose_classes([5, 2, 5], 12, 10, seed=3)


def test_a_first_batch_of_the_class_alone_changes_nothing_but_the_first_step() -> None:
    images, labels = images_and_labels()
    search = ReachSearch(masked_of(trained_network()), image_scale(images), [0, 1], seed=0)
    own = labels == 0
    search.step(images[own], labels[own])
    while not search.finished:
        search.step(images, labels)
    assert {tuple(each.shape) for each in search.perturbations.values()} == {(1, 1, 8, 8)}
    assert float(search.perturbations[0].std()) > 0  # not the same for all pixels


def test_an_unknown_reach_is_not_the_soonest() -> None:
    known = {0: 0.5, 1: 0.25, 2: 0.5}
    soonest, ratio, _ = reach_ratio({**known, 3: math.nan})
    assert (soonest, ratio) == (1, reach_ratio({**known, 3: math.inf})[1])

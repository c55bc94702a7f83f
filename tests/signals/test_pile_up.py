from __future__ import annotations

import math

import pytest
import torch
from helpers import goals_of, new_scene

from lightning_mnp.defense_data.defense_set import DefenseSet
from lightning_mnp.signals.pile_up import PileUp, SuppressedTrace
from lightning_mnp.surgery.masked_network import MaskedNetwork


def masked_and_data() -> tuple[MaskedNetwork, DefenseSet]:
    scene = new_scene()
    return scene.masked, scene.data


def ones(masked: MaskedNetwork) -> torch.Tensor:
    return torch.ones(masked.layers.total)


def test_there_is_nothing_to_search_for() -> None:
    pile_up = PileUp(new_scene())
    assert pile_up.finished
    assert not pile_up.failed
    assert PileUp.all_steps(pile_up.scene) == pile_up.most_steps() == 0
    assert pile_up.step() == pile_up.state_dict() == {}


def test_suppressed_margins_are_those_of_the_formula() -> None:
    masked, data = masked_and_data()
    weights = {name: weight * 0.5 for name, weight in masked.weights().items()}
    images = data.images[data.labels != 1]
    trace = SuppressedTrace(masked, [weights], images, goals_of(images))
    logits = masked(images, weights=weights)
    expected = [
        float(row[1]) - math.log(sum(math.exp(v) for k, v in enumerate(row.tolist()) if k != 1))
        for row in logits
    ]
    assert trace.margins(ones(masked)).tolist() == pytest.approx(expected, abs=1e-4)
    trace.adapt(ones(masked), 0)
    assert trace.state_dict() == {}


def test_runs_of_suppression_share_the_images() -> None:
    masked, data = masked_and_data()
    runs = [
        {name: weight * share for name, weight in masked.weights().items()} for share in (0.5, 0.7)
    ]
    images = data.images[data.labels != 1][:9]
    both = SuppressedTrace(masked, runs, images, goals_of(images)).margins(ones(masked))
    parts = (images[:5], images[5:])
    alone = [
        SuppressedTrace(masked, [run], part, goals_of(part)).margins(ones(masked))
        for run, part in zip(runs, parts, strict=True)
    ]
    torch.testing.assert_close(both, torch.cat(alone))
    few = SuppressedTrace(masked, runs, images[:5], goals_of(images[:5]))
    assert len(few.weights) == 1
    last = SuppressedTrace(masked, runs[1:], images[:5], goals_of(images[:5]))
    assert few.margins(ones(masked)).equal(last.margins(ones(masked)))


def test_masks_lower_the_margins_that_they_should() -> None:
    masked, data = masked_and_data()
    images = data.images[data.labels != 1]
    trace = SuppressedTrace(masked, [masked.weights()], images, goals_of(images))
    masks = ones(masked).requires_grad_()
    (slope,) = torch.autograd.grad(trace.margins(masks).mean(), masks)
    index = int(slope.abs().argmax())
    step = torch.zeros_like(masks)
    step[index] = 1e-2
    up, down = (float(trace.margins(ones(masked) + sign * step).mean()) for sign in (1, -1))
    assert float(slope[index]) == pytest.approx((up - down) / 2e-2, rel=0.05)


@pytest.mark.parametrize("count", [1, 2])
def test_suppressed_network_takes_fewer_images_than_can_be_normalized(count: int) -> None:
    masked, data = masked_and_data()
    images = data.images[:count]
    trace = SuppressedTrace(masked, [masked.weights()], images, goals_of(images))
    logits = masked(images, statistics="running")
    expected = [
        float(row[1]) - math.log(sum(math.exp(v) for k, v in enumerate(row.tolist()) if k != 1))
        for row in logits
    ]
    assert trace.margins(ones(masked)).tolist() == pytest.approx(expected, abs=1e-4)

from __future__ import annotations

import math

import pytest
import torch
from helpers import goals_of, new_scene

from lightning_mnp.config import Constants
from lightning_mnp.defense_data.defense_set import DefenseSet
from lightning_mnp.report import RunResult, Signal
from lightning_mnp.signals.pile_up import PileUp, PileUpConstants, SuppressedTrace
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


def signal_of(*runs: tuple[int, ...], constants: Constants | None = None) -> Signal:
    scene = new_scene(constants=constants)
    scene.runs += [RunResult(0.5, 0.3, run, 9, 0.2, "") for run in runs]
    return PileUp(scene).signal()


def test_signal_is_the_formula() -> None:
    runs = (25, 15, *[0] * 8), (10, 20, *[1] * 8), (16, 4, *[2] * 8)
    shares = [[count / sum(run) for count in run] for run in runs]
    usual = [math.prod(run[k] + 0.01 for run in shares) ** (1 / 3) - 0.01 for k in range(10)]
    spread = usual[1] - min(usual)
    assert spread > 0.25 / 10
    signal = signal_of(*runs)
    assert (signal.name, signal.target_class, signal.threshold) == ("pile-up", 0, 1.0)
    assert signal.value == signal.strength == pytest.approx((usual[0] - usual[1]) / spread)
    assert signal.classes == pytest.approx(dict(enumerate(usual)))
    assert signal.reason == (
        f"after clean suppression, {usual[0]:.0%} of the predictions fall on class 0, where the "
        f"gap to the next class is {signal.value:.2f} times the spread of the others (mean of 3 "
        "runs; counts from 1, together with the margin, the reach or the patch)"
    )


def test_it_does_not_decide_by_itself() -> None:
    signal = signal_of((91, *[1] * 9))
    assert signal.strength > 30
    assert (signal.decides, signal.counts) == (False, False)


@pytest.mark.parametrize(("lack", "decides"), [(1.2, True), (3.0, True), (1.1, False)])
@pytest.mark.parametrize(
    ("predictions", "value"), [((40, 10, *range(2, 10)), 3.75), ((15, 9, *range(1, 9)), 0.75)]
)
def test_it_decides_on_a_class_that_is_rare_on_clean_images(
    lack: float, decides: bool, predictions: tuple[int, ...], value: float
) -> None:
    scene = new_scene(constants=Constants(PileUpConstants(least_share=1e-9)))
    scene.masked.raised = {0: lack}
    scene.runs.append(RunResult(0.5, 0.3, predictions, 9, 0.2, ""))
    signal = PileUp(scene).signal()
    assert signal.decides == decides
    assert (signal.target_class, signal.threshold) == (0, 2.0 if decides else 1.0)
    assert signal.value == pytest.approx(value)
    assert signal.strength == pytest.approx(value / signal.threshold)
    told = f"by itself from 2, since the class is rare on clean images: its logit lacks {lack:.2f}"
    assert (told in signal.reason) == decides
    assert "counts from 1, together with the margin, the reach or the patch" in signal.reason


def test_it_does_not_decide_if_another_class_is_rare() -> None:
    scene = new_scene()
    scene.masked.raised = {3: 2.0}
    scene.runs.append(RunResult(0.5, 0.3, (91, *[1] * 9), 9, 0.2, ""))
    assert not PileUp(scene).signal().decides


def test_shares_as_even_as_can_be_are_taken_for_less_even() -> None:
    """A quarter of the share of one class of ten, or the whole share of one class of four."""
    assert signal_of((14, *[6] * 9)).value == pytest.approx((14 - 6) / 68 / (0.25 / 10))
    assert signal_of((14, 6, 6, 6)).value == pytest.approx((14 - 6) / 32 / (1 / 4))


def test_runs_that_pile_up_on_different_classes_do_not_add_up() -> None:
    first, second = (24, *[4] * 9), (4, 24, *[4] * 8)
    apart, alike = signal_of(first, second), signal_of(first, first)
    assert apart.strength == pytest.approx(0.0, abs=1e-9)
    assert alike.strength > 1


def test_a_run_without_the_class_says_more_than_its_share() -> None:
    piled, other = (40, *range(1, 10)), (0, 40, *range(2, 10))
    alike, apart = signal_of(*[piled] * 4), signal_of(*[piled] * 3, other)
    assert apart.target_class == alike.target_class == 0
    assert apart.strength < alike.strength * 3 / 4


def test_constants_of_the_signal_can_be_varied() -> None:
    strict = Constants(PileUpConstants(counts_from=2.0, least_share=0.5))
    runs = (24, *range(1, 10)), (9, *range(1, 10))
    shares = [[count / sum(run) for count in run] for run in runs]
    usual = [math.sqrt((a + 0.5) * (b + 0.5)) - 0.5 for a, b in zip(*shares, strict=True)]
    signal = signal_of(*runs, constants=strict)
    assert signal.value == pytest.approx((usual[0] - usual[9]) / (usual[9] - usual[1]))
    assert signal.strength == pytest.approx(signal.value / 2)


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

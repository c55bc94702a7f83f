from __future__ import annotations

import math
import statistics

import pytest
import torch
from helpers import finish, new_scene, same, snapshot

from lightning_mnp.config import Constants
from lightning_mnp.report import RunResult
from lightning_mnp.signals.margin import (
    MarginAscent,
    MarginConstants,
    MarginSearch,
    MarginTrace,
    margin_ratio,
)
from lightning_mnp.signals.pile_up import PileUp
from lightning_mnp.signals.standout import StandoutConstants


def new_search(network: torch.nn.Module | None = None) -> MarginSearch:
    return MarginSearch(new_scene(network, tried=(0, 1)))


def test_margins_grow_and_images_stay_in_their_range() -> None:
    search = new_search()
    first = search.step()["margin"]
    ascent = search._ascent
    assert ascent is not None
    finish(search)
    assert max(search.margins.values()) > first
    assert (ascent.images >= search.scene.data.images.amin((0, 2, 3), keepdim=True)).all()
    assert (ascent.images <= search.scene.data.images.amax((0, 2, 3), keepdim=True)).all()
    assert ascent.images.ne(ascent.images.clone().fill_(0)).any()


def test_margins_are_the_same_for_a_seed_and_in_any_order_of_steps() -> None:
    reference = finish(new_search()).margins
    search = new_search()
    for _ in range(7):
        search.step()
    again = new_search()
    again.load_state_dict(search.state_dict())
    assert finish(again).margins == reference


def test_network_is_left_as_it_was() -> None:
    search = new_search()
    before = snapshot(search.scene.masked.network)
    search.step()
    assert same(before, snapshot(search.scene.masked.network))


def test_a_shortcut_to_a_class_stands_out() -> None:
    """A filter that nothing in the data excites drives class 1 further than any image does."""
    search = new_search()
    plain = finish(search).margins
    network = search.scene.masked.network
    last = [module for module in network.modules() if isinstance(module, torch.nn.Linear)][-1]
    with torch.no_grad():
        last.weight[1] *= 20
    assert finish(new_search(network)).margins[1] > 3 * plain[1]


def found_search(
    margins: dict[int, float], predictions: tuple[int, ...], constants: Constants | None = None
) -> MarginSearch:
    """A search that has found these margins, after one run with these predictions."""
    search = MarginSearch(new_scene(constants=constants))
    search.scene.runs.append(RunResult(0.5, 0.3, predictions, 9, 0.2, ""))
    search.margins = margins
    return search


PILED = (1, 2, 9, 3, 2, 1)  # the gap on class 2 is 6, the spread of the others 2


@pytest.mark.parametrize(
    ("margins", "value"),
    [
        ({0: 8.0, 1: 10.0, 2: 13.0, 3: 12.0, 4: 11.0, 5: 9.0}, 1 / 4),
        ({0: 8.0, 1: 10.0, 2: 18.0, 3: 12.0, 4: 11.0, 5: 9.0}, 6 / 4),
        # Others so even that a quarter of the median is taken for their spread.
        ({0: 10.0, 1: 10.0, 2: 13.0, 3: 10.0, 4: 10.0, 5: 10.0}, 3 / 2.5),
        # The median is that of absolute values, and may be next to nothing.
        ({0: -10.0, 1: -10.0, 2: -7.0, 3: -10.0, 4: -10.0, 5: -10.0}, 3 / 2.5),
        ({0: 0.0, 1: 0.0, 2: 7.0, 3: 0.0, 4: 0.0, 5: 0.0}, 7 / (0.25 * 1e-12)),
    ],
)
def test_signal_is_the_lesser_of_margin_and_pile_up(
    margins: dict[int, float], value: float
) -> None:
    search = found_search(margins, PILED)
    pile_up = PileUp(search.scene).signal()
    assert pile_up.strength == pytest.approx(3.0)
    signal = search.signal()
    assert (signal.name, signal.target_class, signal.threshold) == ("margin", 2, 1.0)
    assert signal.value == pytest.approx(value)
    assert signal.strength == pytest.approx(min(value, 3.0))
    assert signal.decides
    assert signal.classes == margins
    assert signal.reason == (
        "the greatest margin is that of class 2, where the gap to the next class is "
        f"{value:.2f} times the spread of the others (counts from 1, together with the pile-up, "
        "which points to the same class)"
    )


def test_a_rare_class_has_to_lead_like_any_other() -> None:
    margins = {0: 8.0, 1: 10.0, 2: 13.0, 3: 12.0, 4: 11.0, 5: 9.0}
    search = found_search(margins, PILED)
    search.scene.masked.raised = {2: 1.8}
    assert (search.signal().value, search.signal().counts) == (pytest.approx(1 / 4), False)


def test_nothing_counts_if_margin_and_pile_up_disagree() -> None:
    margins = {0: 8.0, 1: 90.0, 2: 9.0, 3: 12.0, 4: 11.0, 5: 9.0}
    signal = found_search(margins, PILED).signal()
    assert (signal.target_class, signal.strength) == (1, 0.0)
    assert signal.value == pytest.approx(78 / 4)
    assert "the pile-up, which points to class 2)" in signal.reason


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("index", [0, 2])
def test_nothing_counts_if_a_margin_is_not_finite(wrong: float, index: int) -> None:
    margins = {0: 8.0, 1: 10.0, 2: 90.0, 3: 12.0, 4: 11.0, 5: 9.0, index: wrong}
    search = found_search(margins, PILED)
    assert search.failed == math.isnan(wrong)
    assert (search.signal().strength, search.signal().value) == (0.0, 0.0)


def test_constants_of_the_signal_can_be_varied() -> None:
    margins = {0: 8.0, 1: 10.0, 2: 13.0, 3: 12.0, 4: 11.0, 5: 9.0}
    strict = Constants(MarginConstants(counts_from=0.1))
    assert found_search(margins, PILED, strict).signal().strength == pytest.approx(2.5)
    usual = statistics.median(margins.values())
    rough = Constants(StandoutConstants(least_spread=2.0))
    assert found_search(margins, PILED, rough).signal().value == pytest.approx(1 / (2 * usual))


@pytest.mark.parametrize(
    ("margins", "expected"),
    [
        ({0: 10.0, 1: 40.0, 2: 20.0}, (1, 2.0, 20.0)),
        ({0: -3.0, 1: 5.0}, (1, 0.0, -3.0)),
        ({0: math.inf, 1: 5.0}, (0, 0.0, 5.0)),
    ],
)
def test_ratio_compares_with_the_next_class(
    margins: dict[int, float], expected: tuple[int, float, float]
) -> None:
    assert margin_ratio(margins) == expected


def test_trace_counts_from_what_is_normal() -> None:
    search = new_search()
    ones = torch.ones(search.scene.masked.layers.total)
    trace, shifted = (MarginTrace(search.ascent(1, 3), normal) for normal in (0.0, 7.0))
    difference = trace.margins(ones) - shifted.margins(ones)
    assert difference.tolist() == pytest.approx([7.0] * 3, abs=1e-4)
    before = trace.margins(ones).mean()
    trace.adapt(ones, 0)
    assert trace.margins(ones).mean() > before
    shifted.load_state_dict(trace.state_dict())
    assert torch.equal(shifted.ascent.images, trace.ascent.images)


def test_the_ascent_is_by_momentum_over_gradients_of_length_one() -> None:
    """The steps written out, image by image."""
    scene = new_scene(tried=(0, 1))
    images, classes = scene.data.images[:3], torch.tensor([0, 1, 0])
    channels = (1, images.shape[1], *[1] * (images.ndim - 2))
    low, high = torch.full(channels, -9.0), torch.full(channels, 9.0)
    constants = MarginConstants(momentum=0.5, length=0.02)
    ascent = MarginAscent(scene.masked, images, classes, low, high, 2, constants)
    length = 0.02 * 18.0 * images[0].numel() ** 0.5
    moved, velocity = images.clone(), torch.zeros_like(images)
    for _ in range(3):
        ascent.step()
        for place, wanted in enumerate(classes):
            image = moved[place : place + 1].clone().requires_grad_()
            logits = scene.masked(image, statistics="running")[0]
            others = [logit for index, logit in enumerate(logits) if index != int(wanted)]
            (slope,) = torch.autograd.grad(logits[wanted] - torch.stack(others).max(), image)
            velocity[place] = 0.5 * velocity[place] + slope[0] / slope.norm()
        moved = (moved + length * velocity).clamp(-9.0, 9.0)
        torch.testing.assert_close(ascent.images, moved, rtol=1e-4, atol=1e-4)
    # By momentum, the second step is longer than the first.
    assert float(velocity.flatten(1).norm(dim=1).min()) > 1.0


def test_a_trace_takes_more_steps_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    search, taken = new_search(), [0]
    ones = torch.ones(search.scene.masked.layers.total)

    def step(ascent: MarginAscent, masks: torch.Tensor | None = None) -> torch.Tensor:
        taken[0] += 1
        return torch.zeros(len(ascent.images))

    monkeypatch.setattr(MarginAscent, "step", step)
    trace, counts = MarginTrace(search.ascent(1, 3), 0.0), []
    for at in (0, 8):
        taken[0] = 0
        trace.adapt(ones, at)
        counts.append(taken[0])
    assert counts == [MarginConstants().first_steps, MarginConstants().next_steps]

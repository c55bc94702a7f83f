from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from helpers import (
    finish,
    images_and_labels,
    margins_of,
    new_scene,
    same,
    snapshot,
    trained_network,
)

from lightning_mnp.config import Constants
from lightning_mnp.defense_data.defense_set import DefenseSet
from lightning_mnp.signals.overlay import OverlayConstants, OverlaySearch
from lightning_mnp.signals.patch import PatchConstants, PatchSearch
from lightning_mnp.signals.pattern import PatternSearch, PatternTrace, pattern_lead
from lightning_mnp.signals.warp import WarpConstants, WarpSearch

Kind = type[PatternSearch[Any]]
KINDS = pytest.mark.parametrize("kind", [PatchSearch, OverlaySearch, WarpSearch])


SHORT = Constants(
    PatchConstants(far_steps=1, near_steps=2), OverlayConstants(steps=3), WarpConstants(steps=3)
)


def new_search(kind: Kind, **options: Any) -> PatternSearch[Any]:
    return kind(new_scene(tried=(0, 1, 2), **options))


@KINDS
def test_approach_begins_anew_and_is_what_the_search_does(kind: Kind) -> None:
    first, second = (new_search(kind).trigger(1) for _ in range(2))
    first.approach()
    for _ in range(2):
        second.approach()
    assert first.pattern.equal(second.pattern)
    search = new_search(kind)
    for _ in range(kind.class_steps(Constants()) + 1):
        search.step()
    found = search.state_dict()["ends"]
    assert found == [pytest.approx(float(new_margins(kind, 0)), rel=1e-4)]


def new_margins(kind: Kind, target: int) -> torch.Tensor:
    trigger = new_search(kind).trigger(target)
    trigger.approach()
    return trigger.margins().mean()


@KINDS
def test_follow_goes_on_with_steps_as_short_as_the_last(kind: Kind) -> None:
    trigger, again = (new_search(kind).trigger(1) for _ in range(2))
    for each in (trigger, again):
        each.approach()
    masks = torch.ones(trigger.masked.layers.total)
    masks[0] = 0.0
    trigger.follow(masks)
    for _ in range(3):
        again.step(again.length(again.steps - 1), masks)
    assert trigger.pattern.equal(again.pattern)


@KINDS
def test_margins_are_in_units_of_the_usual_distance(kind: Kind) -> None:
    search = finish(new_search(kind))
    starts, ends = [], []
    for target in (0, 1, 2):
        trigger = search.trigger(target)
        assert (trigger.labels != target).all()
        starts.append(margins_of(trigger, trigger.applied(trigger.images, trigger.pattern)))
        trigger.approach()
        ends.append(margins_of(trigger, trigger.applied(trigger.images, trigger.pattern)))
    usual = -statistics.median(starts)
    expected = {target: end / usual for target, end in zip((0, 1, 2), ends, strict=True)}
    assert search.margins == pytest.approx(expected, rel=1e-3)
    risen = {
        target: (end - start) / usual
        for target, start, end in zip((0, 1, 2), starts, ends, strict=True)
    }
    assert search.rises == pytest.approx(risen, rel=1e-2, abs=1e-3)


@KINDS
def test_search_takes_the_steps_that_it_says(kind: Kind) -> None:
    search, steps = new_search(kind), 0
    while not search.finished:
        assert search.most_steps() == 3 * search.class_steps(Constants()) - steps
        search.step()
        steps += 1
    assert search.most_steps() == 0
    assert search.all_steps(search.scene) == 4 * search.trigger(0).steps  # before any are chosen


@KINDS
@pytest.mark.parametrize("stop", [1, 3, 4, 6, 8])
def test_resumed_search_ends_the_same(kind: Kind, stop: int) -> None:
    whole = finish(new_search(kind, constants=SHORT))
    reference = (whole.margins, whole.rises)
    search = new_search(kind, constants=SHORT)
    for _ in range(stop):
        search.step()
    again = new_search(kind, constants=SHORT)
    again.load_state_dict(search.state_dict())
    assert (finish(again).margins, again.rises) == reference


@KINDS
def test_what_is_found_is_the_pattern_of_the_class_that_stands_out(kind: Kind) -> None:
    search = new_search(kind, constants=SHORT)
    assert search.found() is None
    finish(search)
    figures = search.margins if kind is PatchSearch else search.rises
    best = max(figures, key=figures.__getitem__)
    trigger = new_search(kind, constants=SHORT).trigger(best, 32)
    trigger.approach()
    data = search.scene.data
    images, labels = data.others(best, 64, torch.device("cpu"), (0, kind.name, best, "measured"))
    arrived = trigger.logits(images).argmax(1) == best
    found = search.found()
    assert found is not None
    assert (found.signal, found.target_class) == (kind.name, best)
    assert found.success == pytest.approx(float(arrived.float().mean()))
    assert found.images == len(labels)
    again = new_search(kind, constants=SHORT)
    again.load_state_dict(search.state_dict())
    assert again.found() == found


@KINDS
def test_batches_are_no_larger_than_told(kind: Kind) -> None:
    search, sizes = new_search(kind, batch_size=5), []
    assert len(search.trigger(1).images) == 5
    network = search.scene.masked.network
    network.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    finish(search)
    shown = search.found()
    assert shown is not None
    assert shown.images > 5
    assert max(sizes) == 5


@KINDS
def test_network_is_left_as_it_was(kind: Kind) -> None:
    search = new_search(kind)
    before = snapshot(search.scene.masked.network)
    search.step()
    assert same(before, snapshot(search.scene.masked.network))


@KINDS
def test_half_precision_gives_finite_patterns(kind: Kind) -> None:
    images, labels = images_and_labels()
    data = DefenseSet(images.bfloat16(), labels)
    trigger = kind(new_scene(trained_network().bfloat16(), data)).trigger(0)
    trigger.approach()
    assert trigger.pattern.dtype == torch.bfloat16
    assert trigger.pattern.isfinite().all()


@pytest.mark.parametrize(
    ("rises", "expected"),
    [
        ({0: -0.5, 1: 2.0, 2: 0.5}, (1, 1.5)),
        ({0: -0.5, 1: -0.25}, (1, 0.25)),
        ({0: math.inf, 1: 0.0, 2: 0.0}, (0, 0.0)),
        ({0: math.nan, 1: 1.0, 2: 0.0}, None),
    ],
)
def test_lead_is_above_the_next_class(
    rises: dict[int, float], expected: tuple[int, float] | None
) -> None:
    found = pattern_lead(rises)
    assert found[1] == 0.0 if expected is None else found == expected


@pytest.mark.parametrize("kind", [OverlaySearch, WarpSearch])
def test_classes_that_are_not_equally_near_have_no_lead_by_that(kind: Kind) -> None:
    """A network of two classes that is much surer of one."""

    class Brightness(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(1, 2, 1)
            self.head = torch.nn.Linear(2, 2)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            brightness = images.flatten(1).mean(1)
            leaning = 8 * (brightness - 0.3)
            nothing = 0 * self.head(self.conv(images).mean((2, 3)))
            return nothing + torch.stack([-leaning, leaning], dim=1)

    labels = torch.arange(40) % 2
    images = 0.1 + 0.8 * labels[:, None, None, None] * torch.ones(1, 1, 8, 8)
    images = images + 0.05 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    network = Brightness()
    search = finish(kind(new_scene(network, DefenseSet(images, labels), tried=(0, 1))))
    assert abs(search.margins[0] - search.margins[1]) > 0.5
    assert pattern_lead(search.rises)[1] < 0.25


@KINDS
def test_trace_follows_the_network_and_goes_on_from_its_state(kind: Kind) -> None:
    search = new_search(kind)
    masks = torch.ones(search.scene.masked.layers.total)
    trace, again = (PatternTrace(search.trigger(1)) for _ in range(2))
    assert trace.name == kind.name
    before = trace.margins(masks).mean()
    trace.adapt(masks, 0)
    assert trace.margins(masks).mean() > before
    trace.trigger.pattern *= 0.1
    again.load_state_dict(trace.state_dict())
    before_following = trace.trigger.pattern.clone()
    masks[:2] = 0.0
    for each in (trace, again):
        each.adapt(masks, 1)
    assert trace.trigger.pattern.equal(again.trigger.pattern)
    assert not trace.trigger.pattern.equal(before_following)

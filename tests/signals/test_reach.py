from __future__ import annotations

import math

import pytest
import torch
from helpers import finish, images_and_labels, new_scene, same, snapshot, trained_network

from lightning_mnp.config import Constants
from lightning_mnp.signals.base import SignalSearch
from lightning_mnp.signals.margin import MarginSearch
from lightning_mnp.signals.reach import (
    PerturbationTrace,
    ReachConstants,
    ReachSearch,
    _crossing,
    reach_ratio,
)


def test_every_class_is_visited_and_nothing_touched() -> None:
    network = trained_network()
    before = snapshot(network)
    search, steps = ReachSearch(new_scene(network, tried=[2, 0, 1, 3])), 0
    most = search.most_steps()
    assert most == ReachSearch.all_steps(search.scene) == 4 * 11
    while not search.finished:
        assert search.most_steps() <= most - steps
        search.step()
        steps += 1
    assert search.most_steps() == 0
    assert list(search.reaches) == [2, 0, 1, 3]
    assert all(reach > 0 for reach in search.reaches.values())
    assert same(before, snapshot(network))


def test_resumed_search_ends_the_same() -> None:
    reference = finish(ReachSearch(new_scene(tried=[2, 0, 1])))
    search = ReachSearch(new_scene(tried=[2, 0, 1]))
    for _ in range(4):
        search.step()
    again = ReachSearch(new_scene(tried=[2, 0, 1]))
    again.load_state_dict(search.state_dict())
    assert finish(again).reaches == reference.reaches


@pytest.mark.parametrize(
    ("course", "expected"),
    [
        ([(0.0, 0.0), (0.02, 0.25), (0.04, 0.75)], 0.03),
        ([(0.0, 0.6)], 0.0),
        ([(0.0, 0.1), (0.02, 0.2)], math.inf),
    ],
)
def test_crossing_is_by_a_straight_line(course: list[tuple[float, float]], expected: float) -> None:
    assert _crossing(course, 0.5) == pytest.approx(expected)


def test_ratio_is_of_the_soonest_to_the_median_of_the_others() -> None:
    suspect, ratio, median = reach_ratio({0: 0.2, 1: 0.05, 2: 0.1, 3: 0.3})
    assert (suspect, ratio, median) == (1, pytest.approx(0.25), 0.2)
    longest = sum(0.03 * 1.25**step for step in range(10))
    assert reach_ratio({0: 0.01, 1: math.inf, 2: math.inf})[2] == pytest.approx(longest)


def test_a_first_batch_of_the_class_alone_changes_nothing_but_the_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    search = ReachSearch(new_scene(tried=[0, 1]))
    images, labels = images_and_labels()
    own = labels == 0
    with monkeypatch.context() as patch:
        patch.setattr(search.scene.data, "batch", lambda *_, **__: (images[own], labels[own]))
        search.step()
    finish(search)
    assert {tuple(each.shape) for each in search.perturbations.values()} == {(1, 1, 8, 8)}
    assert float(search.perturbations[0].std()) > 0  # not the same for all pixels


def test_an_unknown_reach_is_not_the_soonest() -> None:
    known = {0: 0.5, 1: 0.25, 2: 0.5}
    soonest, ratio, _ = reach_ratio({**known, 3: math.nan})
    assert (soonest, ratio) == (1, reach_ratio({**known, 3: math.inf})[1])


def test_a_reach_is_a_trace_and_no_signal() -> None:
    assert not issubclass(ReachSearch, SignalSearch)
    for normal, names in ((0.8, ["universal perturbation"]), (0.2, [])):
        search = ReachSearch(new_scene(constants=Constants(ReachConstants(normal=normal))))
        search.reaches = {0: 0.2, 1: 0.05, 2: 0.1, 3: 0.3}
        start = torch.zeros_like(search.scene.data.images[:1])
        search.perturbations = dict.fromkeys(range(4), start)
        assert [trace.name for trace in search.traces(1, {"reach": search})] == names
        assert search.traces(2, {}) == search.traces(None, {}) == []
        assert not search.failed
        search.reaches[2] = math.nan
        assert search.failed


def test_trace_adapts_within_its_length_and_goes_on_from_its_state() -> None:
    scene = new_scene(tried=range(3))
    ones = torch.ones(scene.masked.layers.total)

    def new() -> PerturbationTrace:
        reach, margin = ReachSearch(scene), MarginSearch(scene)
        reach.reaches = {0: 0.2, 1: 0.1, 2: 0.2}
        reach.perturbations = dict.fromkeys(range(3), torch.zeros_like(scene.data.images[:1]))
        margin.margins = dict.fromkeys(range(3), 9.0)
        [trace] = reach.traces(1, {"reach": reach, "margin": margin})
        assert isinstance(trace, PerturbationTrace)
        assert trace.pushed.limit == pytest.approx(0.6 * 0.2 * reach.scale)
        return trace

    trace = new()
    before = trace.margins(ones).mean()
    trace.adapt(ones, 0)
    assert trace.margins(ones).mean() > before
    assert float(trace.pushed.perturbation.norm()) <= trace.pushed.limit * (1 + 1e-5)
    again = new()
    again.load_state_dict(trace.state_dict())
    for each in (trace, again):
        each.adapt(ones, 1)
    assert torch.equal(trace.pushed.perturbation, again.pushed.perturbation)

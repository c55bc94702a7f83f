from __future__ import annotations

import math

import pytest
import torch
from helpers import finish, images_and_labels, new_scene, same, snapshot, trained_network

from lightning_mnp.config import Constants
from lightning_mnp.defense_data.defense_set import DefenseSet
from lightning_mnp.report import RunResult
from lightning_mnp.signals.logits import push_loss
from lightning_mnp.signals.margin import MarginSearch
from lightning_mnp.signals.perturbation import UniversalPerturbation
from lightning_mnp.signals.pile_up import PileUp
from lightning_mnp.signals.reach import (
    PerturbationTrace,
    ReachConstants,
    ReachSearch,
    _crossing,
    reach_ratio,
)
from lightning_mnp.signals.standout import StandoutConstants


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
        ([(0.0, 0.1), (0.02, math.nan)], math.nan),
    ],
)
def test_crossing_is_by_a_straight_line(course: list[tuple[float, float]], expected: float) -> None:
    assert _crossing(course, 0.5) == pytest.approx(expected, nan_ok=True)


def test_gradients_that_are_not_finite_leave_a_reach_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    search = ReachSearch(new_scene(tried=[2, 0, 1]))

    def spoiled(logits: torch.Tensor, labels: torch.Tensor, goals: torch.Tensor) -> torch.Tensor:
        rises = float("nan") if int(goals[0]) == 0 else 1.0
        return rises * push_loss(logits, labels, goals)

    monkeypatch.setattr("lightning_mnp.signals.perturbation.push_loss", spoiled)
    finish(search)
    assert {index for index, reach in search.reaches.items() if math.isnan(reach)} == {0}
    assert search.failed
    assert all(bool(found.isfinite().all()) for found in search.perturbations.values())


def test_images_that_are_all_the_same_have_some_reach() -> None:
    data = DefenseSet(torch.zeros(8, 1, 8, 8), torch.arange(8) % 4)
    search = finish(ReachSearch(new_scene(data=data)))
    assert len(search.reaches) == 4


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


def found_search(
    reaches: dict[int, float], predictions: tuple[int, ...], constants: Constants | None = None
) -> ReachSearch:
    """A search that has found these reaches, after one run with these predictions."""
    search = ReachSearch(new_scene(constants=constants))
    search.scene.runs.append(RunResult(0.5, 0.3, predictions, 9, 0.2, ""))
    search.reaches = reaches
    return search


PILED = (1, 2, 9, 3, 2, 1)  # the gap on class 2 is 6, the spread of the others 2
OTHERS = {0: 0.25, 1: 0.2, 3: 0.25, 4: 0.25, 5: 0.5}  # their inverses go from 2 to 5


@pytest.mark.parametrize(
    ("reach", "others", "value"),
    [
        (0.1, OTHERS, 5 / 3),
        (0.2, OTHERS, 0.0),
        # Others so even that a quarter of the median inverse is taken for their spread.
        (0.1, dict.fromkeys(OTHERS, 0.25), 6.0),
        # A first step cannot tell shorter ones, and none is longer than the longest.
        (0.0, OTHERS, (1 / 0.03 - 5) / 3),
        (0.1, {**OTHERS, 5: math.inf}, 5 / (5 - 1 / ReachConstants().longest)),
    ],
)
def test_signal_is_the_lesser_of_reach_and_pile_up(
    reach: float, others: dict[int, float], value: float
) -> None:
    search = found_search({2: reach, **others}, PILED)
    assert PileUp(search.scene).signal().strength == pytest.approx(3.0)
    signal = search.signal()
    counts_from = ReachConstants().counts_from
    assert (signal.name, signal.threshold, signal.decides) == ("reach", counts_from, True)
    assert signal.value == pytest.approx(value)
    assert signal.strength == pytest.approx(min(value / counts_from, 3.0))
    assert signal.classes == pytest.approx(search.nearness)
    assert signal.classes[0] == pytest.approx(4.0)
    if value:
        assert signal.reason == (
            "a perturbation of all images alike gets to class 2 soonest, where the gap to the next "
            f"class is {value:.2f} times the spread of the others (counts from {counts_from:g}, "
            "together with the pile-up, which points to the same class)"
        )


def test_nothing_counts_if_reach_and_pile_up_disagree() -> None:
    signal = found_search({**OTHERS, 2: 0.2, 3: 0.05}, PILED).signal()
    assert (signal.target_class, signal.strength) == (3, 0.0)
    assert signal.value == pytest.approx(15 / 3)
    assert "the pile-up, which points to class 2)" in signal.reason


@pytest.mark.parametrize("index", [0, 2])
def test_nothing_counts_if_a_reach_is_not_known(index: int) -> None:
    search = found_search({**OTHERS, 2: 0.1, index: math.nan}, PILED)
    assert search.failed
    signal = search.signal()
    assert (signal.strength, signal.value) == (0.0, 0.0)
    assert [where for where, near in signal.classes.items() if math.isnan(near)] == [index]


def test_constants_of_the_signal_can_be_varied() -> None:
    reaches = {2: 0.1, **OTHERS}
    strict = Constants(ReachConstants(counts_from=10.0))
    assert found_search(reaches, PILED, strict).signal().strength == pytest.approx(1 / 6)
    rough = Constants(StandoutConstants(least_spread=5.0))
    assert found_search(reaches, PILED, rough).signal().value == pytest.approx(5 / (5 * 4))


def test_a_short_reach_is_a_trace() -> None:
    for normal, names in ((0.8, ["universal perturbation"]), (0.2, [])):
        search = ReachSearch(new_scene(constants=Constants(ReachConstants(normal=normal))))
        search.reaches = {0: 0.2, 1: 0.05, 2: 0.1, 3: 0.3}
        start = torch.zeros_like(search.scene.data.images[:1])
        search.perturbations = dict.fromkeys(range(4), start)
        assert [trace.name for trace in search.traces(1, {"reach": search})] == names
        assert search.traces(2, {}) == search.traces(None, {}) == []
        assert not search.failed


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


def test_steps_grow_and_the_last_one_is_taken_in_any_case(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Lengths and limits that the search asks for, class by class."""
    constants = ReachConstants(step=0.02, growth=1.5, most_steps=3, level=0.6)
    search = ReachSearch(new_scene(tried=(0, 1), constants=Constants(constants)))
    asked: list[tuple[float, float]] = []

    def ascend(
        pushed: UniversalPerturbation,
        images: torch.Tensor,
        labels: torch.Tensor,
        length: float,
        masks: torch.Tensor | None = None,
        until: float = math.inf,
    ) -> float:
        asked.append((length / search.scale, until))
        return 0.0

    monkeypatch.setattr(UniversalPerturbation, "ascend", ascend)
    finish(search)
    most = constants.most_steps
    lengths = [0.02 * 1.5**step for step in range(most + 1)]
    assert [length for length, _ in asked] == pytest.approx(lengths * 2)
    assert [until for _, until in asked] == [*[0.6] * most, 0.0] * 2
    assert search.reaches == {0: math.inf, 1: math.inf}


def test_a_trace_follows_by_steps_of_a_share_of_its_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene, asked = new_scene(), list[float]()
    ones = torch.ones(scene.masked.layers.total)
    pushed = UniversalPerturbation(
        scene.masked, 1, torch.zeros_like(scene.data.images[:1]), limit=3.0
    )
    constants = ReachConstants(share=0.25, first_steps=4, next_steps=2, images=5)
    images = scene.data.images[:8]
    trace = PerturbationTrace(
        pushed, images, torch.zeros(8, dtype=torch.long), 0, Constants(constants)
    )

    def ascend(
        images: torch.Tensor, labels: torch.Tensor, length: float, masks: torch.Tensor
    ) -> float:
        assert len(images) == len(labels) == 5
        asked.append(length)
        return 0.0

    monkeypatch.setattr(pushed, "ascend", ascend)
    trace.adapt(ones, 0)
    assert asked == [0.75] * 4
    trace.adapt(ones, 8)
    assert asked == [0.75] * 6

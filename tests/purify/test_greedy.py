from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from helpers import goals_of, images_and_labels, same, snapshot, trained_network

from lightning_mnp.config import Constants
from lightning_mnp.defense_data.defense_set import DefenseSet
from lightning_mnp.purify.greedy import GreedyConstants, GreedyPruning
from lightning_mnp.purify.harm import CleanHarm
from lightning_mnp.signals.pile_up import SuppressedTrace
from lightning_mnp.surgery.layers import find_filter_layers
from lightning_mnp.surgery.masked_network import MaskedNetwork

# Filters one by one, as long as harm allows.
ONE_BY_ONE = GreedyConstants(harmless=-1.0, gone_at=0.0)
# Up to four at a time, as long as harm allows.
TOGETHER = GreedyConstants(harmless=50.0, gone_at=0.0)


def new_search(
    most: int = 3,
    harm: float = 0.5,
    target: int = 1,
    constants: GreedyConstants = ONE_BY_ONE,
) -> GreedyPruning:
    network = trained_network()
    data = DefenseSet(*images_and_labels())
    masked = MaskedNetwork(network, find_filter_layers(network, data.images[:2]))
    # Weights that have been noised stand for suppressed ones.
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: weight + 0.3 * weight.abs().mean() * torch.randn(weight.shape, generator=generator)
        for name, weight in masked.weights().items()
    }
    trace = SuppressedTrace(masked, [weights], data.images, goals_of(data.images, target))
    clean = [data, data.augmented("crop", seed=0)]
    given = Constants(constants)
    return GreedyPruning(masked, clean, [trace], most, harm, 16, 0, constants=given)


def finish(search: GreedyPruning) -> GreedyPruning:
    for _ in range(500):
        if search.stopped:
            return search
        search.step()
    raise AssertionError("greedy pruning does not end")


def test_search_ends_at_the_most_filters() -> None:
    search = finish(new_search(most=2, harm=50.0))
    assert len(search.taken) == 2
    assert "the most filters, 2," in search.stopped
    assert len(search.curve) == 3


def test_without_candidates_no_filter_is_taken() -> None:
    search = finish(new_search(constants=GreedyConstants(candidates=0, rejected=0)))
    assert (search.taken, search.counts) == ([], [0])
    assert search.stopped.startswith("more filters would do more harm")


def test_search_lowers_the_margins() -> None:
    search = finish(new_search(most=4, harm=50.0))
    levels = [point[1] for point in search.curve]
    assert levels[0] == pytest.approx(1.0) or levels[0] < 1.0
    assert levels[-1] < levels[0]


@pytest.mark.parametrize("constants", [ONE_BY_ONE, TOGETHER])
def test_harm_of_each_number_of_filters_is_on_the_curve(constants: GreedyConstants) -> None:
    search = finish(new_search(most=6, harm=50.0, constants=constants))
    assert len(search.counts) == (7 if constants == ONE_BY_ONE else 3)
    harm = CleanHarm(search.masked, search.clean, 16)
    for count, point in zip(search.counts, search.curve, strict=True):
        masks = torch.ones_like(search.masks())
        masks[search.taken[:count]] = 0.0
        assert point[0] == pytest.approx(harm.of(masks), abs=1e-5)
        assert search.harm_of(masks) == pytest.approx(harm.of(masks), abs=1e-5)


@pytest.mark.parametrize("constants", [ONE_BY_ONE, TOGETHER])
@pytest.mark.parametrize("harm", [0.001, 0.05])
def test_harm_never_rises_above_the_allowance(harm: float, constants: GreedyConstants) -> None:
    search = finish(new_search(most=8, harm=harm, constants=constants))
    rises = [point[0] for point in search.curve]
    for index, rise in enumerate(rises):
        assert rise - min(rises[: index + 1]) <= harm + 1e-6
    assert search.stopped


def test_a_small_allowance_ends_the_search_and_a_large_one_does_not() -> None:
    strict, lenient = (finish(new_search(m, h)) for m, h in ((50, 1e-6), (6, 50.0)))
    assert "more filters would do more harm than 1e-06 nats" in strict.stopped
    assert "more harm" not in lenient.stopped


@pytest.mark.parametrize(
    ("levels", "decides", "most"),
    [
        ([(0.0, 1.0, 1.0), (0.1, 0.2, 0.0)], (True, True), 0.4),
        ([(0.0, 1.0, 1.0), (0.1, 0.1, 0.0)], (True, True), 0.2),  # 0.1 and a quarter of 0.4
        ([(0.0, 1.0, 1.0), (0.1, 0.1, 0.0), (0.15, 0.3, 0.0)], (True, True), 0.2),
        ([(0.0, 1.0, 1.0), (0.1, 0.1, 0.9)], (True, False), 0.2),
        ([(0.0, 1.0, 1.0), (0.1, 0.0, 0.0)], (False, False), 0.4),
        ([(0.0, 1.0, 1.0), (0.1, math.nan, 0.0)], (True, True), 0.4),
        ([(0.0, 1.0, 1.0), (-0.3, 0.5, 0.5), (0.0, 0.1, 0.1)], (True, True), 0.1),  # 0.4 above -0.3
    ],
)
def test_a_quarter_is_allowed_from_when_the_deciding_traces_show_little(
    levels: list[tuple[float, ...]], decides: tuple[bool, ...], most: float
) -> None:
    search = new_search(harm=0.4)
    search.traces = [copy.copy(search.traces[0]) for _ in decides]
    for trace, each in zip(search.traces, decides, strict=True):
        trace.decides = each
    search.references = [1.0] * len(decides)
    search.curve = list(levels)
    assert search._most_harm() == pytest.approx(most)


def test_first_order_effect_is_the_slope_of_the_margins() -> None:
    search = new_search()
    search.step()
    _, effect = search._promise()
    index = int(effect.argmax())
    trace, reference = search.traces[0], search.references[0]
    levels = []
    for change in (-1e-2, 1e-2):
        masks = search.masks()
        masks[index] += change
        levels.append(float(trace.margins(masks).clamp_min(-1.0).mean()))
    expected = (levels[1] - levels[0]) / 2e-2 / reference
    assert float(effect[index]) == pytest.approx(expected, rel=0.1)


def test_nothing_more_is_taken_when_the_backdoor_is_gone() -> None:
    search = new_search(most=3, harm=50.0)
    search.constants = GreedyConstants(harmless=-1.0, gone_at=0.1, again=0.0)
    search.step()
    quiet, loud = copy.copy(search.traces[0]), search.traces[0]
    quiet.decides = False
    search.traces, search.references = [loud, quiet], [1.0, 1.0]
    search.taken, search.counts = [0], [0, 1]
    search.curve = [(0.0, 1.0, 1.0), (0.0, 0.1, 1.0)]
    assert search.step()["filters"] == 1.0
    assert search.stopped == "the traces were gone, and as many filters again were taken"
    search.stopped, search.curve = "", [(0.0, 1.0, 1.0), (0.0, 0.11, 0.0)]
    search.traces = [loud, loud]
    assert search.step()["filters"] == 2.0
    search.curve[-1] = (0.0, 0.0, 0.0)
    search.constants = ONE_BY_ONE
    assert search.step()["filters"] == 3.0


def test_as_many_filters_again_are_taken_when_the_backdoor_is_gone() -> None:
    search = new_search(most=9, harm=50.0)
    search.constants = GreedyConstants(harmless=-1.0)
    search.step()
    search.taken, search.counts = [0, 1], [0, 1, 2]
    search.curve = [(0.0, 1.0), (0.0, 0.3), (0.0, 0.05)]
    assert search.step()["filters"] == 3.0
    search.curve[-1] = (0.0, 0.9)  # gone is gone: else a trace that comes back never ends
    assert search.step()["filters"] == 4.0
    assert search.step()["filters"] == 4.0
    assert search.stopped == "the traces were gone, and as many filters again were taken"


def test_a_trace_that_is_not_known_is_not_gone() -> None:
    search = new_search(most=3, harm=50.0)
    search.constants = GreedyConstants(harmless=-1.0, again=0.0)
    search.step()
    search.traces, search.references = [search.traces[0]] * 2, [1.0, 1.0]
    search.taken, search.counts = [0], [0, 1]
    search.curve = [(0.0, 1.0, 1.0), (0.0, 0.05, math.nan)]
    assert search.step()["filters"] == 2.0


def test_filters_that_do_next_to_no_harm_go_together() -> None:
    search = new_search(most=7, harm=50.0, constants=TOGETHER)
    search.step()
    promise, _ = search._promise()
    best = promise.argsort(descending=True, stable=True)[:4].tolist()
    assert search.step()["filters"] == 4.0
    assert search.taken == best
    assert search.curve[-1][0] == pytest.approx(search.harm_of(search.masks()), abs=1e-6)
    assert search.step()["filters"] == 7.0  # no more than may go
    assert search.counts == [0, 4, 7]


def test_what_a_glance_takes_for_harmless_is_measured_on_all_images() -> None:
    search = new_search(most=7, harm=50.0, constants=TOGETHER)
    search.step()
    search._glance.of = lambda masks: 0.0  # type: ignore[method-assign]
    search.constants = replace(TOGETHER, harmless=1e-9)
    assert search.step()["filters"] == 1.0


def test_a_glance_that_cannot_be_told_rejects(monkeypatch: pytest.MonkeyPatch) -> None:
    search = new_search(most=3, harm=50.0)
    search.step()
    monkeypatch.setattr(search._glance, "of", lambda masks: math.nan)
    monkeypatch.setattr(search, "harm_of", lambda masks: pytest.fail("measured on all images"))
    search.step()
    assert search.taken == []
    assert "more filters would do more harm" in search.stopped


def test_slopes_are_taken_once_for_each_number_of_filters() -> None:
    search = new_search(most=3, harm=1e-9)
    search.step()
    slope, taken = search._clean_slope, []
    search._clean_slope = lambda: taken.append(1) or slope()  # type: ignore
    search.step()  # rejects one filter after the other
    assert len(search._rejected) > 4
    assert taken == [1]


def test_a_glance_measures_the_same_harm_as_all_images() -> None:
    search = new_search(constants=replace(ONE_BY_ONE, glance_images=8))
    assert len(search.clean[-1]) > 8
    assert search._glance._share == pytest.approx(search._measure._share)


def test_filters_that_would_empty_a_layer_do_not_go_together() -> None:
    search = new_search(most=9, harm=1e9, constants=GreedyConstants(harmless=1e9, gone_at=0.0))
    search.step()
    layers = search.masked.layers
    name = layers.locate(0)[0]
    whole = [p for p in range(layers.total) if layers.locate(p)[0] == name]
    search.constants = GreedyConstants(harmless=1e9, candidates=len(whole))
    promise = torch.zeros(layers.total)
    promise[whole] = torch.arange(len(whole), 0, -1).float()
    search._promise = lambda: (promise, promise)  # type: ignore[method-assign]
    best = search._best()
    assert best is not None
    assert len(best[0]) == 1


def test_a_glance_is_on_few_images_and_only_what_passes_is_measured_on_all() -> None:
    few = GreedyConstants(harmless=-1.0, gone_at=0.0, glance_images=8)
    search = new_search(most=2, harm=0.9, constants=few)
    search.step()
    measured = []
    of, look = search._measure.of, search._glance.of
    search._measure.of = lambda masks: measured.append("all") or of(masks)  # type: ignore
    search._glance.of = lambda masks: measured.append("few") or look(masks)  # type: ignore
    search.step()
    # The network as it is, all four together and each of them; then the best one.
    assert measured == ["few"] * 6 + ["all"]
    assert len(search._glance.clean[0]) == 8
    measured.clear()
    search._glance.of = lambda masks: float((masks == 0).sum())  # type: ignore
    search.step()
    assert "all" not in measured
    assert "more harm" in search.stopped


@pytest.mark.parametrize(
    "constants", [ONE_BY_ONE, GreedyConstants(harmless=50.0, candidates=2, gone_at=0.9)]
)
def test_resumed_search_takes_the_same_filters(constants: GreedyConstants) -> None:
    reference = finish(new_search(most=6, harm=0.2, constants=constants))
    search = new_search(most=6, harm=0.2, constants=constants)
    search.step()
    search._rejected[3] = 0
    search.step()
    assert search.taken
    again = new_search(most=6, harm=0.2, constants=constants)
    finish(again)  # what it knew before is of no account
    again.load_state_dict(search.state_dict())
    assert again._rejected == search._rejected
    assert finish(again).taken == finish(search).taken
    assert (again.curve, again.counts) == (search.curve, search.counts)
    assert again.stopped == search.stopped
    if search.taken == reference.taken:
        assert search.curve == reference.curve


def test_network_is_left_as_it_was() -> None:
    search = new_search()
    before = snapshot(search.masked.network)
    search.step()
    search.step()
    assert same(before, snapshot(search.masked.network))


def test_filter_whose_harm_cannot_be_told_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    search = new_search(most=3, harm=50.0)
    search.step()
    monkeypatch.setattr(search, "harm_of", lambda masks: math.nan)
    for _ in range(10):
        search.step()
    assert search.taken == []
    assert "more filters would do more harm" in search.stopped


def test_the_last_filter_of_a_layer_is_never_taken() -> None:
    search = new_search(most=1, harm=1e9)
    search.step()
    layers = search.masked.layers
    best = search._best()
    assert best is not None
    [last] = best[0]
    name, _ = layers.locate(last)
    others = [p for p in range(layers.total) if layers.locate(p)[0] == name and p != last]
    search.taken += others
    search._promise = lambda: tuple(torch.eye(layers.total)[last] for _ in range(2))  # type: ignore
    assert search._best() is None
    assert search.spared == [last]
    again = new_search()
    again.load_state_dict(search.state_dict())
    assert again.spared == [last]
    assert not again._promise()[1][last]


@pytest.mark.parametrize("unknown", [slice(0, 6), slice(None)])
def test_filters_of_unknown_promise_do_not_hold_up_the_search(
    unknown: slice, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = new_search(most=2, harm=50.0)
    slope_of = search._clean_slope

    def slope() -> torch.Tensor:
        values = slope_of()
        values[unknown] = math.nan
        return values

    monkeypatch.setattr(search, "_clean_slope", slope)
    finish(search)
    assert not set(search.taken) & set(range(search.masks().numel())[unknown])

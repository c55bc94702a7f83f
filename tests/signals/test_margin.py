from __future__ import annotations

import math

import pytest
import torch
from helpers import finish, new_scene, same, snapshot

from lightning_mnp.signals.margin import MarginSearch, MarginTrace, margin_ratio


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

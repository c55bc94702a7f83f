from __future__ import annotations

import math

import pytest
import torch
from helpers import images_and_labels, same, snapshot, trained_network

from lightning_mnp.signals.margin import MarginSearch, class_margins, margin_ratio
from lightning_mnp.surgery.layers import find_filter_layers
from lightning_mnp.surgery.masked_network import MaskedNetwork


def new_search(classes: tuple[int, ...] = (0, 1), seed: int = 0) -> MarginSearch:
    network = trained_network()
    images, _ = images_and_labels()
    return MarginSearch(
        MaskedNetwork(network, find_filter_layers(network, images[:2])), images, classes, seed
    )


def finish(search: MarginSearch) -> MarginSearch:
    while not search.finished:
        search.step()
    return search


def test_margins_are_those_of_the_formula() -> None:
    logits = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    classes = torch.arange(20) % 5
    for row, index, margin in zip(logits, classes, class_margins(logits, classes), strict=True):
        others = [float(value) for k, value in enumerate(row) if k != index]
        assert float(margin) == pytest.approx(float(row[index]) - max(others), abs=1e-6)


def test_margins_grow_and_images_stay_in_their_range() -> None:
    search = new_search()
    first = search.step()["margin"]
    ascent = search._ascent
    assert ascent is not None
    finish(search)
    assert max(search.margins.values()) > first
    assert (ascent.images >= search.data.amin((0, 2, 3), keepdim=True)).all()
    assert (ascent.images <= search.data.amax((0, 2, 3), keepdim=True)).all()
    assert ascent.images.ne(ascent.images.clone().fill_(0)).any()


def test_margins_are_the_same_for_a_seed_and_in_any_order_of_steps() -> None:
    reference = finish(new_search()).margins
    search = new_search()
    for _ in range(7):
        search.step()
    again = new_search(classes=())
    again.load_state_dict(search.state_dict())
    assert finish(again).margins == reference


def test_network_is_left_as_it_was() -> None:
    search = new_search()
    before = snapshot(search.masked.network)
    search.step()
    assert same(before, snapshot(search.masked.network))


def test_a_shortcut_to_a_class_stands_out() -> None:
    """A filter that nothing in the data excites drives class 1 further than any image does."""
    search = new_search()
    plain = finish(search).margins
    network = search.masked.network
    last = [module for module in network.modules() if isinstance(module, torch.nn.Linear)][-1]
    with torch.no_grad():
        last.weight[1] *= 20
    assert finish(new_search_of(network)).margins[1] > 3 * plain[1]


def new_search_of(network: torch.nn.Module) -> MarginSearch:
    images, _ = images_and_labels()
    return MarginSearch(
        MaskedNetwork(network, find_filter_layers(network, images[:2])), images, (0, 1), 0
    )


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

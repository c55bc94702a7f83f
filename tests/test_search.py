from __future__ import annotations

import pytest
import torch
from helpers import images_and_labels, same, snapshot, trained_network
from torch.nn import functional as F

from lightning_mnp.defense_set import DefenseSet
from lightning_mnp.layers import find_filter_layers
from lightning_mnp.search import TriggerSearch
from lightning_mnp.subject import Subject
from lightning_mnp.surrogate import image_scale


def new_search(most: int = 6, unit: float = 20.0, seed: int = 0) -> TriggerSearch:
    network = trained_network()
    data = DefenseSet(*images_and_labels())
    subject = Subject(network, find_filter_layers(network, data.images[:2]))
    start = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    # The toy network's classes are far apart, so the unit is larger than for real images.
    scale = unit * image_scale(data.images)
    return TriggerSearch(subject, data, 1, start, 0.05, scale, most, 16, seed)


def finish(search: TriggerSearch) -> TriggerSearch:
    while not search.stopped:
        search.step()
    return search


def test_search_ends_at_the_most_filters() -> None:
    search = finish(new_search(most=3, unit=20.0))
    assert len(search.taken) <= 3
    assert search.stopped
    assert len(search.curve) == len(search.taken) + 1


def test_search_lowers_the_margins_of_its_triggers() -> None:
    search = new_search(unit=20.0)
    before = search._margins()
    assert max(search.curve[0][1:]) > search.enough, "a trigger that does not work tests nothing"
    search.step()
    assert len(search.taken) == 1
    masks = search.masks()
    assert masks.sum() == len(masks) - 1
    assert sum(search._margins()) < sum(before)


def test_harm_is_the_rise_of_the_clean_loss() -> None:
    search = new_search(unit=20.0)
    search.step()
    images, labels = search.data.images, search.data.labels
    losses = [
        float(F.cross_entropy(search.subject(images, masks=m, statistics="running"), labels))
        for m in (None, search.masks())
    ]
    assert search.curve[1][0] == pytest.approx(losses[1] - losses[0], abs=1e-5)


def test_first_order_effect_is_the_slope_of_the_margin() -> None:
    """Against finite differences of the same quantity."""
    search = new_search(unit=20.0)
    trigger = search.triggers[0]
    slope, margin = search._slope(search._pairs(), trigger)
    assert margin == pytest.approx(search._margins()[0], rel=1e-4)
    index = int(slope.abs().argmax())
    values = []
    for step in (-1e-2, 1e-2):
        masks = search.masks()
        masks[index] += step
        values.append(
            sum(trigger.margin(x, y, masks) * len(y) for x, y in search._pairs())
            / len(search._labels)
        )
    assert float(slope[index]) == pytest.approx((values[1] - values[0]) / 2e-2, rel=0.05)


def test_nothing_to_do_where_triggers_do_not_work() -> None:
    search = new_search(unit=1e-4)
    assert "less than 20%" in search.stopped
    assert search.taken == []
    assert search.step()["filters"] == 0.0


def test_images_of_the_target_class_are_left_out() -> None:
    assert 1 not in new_search()._labels


def test_resumed_search_takes_the_same_filters() -> None:
    reference = finish(new_search(unit=20.0))
    search = new_search(unit=20.0)
    search.step()
    again = new_search(unit=20.0)
    again.load_state_dict(search.state_dict())
    assert finish(again).taken == reference.taken
    assert again.curve == reference.curve


def test_network_is_left_as_it_was() -> None:
    search = new_search(unit=20.0)
    before = snapshot(search.subject.network)
    search.step()
    assert same(before, snapshot(search.subject.network))

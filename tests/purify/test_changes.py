from __future__ import annotations

import torch
from helpers import images_and_labels, same, snapshot, trained_network

from lightning_mnp.purify.changes import Changes
from lightning_mnp.surgery.layers import find_filter_layers
from lightning_mnp.surgery.logit_shift import LogitShift
from lightning_mnp.surgery.masked_network import MaskedNetwork


def new_changes(weights_only: bool = False) -> Changes:
    network = trained_network()
    layers = find_filter_layers(network, images_and_labels()[0][:2])
    return Changes(MaskedNetwork(network, layers), weights_only)


def changed(changes: Changes) -> Changes:
    """Make every kind of change at once."""
    kernels = changes.masked.kernels
    changes.removed = torch.tensor([3, 1])
    changes.kernel_masks = torch.linspace(0.5, 1.0, kernels.total)
    weights = changes.turned_down()
    changes.tuned = {each.weight: weights[each.weight] * 1.01 for each in kernels.layers}
    changes.tuned_by = 0.1
    changes.shift = LogitShift("fc.bias", torch.tensor([0.0, 1.0, -1.0, 0.5]))
    return changes


def test_nothing_is_changed_at_first() -> None:
    changes = new_changes()
    before = snapshot(changes.masked.network)
    assert changes.filter_masks().eq(1).all()
    assert changes.left() == {}
    assert not changes.any
    changes.apply(changes.masked.network)
    assert same(before, snapshot(changes.masked.network))


def test_each_kind_of_change_counts_but_the_shift() -> None:
    whole = changed(new_changes())
    for name, counts in (("removed", True), ("kernel_masks", True), ("tuned", True)):
        changes = new_changes()
        setattr(changes, name, getattr(whole, name))
        assert changes.any is counts
    changes = new_changes()
    changes.shift = whole.shift
    assert not changes.any


def test_what_is_left_of_each_filter() -> None:
    changes = new_changes()
    changes.kernel_masks = torch.full((changes.masked.kernels.total,), 0.5)
    changes.removed = torch.tensor([3, 1])
    found = changes.filter_masks()
    assert found[[1, 3]].tolist() == [0.0, 0.0]
    assert found.sum() == len(found) - 2
    first, *others = changes.left().values()
    assert first == [0.0 if index in (1, 3) else 0.5 for index in range(len(first))]
    assert {value for part in others for value in part} == {0.5}


def test_a_call_gives_what_the_changed_network_gives() -> None:
    images = images_and_labels()[0]
    for weights_only in (False, True):
        changes = changed(new_changes(weights_only))
        network, shift = changes.masked.network, changes.shift
        assert shift is not None
        with torch.no_grad():
            logits = changes.masked(images, statistics="running", **changes.call())
            plain = network(images)
            pruning = changes.apply(network)
            torch.testing.assert_close(network(images), logits + shift.values, rtol=1e-4, atol=1e-4)
            pruning.undo(network)
            assert network(images).equal(plain)


def test_the_state_is_all_that_was_found() -> None:
    found, again = changed(new_changes()), new_changes()
    found.cut = torch.tensor([5, 2])
    again.load_state_dict({**found.state_dict(), "more": "of others"})
    assert again.removed.equal(found.removed)
    assert again.cut.equal(found.cut)
    assert again.tuned_by == found.tuned_by
    for name in ("kernel_masks", "tuned", "shift"):
        assert getattr(again, name) is not None
    first, second = again.call(), found.call()
    assert first["masks"].equal(second["masks"])
    assert all(first["weights"][k].equal(weight) for k, weight in second["weights"].items())
    assert again.shift is not None
    assert found.shift is not None
    assert again.shift.values.equal(found.shift.values)
    again.load_state_dict(new_changes().state_dict())
    assert not again.any
    assert again.shift is None

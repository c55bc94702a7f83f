from __future__ import annotations

import pytest
import torch
from helpers import images_and_labels, same, snapshot, trained_network
from torch import nn

from lightning_mnp.surgery.forward import call_network
from lightning_mnp.surgery.layers import find_filter_layers
from lightning_mnp.surgery.logit_shift import LogitShift, find_logit_bias
from lightning_mnp.surgery.masked_network import MaskedNetwork
from lightning_mnp.surgery.masks import FilterMasks
from lightning_mnp.surgery.prune import prune, without_filters


def test_pruned_network_computes_what_the_masked_one_does() -> None:
    network = trained_network().double()
    images = images_and_labels()[0].double()
    layers = find_filter_layers(network, images[:2])
    positions = torch.tensor([0, 5, 77, 87])
    masks = torch.ones(layers.total, dtype=torch.float64)
    masks[positions] = 0
    with FilterMasks(network, layers, masks):
        expected = network(images)
    pruning = prune(network, layers, positions)
    torch.testing.assert_close(network(images), expected)
    assert pruning.pruned == [layers.locate(int(position)) for position in positions]


@pytest.mark.parametrize("weights_only", [False, True])
def test_kernels_that_are_turned_down(weights_only: bool) -> None:
    network = trained_network().double()
    images = images_and_labels()[0].double()
    layers = find_filter_layers(network, images[:2])
    masked, before = MaskedNetwork(network, layers), snapshot(network)
    kernel_masks = torch.rand(masked.kernels.total, dtype=torch.float64)
    positions = torch.tensor([0, 77])
    weights = masked.kernels.scaled(masked.weights(), kernel_masks)
    call = {"weights": weights, "masks": torch.ones(layers.total).index_fill(0, positions, 0.0)}
    if weights_only:
        call = {"weights": {**weights, **without_filters(layers, weights, positions)}}
    expected = masked(images, statistics="running", **call)
    given = kernel_masks.clone()
    pruning = prune(
        network, layers, positions, weights_only=weights_only, kernel_masks=kernel_masks
    )
    torch.testing.assert_close(network(images).float(), expected)
    assert kernel_masks.equal(given)
    pruning.undo(network)
    assert same(before, snapshot(network))


def test_weights_that_replace_others() -> None:
    network = trained_network()
    images = images_and_labels()[0]
    layers = find_filter_layers(network, images[:2])
    masked, before = MaskedNetwork(network, layers), snapshot(network)
    given = {"fc.weight": masked.weights()["fc.weight"] + 1.0}
    positions = torch.tensor([0, 77])
    filters = torch.ones(layers.total).index_fill(0, positions, 0.0)
    weights = {**masked.weights(), **given}
    expected = masked(images, weights=weights, masks=filters, statistics="running")
    kernel_masks = torch.rand(masked.kernels.total)  # are part of the weights already
    pruning = prune(network, layers, positions, kernel_masks=kernel_masks, weights=given)
    torch.testing.assert_close(network(images), expected)
    pruning.undo(network)
    assert same(before, snapshot(network))


def test_undo_is_exact() -> None:
    network = trained_network()
    layers = find_filter_layers(network, images_and_labels()[0][:2])
    before = snapshot(network)
    pruning = prune(network, layers, torch.arange(40))
    assert not same(before, snapshot(network))
    pruning.undo(network)
    assert same(before, snapshot(network))


def test_position_out_of_range_changes_nothing() -> None:
    network = trained_network()
    layers = find_filter_layers(network, images_and_labels()[0][:2])
    before = snapshot(network)
    with pytest.raises(IndexError, match="from 0 to 87, but got 88"):
        prune(network, layers, torch.tensor([3, 88]))
    assert same(before, snapshot(network))


def test_a_shift_of_the_logits_comes_and_goes_with_the_pruning() -> None:
    network = trained_network()
    images, _ = images_and_labels()
    layers = find_filter_layers(network, images[:2])
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    name = find_logit_bias(network, images[:2], call_network)
    assert name is not None
    with torch.no_grad():
        plain = prune(network, layers, torch.tensor([1]))
        expected = network(images) + torch.tensor([0.5, 0.0, -1.0, 2.0])
        plain.undo(network)
        shift = LogitShift(name, torch.tensor([0.5, 0.0, -1.0, 2.0]))
        pruning = prune(network, layers, torch.tensor([1]), shift)
        assert torch.allclose(network(images), expected, atol=1e-5)
    pruning.undo(network)
    assert all(before[name].equal(tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_pruning_is_undone(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = trained_network()
    images, _ = images_and_labels()
    layers = find_filter_layers(network, images[:2])
    name = find_logit_bias(network, images[:2], call_network)
    assert name is not None
    before, bake = snapshot(network), FilterMasks.bake

    def interrupted(masks: FilterMasks) -> None:
        bake(masks)
        assert not same(before, snapshot(network))
        raise error

    monkeypatch.setattr(FilterMasks, "bake", interrupted)
    with pytest.raises(error):
        prune(network, layers, torch.arange(40), LogitShift(name, torch.ones(4)))
    assert same(before, snapshot(network))


def test_weights_alone_leave_what_stands_behind_them() -> None:
    network = trained_network()
    layers = find_filter_layers(network, images_and_labels()[0][:2])
    before = snapshot(network)
    pruning = prune(network, layers, torch.tensor([1, 2]), weights_only=True)
    changed = {
        name for name, t in network.state_dict().items() if not t.equal(before["tensors"][name])
    }
    assert changed == {"conv1.weight"}
    assert not network.conv1.weight[[1, 2]].any()
    assert network.conv1.weight[[0, 3]].equal(before["tensors"]["conv1.weight"][[0, 3]])
    pruning.undo(network)
    assert same(before, snapshot(network))


def test_weights_without_filters_of_transposed_layers() -> None:
    network = nn.Sequential(nn.ConvTranspose2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(36, 2))
    layers = find_filter_layers(network, torch.rand(2, 2, 1, 1))
    weights = dict(network.named_parameters())
    [(name, weight)] = without_filters(layers, weights, torch.tensor([3])).items()
    assert name == "0.weight"
    assert not weight[1, 1].any()  # the second group's second filter
    assert weight[0].equal(network[0].weight[0])
    assert weight[1, 0].equal(network[0].weight[1, 0])

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from lightning_mnp.surgery.kernels import Kernels, find_kernels
from lightning_mnp.surgery.layers import find_filter_layers
from lightning_mnp.surgery.masked_network import MaskedNetwork

LAYERS = [
    nn.Conv2d(4, 6, 3),
    nn.Conv2d(4, 6, 3, groups=2),
    nn.Conv2d(4, 4, 3, groups=4),
    nn.ConvTranspose2d(4, 6, 3),
    nn.ConvTranspose2d(4, 6, 3, groups=2),
    nn.Linear(5, 3),
]


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


def looped(layer: nn.Module, weight: Tensor, masks: Tensor) -> Tensor:
    """The same as `scaled`, one kernel after the other."""
    found, number = weight.clone(), 0
    for first in range(weight.shape[0]):
        for second in range(weight.shape[1]):
            found[first, second] *= masks[number]
            number += 1
    return found


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_each_kernel_is_multiplied_by_its_mask(layer: nn.Module) -> None:
    kernels, weights = find_kernels(layer), weights_of(layer)
    masks = torch.rand(kernels.total)
    changed = kernels.scaled(weights, masks)
    torch.testing.assert_close(changed["weight"], looped(layer, weights["weight"], masks))
    assert changed["bias"] is weights["bias"]
    assert weights["weight"].equal(weights_of(layer)["weight"])


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_what_is_left_is_that_of_each_output(layer: nn.Module) -> None:
    kernels, weights = find_kernels(layer), weights_of(layer)
    masks = torch.rand(kernels.total)
    [left] = kernels.left(weights, masks).values()
    weight, changed = weights["weight"], looped(layer, weights["weight"], masks)
    groups = getattr(layer, "groups", 1)
    if isinstance(layer, nn.ConvTranspose2d):
        parts = zip(weight.chunk(groups), changed.chunk(groups), strict=True)
        pairs = [
            (whole[:, index], rest[:, index])
            for whole, rest in parts
            for index in range(whole.shape[1])
        ]
    else:
        pairs = list(zip(weight, changed, strict=True))
    expected = [float(rest.abs().sum() / whole.abs().sum()) for whole, rest in pairs]
    assert left == pytest.approx(expected)


def test_nothing_is_missing_from_a_filter_of_zeros() -> None:
    layer = nn.Linear(2, 2)
    kernels = find_kernels(layer)
    weights = {"weight": torch.tensor([[0.0, 0.0], [1.0, 3.0]])}
    assert kernels.left(weights, torch.tensor([0.0, 1.0, 1.0, 0.0])) == {"": [1.0, 0.25]}


def test_masks_have_gradients() -> None:
    layer = nn.Linear(2, 1)
    masks = torch.ones(2, requires_grad=True)
    find_kernels(layer).scaled(weights_of(layer), masks)["weight"].sum().backward()
    assert masks.grad is not None
    torch.testing.assert_close(masks.grad, layer.weight[0].detach())


def test_a_weight_in_half_precision_stays_so() -> None:
    layer = nn.Linear(2, 1).bfloat16()
    changed = find_kernels(layer).scaled(weights_of(layer), torch.ones(2))
    assert changed["weight"].dtype == torch.bfloat16
    kept = find_kernels(layer).left(weights_of(layer), torch.tensor([1.0, 0.0]))[""]
    weight = layer.weight.detach().float().abs()[0]
    assert kept == pytest.approx([float(weight[0] / weight.sum())])


def test_shared_weights_are_there_once_and_computed_ones_never() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), weight_norm(nn.Linear(2, 2)))
    network[1].weight = network[0].weight
    assert [layer.weight for layer in find_kernels(network).layers] == ["0.weight"]


def test_layers_that_are_left_out_by_name_have_none() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(2, 3))
    layers = find_filter_layers(network, torch.rand(2, 1, 5, 5), exclude=["0"])
    assert [layer.name for layer in find_kernels(network, layers).layers] == ["1", "3"]
    layers = find_filter_layers(network, torch.rand(2, 1, 5, 5), include=["0"])
    assert [layer.name for layer in find_kernels(network, layers).layers] == ["0"]


def test_computed_weights_are_not_computed() -> None:
    layer = spectral_norm(nn.Linear(2, 2)).train()
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    assert find_kernels(layer).layers == ()
    assert all(buffer.equal(before[name]) for name, buffer in layer.named_buffers())


def test_objects_made_of_a_masked_network_share_its_masks() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)).eval()
    images = torch.rand(2, 1, 4, 4)
    masked = MaskedNetwork(network, find_filter_layers(network, images))
    before = masked.with_raised({})
    with masked.masking_kernels(torch.zeros(masked.kernels.total)):
        expected = masked(images)
        assert before(images).equal(expected)
        assert masked.with_raised({}).without_autocast()(images).equal(expected)


def test_a_network_without_any_layer_has_no_kernels() -> None:
    kernels = find_kernels(nn.ReLU())
    assert kernels == Kernels(())
    assert kernels.scaled({}, torch.ones(0)) == {}


def test_masked_network_runs_with_masks_on_kernels_for_a_while() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)).eval()
    images = torch.rand(2, 1, 4, 4)
    masked = MaskedNetwork(network, find_filter_layers(network, images))
    masks = torch.rand(masked.kernels.total)
    plain = masked(images)
    expected = masked(images, weights=masked.kernels.scaled(masked.weights(), masks))
    with masked.masking_kernels(masks):
        assert masked(images).equal(expected)
        with masked.masking_kernels(None):
            assert masked(images).equal(plain)
        assert masked(images).equal(expected)
    with pytest.raises(RuntimeError), masked.masking_kernels(masks):
        masked(images[:, :, :2])
    assert masked(images).equal(plain)
    assert not plain.equal(expected)

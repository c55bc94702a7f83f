from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mnp.mnp.detection_ratio import layer_normalized, saliency_correlation
from lightning_mnp.mnp.saliency import (
    approximate_clc,
    batch_clc,
    exact_blc,
    exact_clc,
    filter_magnitudes,
)
from lightning_mnp.surgery.layers import FilterLayer, FilterLayers, find_filter_layers
from lightning_mnp.surgery.masked_network import MaskedNetwork
from lightning_mnp.surgery.masks import FilterMasks

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.rand(10, 3, 8, 8, generator=GENERATOR)
LABELS = torch.arange(10) % 3
# Batches of 6 and 4 images: the means must be over images, not over batches.
BATCHES = [(IMAGES[:6], LABELS[:6]), (IMAGES[6:], LABELS[6:])]


def make_network() -> nn.Sequential:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 6, 2, groups=2),
        nn.BatchNorm2d(6),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.3, 1.0).mul_((torch.rand_like(tensor) < 0.7) * 2.0 - 1.0)
        for norm in (network[1], network[6]):
            norm.running_var.abs_()
    return network


def make(**options: Any) -> MaskedNetwork:
    network = make_network()
    return MaskedNetwork(network, find_filter_layers(network, IMAGES), **options)


def filter_weights(network: nn.Sequential, index: int) -> list[tuple[slice | int, ...]]:
    """Where the weights of every filter of a layer are, written out."""
    if index != 5:
        return [(row,) for row in range(4)]
    # Transposed, two groups: inputs 0-1 make outputs 0-2, inputs 2-3 make outputs 3-5.
    return [(slice(2 * (row // 3), 2 * (row // 3) + 2), row % 3) for row in range(6)]


# --- magnitude ---------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 3.0])
def test_magnitudes(p: float) -> None:
    masked = make()
    network: Any = masked.network
    expected = [
        float(
            np.sum(np.abs(network[index].weight[place].detach().double().numpy()) ** p) ** (1 / p)
        )
        for index in (0, 3, 5)
        for place in filter_weights(network, index)
    ]
    found = filter_magnitudes(masked, masked.weights(), p)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


def test_magnitudes_of_other_weights() -> None:
    masked = make()
    doubled = {name: 2 * weight for name, weight in masked.weights().items()}
    own = filter_magnitudes(masked, masked.weights())
    torch.testing.assert_close(filter_magnitudes(masked, doubled), 2 * own)


@pytest.mark.parametrize("p", [0, -1.0])
def test_wrong_order(p: float) -> None:
    masked = make()
    with pytest.raises(ValueError, match=f"`p` to be above 0, but got {p}"):
        filter_magnitudes(masked, masked.weights(), p)


# --- normalization and correlation -------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_normalization_against_numpy(scale: float) -> None:
    values = torch.randn(9, generator=GENERATOR) * scale
    found = layer_normalized(values, [4, 2, 3])
    parts = np.split(values.double().numpy(), [4, 6])
    expected = np.concatenate([part / np.sqrt(np.sum(part**2)) for part in parts])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
    assert found.dtype == torch.float32


def test_a_layer_of_zeros_stays_zero() -> None:
    found = layer_normalized(torch.tensor([0.0, 0.0, 5.0]), [2, 1])
    assert found.tolist() == [0.0, 0.0, 1.0]


LAYERS = FilterLayers((FilterLayer("a", 6, "a", 1), FilterLayer("b", 5, "b", 1)))


@pytest.mark.parametrize("seed", range(5))
def test_correlation_against_scipy(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    magnitudes = torch.rand(11, generator=generator) * 3
    changes = torch.randn(11, generator=generator).round(decimals=1)  # with ties
    first, second = magnitudes.double().numpy(), np.abs(changes.double().numpy())
    for part in (slice(0, 6), slice(6, 11)):  # Eq. 12 and 13
        first[part] /= np.sqrt(np.sum(first[part] ** 2))
        second[part] /= np.sqrt(np.sum(second[part] ** 2))
    expected = spearmanr(first, second.astype(np.float32)).statistic
    assert saliency_correlation(magnitudes, changes, LAYERS) == pytest.approx(expected, abs=1e-12)


def test_correlation_does_not_see_the_scale_of_a_layer_or_the_sign() -> None:
    magnitudes, changes = torch.rand(11), torch.randn(11)
    scale = torch.tensor([4.0] * 6 + [0.25] * 5)  # powers of two are exact
    value = saliency_correlation(magnitudes, changes, LAYERS)
    assert saliency_correlation(magnitudes * scale, -changes / scale, LAYERS) == value
    assert saliency_correlation(magnitudes, magnitudes, LAYERS) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("magnitudes", "changes"),
    [
        (torch.ones(11), torch.zeros(11)),
        (torch.rand(11), torch.zeros(11)),
        (torch.zeros(11), torch.rand(11)),
        (torch.rand(11), torch.full((11,), torch.nan)),
    ],
)
def test_correlation_of_constants_is_nan_without_a_warning(
    magnitudes: Tensor, changes: Tensor
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(saliency_correlation(magnitudes, changes, LAYERS))


def test_correlation_of_a_single_filter_is_nan() -> None:
    layers = FilterLayers((FilterLayer("a", 1, "a", 1),))
    assert np.isnan(saliency_correlation(torch.ones(1), torch.ones(1), layers))


# --- first-order change ------------------------------------------------------------------------


def mean_loss(network: nn.Module, statistics: str) -> Tensor:
    network.train(statistics == "batch")
    losses = [F.cross_entropy(network(x), y, reduction="sum") for x, y in BATCHES]
    return sum(losses) / len(IMAGES)  # type: ignore[return-value]


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_approximate_change_against_explicit_gradients(statistics: Any) -> None:
    masked = make(statistics=statistics)
    network: Any = copy.deepcopy(masked.network)
    mean_loss(network, statistics).backward()  # type: ignore[no-untyped-call]
    expected = [
        -float((network[index].weight.grad[place] * network[index].weight.data[place]).sum())
        for index in (0, 3, 5)
        for place in filter_weights(network, index)
    ]
    found = approximate_clc(masked, masked.weights(), BATCHES)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-6)


def test_approximate_change_against_finite_differences() -> None:
    masked = make(statistics="running")
    found = approximate_clc(masked, masked.weights(), BATCHES)
    network: Any = copy.deepcopy(masked.network).double()
    slopes = []
    for index in (0, 3, 5):
        for place in filter_weights(network, index):
            losses = []
            for sign in (-1, 1):
                other = copy.deepcopy(network).eval()
                with torch.no_grad():
                    other[index].weight[place] *= 1 + sign * 1e-6
                    logits = other(IMAGES.double())
                losses.append(float(F.cross_entropy(logits, LABELS)))
            slopes.append(-(losses[1] - losses[0]) / 2e-6)
    np.testing.assert_allclose(found.numpy(), slopes, rtol=1e-3, atol=1e-5)


def test_batch_change_gives_the_logits_on_the_way() -> None:
    masked = make()
    changes, logits = batch_clc(masked, masked.weights(), IMAGES, LABELS)
    torch.testing.assert_close(logits, masked(IMAGES).detach())
    assert not logits.requires_grad
    assert not changes.requires_grad
    assert all(p.grad is None and p.requires_grad for p in masked.network.parameters())


def test_a_layer_without_part_in_the_logits_changes_nothing() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.side = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 2, 3)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Any:
            return self.head(self.conv(x).mean((2, 3))), self.side(x)

    network = Two()
    masked = MaskedNetwork(network, find_filter_layers(network, IMAGES))
    changes = approximate_clc(masked, masked.weights(), BATCHES)
    assert (changes != 0).tolist() == [True] * 4 + [False] * 2


# --- exact change ------------------------------------------------------------------------------


def brute_force(
    masked: MaskedNetwork, images: Tensor, labels: Tensor, batch_norm: bool = False
) -> list[float]:
    """Remove every single filter from a copy, and measure."""
    losses = []
    for index in [None, *range(masked.layers.total)]:
        values = torch.ones(masked.layers.total)
        if index is not None:
            values[index] = 0.0
        other = copy.deepcopy(masked.network).train(batch_norm)
        if batch_norm:  # baked masks are for evaluation mode
            FilterMasks(other, masked.layers, values).attach()
        else:
            FilterMasks(other, masked.layers, values).bake()
        with torch.no_grad():
            losses.append(float(F.cross_entropy(other(images).double(), labels)))
    return [loss - losses[0] for loss in losses[1:]]


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_exact_change_against_brute_force(statistics: Any) -> None:
    masked = make(statistics=statistics)  # measured in evaluation mode unless told otherwise
    calls: list[tuple[int, int]] = []
    found = exact_clc(masked, BATCHES, lambda done, of: calls.append((done, of)))
    assert found.dtype == torch.float64
    expected = brute_force(masked, IMAGES, LABELS)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert calls == [(done, 14) for done in range(1, 15)]


def test_exact_change_with_batch_statistics() -> None:
    masked = make(statistics="running")
    found = exact_clc(masked, [(IMAGES, LABELS)], statistics="batch")
    expected = brute_force(masked, IMAGES, LABELS, batch_norm=True)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(expected, brute_force(masked, IMAGES, LABELS), atol=1e-3)
    same = exact_blc(masked, [(IMAGES, LABELS)], lambda x: x, lambda y: y, statistics="batch")
    assert torch.equal(same, found)


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_exact_and_approximate_change_of_weights_without_weight(statistics: Any) -> None:
    """A filter so small that the loss is a line: the two agree."""
    network = nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 3),
    )  # fmt: skip
    with torch.no_grad():
        network[1].weight.mul_(1e-3)
        network[0].running_mean.fill_(0.4)
    masked = MaskedNetwork(network, find_filter_layers(network, IMAGES), statistics=statistics)
    exact = exact_clc(masked, BATCHES, statistics=statistics)
    approximate = approximate_clc(masked, masked.weights(), BATCHES)
    np.testing.assert_allclose(exact.numpy(), approximate.numpy(), rtol=1e-2, atol=1e-8)


def test_exact_backdoor_change() -> None:
    masked = make()

    def trigger(images: Tensor) -> Tensor:
        images = images.clone()
        images[:, :, -2:, -2:] = 1.0
        return images

    found = exact_blc(masked, BATCHES, trigger, lambda labels: (labels + 1) % 3)
    expected = brute_force(masked, trigger(IMAGES), (LABELS + 1) % 3)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(found.numpy(), exact_clc(masked, BATCHES).numpy(), atol=1e-3)


def test_no_batch() -> None:
    masked = make()
    message = "`batches` to hold at least one batch"
    with pytest.raises(ValueError, match=message):
        exact_clc(masked, [])
    with pytest.raises(ValueError, match=message):
        approximate_clc(masked, masked.weights(), iter([]))

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mnp.mnp.detection_ratio import mean_rank_correlation
from lightning_mnp.mnp.saliency import (
    approximate_clc,
    batch_clc,
    exact_blc,
    exact_clc,
    filter_magnitudes,
)
from lightning_mnp.surgery.layers import find_filter_layers
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


# --- first-order change, by weights ------------------------------------------------------------


def mean_loss(network: nn.Module, statistics: str) -> Tensor:
    network.train(statistics == "batch")
    losses = [F.cross_entropy(network(x), y, reduction="sum") for x, y in BATCHES]
    return sum(losses) / len(IMAGES)  # type: ignore[return-value]


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_change_of_weights_against_explicit_gradients(statistics: Any) -> None:
    masked = make(statistics=statistics)
    network: Any = copy.deepcopy(masked.network)
    mean_loss(network, statistics).backward()  # type: ignore[no-untyped-call]
    expected = [
        -float((network[index].weight.grad[place] * network[index].weight.data[place]).sum())
        for index in (0, 3, 5)
        for place in filter_weights(network, index)
    ]
    found = approximate_clc(masked, masked.weights(), BATCHES, "weight")
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-6)


def test_change_of_weights_against_finite_differences() -> None:
    masked = make(statistics="running")
    found = approximate_clc(masked, masked.weights(), BATCHES, "weight")
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


# --- first-order change, by maps ----------------------------------------------------------------


def held(network: nn.Module, images: Tensor) -> nn.Module:
    """A copy in evaluation mode that stores the statistics of a batch, layer by layer."""
    other = copy.deepcopy(network).double().eval()
    norms = [module for module in other.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:  # each on what those in front of it, which are done, make of the images
        seen: list[Tensor] = []
        handle = norm.register_forward_hook(lambda module, args, out, to=seen: to.append(args[0]))
        other(images.double())
        handle.remove()
        norm.running_mean.copy_(seen[0].mean((0, 2, 3)))
        norm.running_var.copy_(seen[0].var((0, 2, 3), correction=0))
    return other


@pytest.mark.parametrize("site", ["norm", "filter"])
@pytest.mark.parametrize(
    ("statistics", "suppressed", "of_batch"),
    [("batch", False, False), ("batch", True, True), ("running", True, False)],
)
@torch.no_grad()
def test_change_of_maps_against_finite_differences(
    statistics: Any, suppressed: bool, of_batch: bool, site: Any
) -> None:
    network = make_network()
    layers = find_filter_layers(network, IMAGES, site=site)
    masked = MaskedNetwork(network, layers, statistics=statistics)
    weights = masked.weights()
    with torch.enable_grad():
        found = approximate_clc(masked, weights, BATCHES, suppressed=suppressed)
    slopes = torch.zeros(layers.total, dtype=torch.float64)
    for images, labels in BATCHES:
        other = held(network, images) if of_batch else copy.deepcopy(network).double().eval()
        for index in range(layers.total):
            losses = []
            for step in (-1e-6, 1e-6):
                values = torch.ones(layers.total, dtype=torch.float64)
                values[index] += step
                with FilterMasks(other, layers, values):
                    losses.append(F.cross_entropy(other(images.double()), labels))
            slopes[index] -= (losses[1] - losses[0]) / 2e-6 * len(labels) / len(IMAGES)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), slopes.numpy(), rtol=1e-3, atol=1e-5)


def hand_made() -> MaskedNetwork:
    """Two layers of filters that differ in what they do, and a head in the range of its line."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12, momentum=1.0), nn.ReLU(),
            nn.Conv2d(12, 12, 3), nn.BatchNorm2d(12, momentum=1.0), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3),
        )  # fmt: skip
        with torch.no_grad():
            for index in (1, 4):
                network[index].weight.copy_(torch.linspace(0.05, 1.5, 12)[torch.randperm(12)])
                network[index].bias.fill_(0.5)
            network[8].weight.mul_(0.1)
            network(IMAGES)  # for the statistics
    return MaskedNetwork(network.eval(), find_filter_layers(network, IMAGES))


def test_the_change_of_maps_ranks_filters_as_the_exact_one_does() -> None:
    masked = hand_made()
    weights, sizes = masked.weights(), masked.layers.sizes
    exact = exact_clc(masked, BATCHES).abs()
    agreement = {
        form: mean_rank_correlation(
            approximate_clc(masked, weights, BATCHES, form).abs(), exact, sizes
        )
        for form in ("map", "weight")
    }
    assert agreement["map"] > 0.9
    assert agreement["weight"] < 0.7


def test_in_front_of_batch_norm_the_change_of_weights_is_that_of_eps() -> None:
    masked = hand_made()
    network: Any = masked.network
    forms = ("map", "weight")
    usual = [approximate_clc(masked, masked.weights(), BATCHES, form).norm() for form in forms]
    for index in (1, 4):
        network[index].eps = 1e-12
    exact = [approximate_clc(masked, masked.weights(), BATCHES, form).norm() for form in forms]
    assert usual[1] < 0.05 * usual[0]
    assert exact[1] < 0.05 * usual[1]
    torch.testing.assert_close(exact[0], usual[0], rtol=1e-2, atol=0)


@pytest.mark.parametrize("form", ["map", "weight"])
@pytest.mark.parametrize("suppressed", [False, True])
def test_autocast_is_off(form: Any, suppressed: bool) -> None:
    masked = make()
    options: Any = {"form": form, "suppressed": suppressed}
    changes = approximate_clc(masked, masked.weights(), BATCHES, **options)
    masked.autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    assert torch.equal(approximate_clc(masked, masked.weights(), BATCHES, **options), changes)


def test_short_float32_formats_are_off_while_gradients_are_taken() -> None:
    masked, seen = make(), []
    network: Any = masked.network
    switches: Any = torch.backends.cuda.matmul

    def look(*args: Any) -> None:
        newer = hasattr(switches, "fp32_precision")
        seen.append(switches.fp32_precision == "ieee" if newer else not switches.allow_tf32)

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        output.register_hook(look)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        network[1].register_forward_hook(watch)
        batch_clc(masked, masked.weights(), IMAGES, LABELS)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [True]


# --- both forms --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "suppressed", "statistics"),
    [("map", False, "running"), ("map", True, "batch"), ("weight", False, "batch")],
)
def test_batch_change_gives_the_logits_on_the_way(
    form: Any, suppressed: bool, statistics: Any
) -> None:
    masked = make()
    network = masked.network
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    changes, logits = batch_clc(
        masked, masked.weights(), IMAGES, LABELS, form, suppressed=suppressed
    )
    torch.testing.assert_close(logits, masked(IMAGES, statistics=statistics).detach())
    assert not logits.requires_grad
    assert not changes.requires_grad
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("form", ["map", "weight"])
def test_a_layer_without_part_in_the_logits_changes_nothing(form: Any) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.side = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 2, 3)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Any:
            return self.head(self.conv(x).mean((2, 3))), self.side(x)

    network = Two()
    masked = MaskedNetwork(network, find_filter_layers(network, IMAGES))
    changes = approximate_clc(masked, masked.weights(), BATCHES, form)
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
    approximate = approximate_clc(masked, masked.weights(), BATCHES, "weight")
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

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from distributed_script import small_network
from helpers import images_and_labels, loader, same, snapshot, trained_network
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mnp.baselines import BaselineResult, FPConfig, fp
from lightning_mnp.baselines.fp import mean_activations
from lightning_mnp.baselines.workbench import Workbench
from lightning_mnp.defense_data.defense_set import DefenseSet
from lightning_mnp.surgery.layers import find_filter_layers

DATA = DefenseSet(*images_and_labels())
NETWORK = small_network()  # convolutions "0" of 8 and "4" of 12 filters, normalized by "1" and "5"


def quick(**changes: Any) -> FPConfig:
    return FPConfig(**{"epochs": 1, "augment": "none", "lr": 0.01, **changes})


@torch.no_grad()
def accuracy(network: nn.Module) -> float:
    return float((network(DATA.images).argmax(1) == DATA.labels).float().mean())


def activations_by_hand(network: Any = NETWORK) -> list[float]:
    sums = [0.0] * 12
    with torch.no_grad():
        for image in DATA.images:
            maps = network[:6](image[None])
            for index in range(12):
                sums[index] += sum(max(0.0, value) for value in maps[0, index].flatten().tolist())
    return [total / (len(DATA) * 16) for total in sums]


def without(count: int) -> nn.Module:
    """The network without its `count` least active filters, by hand."""
    pruned: Any = copy.deepcopy(NETWORK)
    order = sorted(range(12), key=activations_by_hand().__getitem__)
    for index in order[:count]:
        for tensor in (pruned[4].weight, pruned[4].bias, pruned[5].weight, pruned[5].bias):
            tensor.data[index] = 0.0
        pruned[5].running_mean[index] = 0.0
    return pruned


def test_mean_activations_are_those_image_by_image() -> None:
    bench = Workbench(NETWORK, DATA, batch_size=16)
    layer = find_filter_layers(NETWORK, bench.sample)[1]
    found = mean_activations(bench, layer)
    torch.testing.assert_close(found, torch.tensor(activations_by_hand()), rtol=1e-4, atol=1e-5)


def test_the_least_active_go_and_the_rest_is_fine_tuned() -> None:
    result = fp(NETWORK, DATA, config=quick(rule="number", amount=5, weight_decay=0.1))
    expected = activations_by_hand()
    order = sorted(range(12), key=expected.__getitem__)[:5]
    assert result.pruned == [("4", index) for index in order]
    assert result.scores == pytest.approx([expected[index] for index in order], rel=1e-4)
    by_hand = without(5)
    assert result.accuracy_before == pytest.approx(accuracy(NETWORK))
    assert result.details["accuracy_pruned"] == pytest.approx(accuracy(by_hand))
    assert result.accuracy_after == pytest.approx(accuracy(result.model))
    # One step of SGD, and what it has changed of the pruned filters is taken back.
    by_hand.train()
    loss = F.cross_entropy(by_hand(DATA.images), DATA.labels)
    gradients = torch.autograd.grad(loss, list(by_hand.parameters()))
    for (name, parameter), gradient in zip(by_hand.named_parameters(), gradients, strict=True):
        parameter.data -= 0.01 * (gradient + 0.1 * parameter.data)
        if name.startswith(("4.", "5.")):
            parameter.data[order] = 0.0
    assert result.details["loss"] == pytest.approx(loss.item(), rel=1e-4)
    for name, tensor in by_hand.state_dict().items():
        torch.testing.assert_close(result.model.state_dict()[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("max_drop", [0.0, 0.04, 0.3, 1.0])
def test_as_many_as_accuracy_allows(max_drop: float) -> None:
    least = accuracy(NETWORK) - max_drop - 1e-6
    count = len(fp(NETWORK, DATA, config=quick(max_drop=max_drop)).pruned)
    assert accuracy(without(count)) >= least
    assert count == 11 or accuracy(without(count + 1)) < least


def test_pruned_maps_stay_zero_through_many_steps() -> None:
    config = quick(rule="number", amount=6, epochs=3, batch_size=8, lr=0.1)
    result = fp(NETWORK, DATA, config=config)
    pruned = [index for _, index in result.pruned]
    kept = [index for index in range(12) if index not in pruned]
    model: Any = result.model
    with torch.no_grad():
        maps = model[:6](DATA.images)
    assert not maps[:, pruned].any()
    assert bool(maps[:, kept].flatten(2).any(2).any(0).all())
    assert not torch.equal(model[0].weight, NETWORK.get_parameter("0.weight"))


def test_the_default_amount_and_a_share_of_all_filters() -> None:
    assert len(fp(NETWORK, DATA, config=quick(rule="share", amount=0.1)).pruned) == 2  # of 20
    with pytest.raises(ValueError, match=r"leave one of the 12 filters .*which are 12 filters"):
        fp(NETWORK, DATA, config=quick(rule="share", amount=0.6))


class Backwards(nn.Module):
    """Its last convolution is defined first, and nothing normalizes it."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(6, 5, 3, groups=1)
        self.deep = nn.Conv2d(6, 6, 3, groups=6)
        self.first = nn.Conv2d(1, 6, 3)
        self.head = nn.Linear(20, 4)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.deep(self.first(images).relu()).relu()
        logits: Tensor = self.head(self.last(maps).relu().flatten(1))
        return logits


def test_the_last_convolution_is_the_one_called_last() -> None:
    network = Backwards().eval()
    result = fp(network, DATA, config=quick(rule="number", amount=2))
    assert {name for name, _ in result.pruned} == {"last"}
    named = fp(network, DATA, config=quick(rule="number", amount=2, layer="deep"))
    assert {name for name, _ in named.pruned} == {"deep"}
    for outcome, name in ((result, "last"), (named, "deep")):
        weights = outcome.model.get_parameter(f"{name}.weight")
        assert not weights[[index for _, index in outcome.pruned]].any()


def test_a_layer_that_there_is_not() -> None:
    with pytest.raises(ValueError, match=r"`layer` to be .*\['0', '4'\], but got 'conv9'\. Pass"):
        fp(NETWORK, DATA, config=quick(layer="conv9"))


def residual() -> nn.Module:
    return trained_network(steps=2)


def group_normalized() -> nn.Module:
    layers = nn.Conv2d(1, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(216, 4)).eval()


@pytest.mark.parametrize("make", [residual, group_normalized])
def test_other_networks(make: Callable[[], nn.Module]) -> None:
    result = fp(make(), DATA, config=quick(rule="number", amount=3))
    assert len(result.pruned) == 3
    layers = find_filter_layers(result.model, DATA.images[:2])
    name = result.pruned[0][0]
    site = next(layer.site for layer in layers if layer.name == name)
    scale = result.model.get_parameter(f"{site}.weight")
    assert not scale[[index for _, index in result.pruned]].any()


@pytest.mark.parametrize("training", [False, True])
def test_the_model_and_the_random_state_stay(training: bool) -> None:
    network = copy.deepcopy(NETWORK).train(training)
    network.get_parameter("0.weight").requires_grad_(False)
    before, state = snapshot(network), torch.get_rng_state()
    result = fp(network, loader(shuffle=True), config=quick())
    assert torch.equal(torch.get_rng_state(), state)
    assert same(before, snapshot(network))
    after = snapshot(result.model)
    assert all(after[key] == before[key] for key in ("modes", "gradients", "hooks"))


def test_the_seed_decides() -> None:
    def run(size: int, seed: int) -> BaselineResult:
        return fp(NETWORK, loader(size), config=quick(seed=seed, augment="crop-flip"))

    first, second, other = run(16, 0), run(7, 0), run(16, 1)
    assert first == second
    assert same(snapshot(first.model), snapshot(second.model))
    assert not same(snapshot(first.model), snapshot(other.model))


def test_maps_that_overflow() -> None:
    data = DefenseSet(*images_and_labels())
    data.images[5] = 3e38
    with pytest.raises(ArithmeticError, match="the maps of '4' to be finite"):
        fp(NETWORK, data, config=quick())


def test_a_network_without_filters_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one convolution"):
        fp(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), DATA)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("rule", "asr", "one of ('own', 'number', 'share')"),
        ("max_drop", 1.1, "a number from 0 to 1"),
        ("amount", float("nan"), "a number"),
        ("lr", 0.0, "a number above 0"),
    ],
)
def test_options_out_of_range(option: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=f"Expected argument `{option}`") as caught:
        FPConfig(**{option: value})
    assert f"to be {expected}, but got {value!r}." in str(caught.value)


def test_an_amount_that_does_not_fit_the_rule() -> None:
    with pytest.raises(ValueError, match="`amount` to be a whole number of filters"):
        FPConfig(rule="number", amount=0.5)

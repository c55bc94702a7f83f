from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from distributed_script import small_network
from helpers import images_and_labels, loader, same, snapshot
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

from lightning_mnp import DefenseSet
from lightning_mnp.baselines import ANPConfig, BaselineResult, anp
from lightning_mnp.defense_data.defense_set import seeded_generator
from lightning_mnp.surgery.layers import filter_rows

IMAGES, LABELS = images_and_labels(40)
# Two of five labels are wrong: the loss is high where the network is sure, and masks fall.
LABELS = torch.where(torch.arange(40) % 5 < 2, (LABELS + 1) % 4, LABELS)
DATA = DefenseSet(IMAGES, LABELS)
EVERYTHING: dict[str, Any] = {"rule": "number", "amount": 19}  # of 20 filters, one has to stay


def quick(**changes: Any) -> ANPConfig:
    return ANPConfig(**{"augment": "none", "iterations": 3, "seed": 2, **changes})


def positions(result: BaselineResult) -> list[int]:
    return [index + (8 if name == "4" else 0) for name, index in result.pruned]


def logits_of(network: nn.Module, scales: Tensor, shifts: Tensor) -> Tensor:
    """The small network with batch statistics, its scales and shifts multiplied."""
    w = dict(network.named_parameters())
    x = F.conv2d(IMAGES, w["0.weight"], w["0.bias"], padding=1)
    scale, shift = w["1.weight"] * scales[:8], w["1.bias"] * shifts[:8]
    x = F.max_pool2d(F.batch_norm(x, None, None, scale, shift, True).relu(), 2)
    x = F.conv2d(x, w["4.weight"], w["4.bias"], padding=1)
    scale, shift = w["5.weight"] * scales[8:], w["5.bias"] * shifts[8:]
    x = F.batch_norm(x, None, None, scale, shift, True).relu().flatten(1)
    return F.linear(x, w["8.weight"], w["8.bias"])


def masks_by_hand(network: nn.Module, config: ANPConfig) -> tuple[Tensor, Tensor]:
    """The masks after all iterations, one batch each, and their means."""
    masks, speed, past = torch.ones(20), torch.zeros(20), []
    for iteration in range(config.iterations):
        drawn = torch.rand(2, 20, generator=seeded_generator(2, "anp noise", iteration))
        noise = config.eps * (2 * drawn - 1)
        for _ in range(config.noise_steps):
            leaf = noise.clone().requires_grad_()
            loss = F.cross_entropy(logits_of(network, masks + leaf[0], 1 + leaf[1]), LABELS)
            (gradient,) = torch.autograd.grad(loss, leaf)
            noise = noise + config.eps / config.noise_steps * gradient.sign()
            noise = noise.clamp(-config.eps, config.eps)
        leaf = masks.clone().requires_grad_()
        plain = F.cross_entropy(logits_of(network, leaf, torch.ones(20)), LABELS)
        noisy = F.cross_entropy(logits_of(network, leaf + noise[0], 1 + noise[1]), LABELS)
        (gradient,) = torch.autograd.grad(config.alpha * plain + (1 - config.alpha) * noisy, leaf)
        speed = config.momentum * speed + gradient
        masks = (masks - config.lr * speed).clamp(0, 1)
        past.append(masks)
    return masks, torch.stack(past).mean(0)


@pytest.mark.parametrize(
    "options",
    [{}, {"eps": 0.7, "alpha": 0.6, "momentum": 0.5, "lr": 1.0}, {"noise_steps": 3, "lr": 0.5}],
    ids=["published", "others", "three steps"],
)
def test_the_masks_are_those_of_the_iterations_by_hand(options: dict[str, Any]) -> None:
    network = small_network()
    config = quick(**options, **EVERYTHING)
    masks, means = masks_by_hand(network, config)
    result = anp(network, DATA, config=config)
    [stays] = set(range(20)) - set(positions(result))
    assert masks[stays] == masks.max()
    found = torch.tensor(result.scores)
    torch.testing.assert_close(found, masks[positions(result)], rtol=1e-3, atol=1e-4)
    assert result.scores == sorted(result.scores)
    lowest = [place for place in positions(result) if masks[place] == 0]
    assert [float(means[p]) for p in lowest] == pytest.approx(sorted(means[lowest].tolist()))
    assert result.details == {"threshold": result.scores[-1], "filters": 20}


@torch.no_grad()
def accuracy(network: nn.Module) -> float:
    return float((network(IMAGES).argmax(1) == LABELS).float().mean())


def scaled_to_zero(network: nn.Module, pruned: list[tuple[str, int]]) -> nn.Module:
    other: Any = copy.deepcopy(network)
    for name, index in pruned:
        other[{"0": 1, "4": 5}[name]].weight.data[index] = 0.0
    return other


def test_only_the_scales_of_pruned_filters_change() -> None:
    network = small_network()
    result = anp(network, DATA, config=quick(rule="number", amount=5))
    assert len(result.pruned) == 5
    expected = scaled_to_zero(network, result.pruned)
    state, found = expected.state_dict(), result.model.state_dict()
    assert state.keys() == found.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    before, after = accuracy(network), accuracy(expected)
    assert (result.accuracy_before, result.accuracy_after) == pytest.approx((before, after))


@pytest.mark.parametrize("max_drop", [0.0, 0.1, 0.3, 1.0])
def test_the_own_rule_prunes_until_the_next_filter_costs_too_much(max_drop: float) -> None:
    network = small_network()
    everything = anp(network, DATA, config=quick(lr=0.5, **EVERYTHING))
    result = anp(network, DATA, config=quick(lr=0.5, max_drop=max_drop))
    number = len(result.pruned)
    assert result.pruned == everything.pruned[:number]
    accuracies = [accuracy(scaled_to_zero(network, everything.pruned[:n])) for n in range(20)]
    least = accuracies[0] - max_drop - 1e-6
    assert result.accuracy_after == pytest.approx(accuracies[number])
    assert accuracies[number] >= least
    low = sum(score <= 0.9 for score in everything.scores)
    assert number == low or accuracies[number + 1] < least
    if max_drop == 1.0:
        assert 0 < number == low < 20
        assert result.details["threshold"] == result.scores[-1]


def test_nothing_is_pruned_if_the_first_filter_costs_too_much() -> None:
    network = nn.Sequential(nn.Conv2d(1, 1, (2, 8), (2, 8)), nn.Flatten(), nn.Linear(4, 4))
    for name, parameter in network.named_parameters():
        wanted = torch.eye(4) if name == "2.weight" else torch.zeros_like(parameter)
        parameter.data.copy_(torch.ones_like(parameter) if name == "0.weight" else wanted)
    # Sure of the wrong labels as well: the loss is lowest without the only filter.
    everything = anp(network, DATA, config=quick(max_drop=1.0))
    assert everything.scores == [0.0]
    assert everything.accuracy_after < everything.accuracy_before == pytest.approx(0.6)
    result = anp(network, DATA, config=quick())
    assert result.pruned == result.scores == []
    assert math.isnan(result.details["threshold"])
    assert result.accuracy_after == result.accuracy_before
    assert same(snapshot(result.model), snapshot(network))


def test_a_threshold_of_the_user_and_a_share() -> None:
    network = small_network()
    everything = anp(network, DATA, config=quick(lr=0.5, **EVERYTHING))
    for threshold in (0.0, 0.2, 0.7):
        found = anp(network, DATA, config=quick(lr=0.5, threshold=threshold))
        number = sum(score <= threshold for score in everything.scores)
        assert found.pruned == everything.pruned[:number]
    share = anp(network, DATA, config=quick(lr=0.5, rule="share", amount=0.26))
    assert share.pruned == everything.pruned[:5]
    one = anp(network, DATA, config=quick(lr=0.5, rule="share", amount=0.001))
    assert one.pruned == everything.pruned[:1]


def network_of(*layers: nn.Module) -> nn.Module:
    features = nn.Sequential(*layers, nn.ReLU(), nn.Flatten())
    with torch.no_grad():
        width = features(IMAGES[:1]).shape[1]
    return nn.Sequential(*features, nn.Linear(width, 4)).eval()


@pytest.mark.parametrize(
    ("make", "scale"),
    [
        (lambda: network_of(nn.Conv2d(1, 6, 3)), "0.weight"),
        (lambda: network_of(nn.Conv2d(1, 6, 3, bias=False), nn.GroupNorm(2, 6)), "1.weight"),
        (lambda: network_of(nn.Conv2d(1, 6, 3), FrozenBatchNorm2d(6)), "1.weight"),
        (lambda: network_of(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, groups=2)), "2"),
        (lambda: network_of(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4)), "2"),
        (
            lambda: network_of(
                nn.Conv2d(1, 4, 1), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2)
            ),
            "2",
        ),
    ],
    ids=["plain", "group norm", "frozen norm", "grouped", "depthwise", "transposed"],
)
def test_every_kind_of_filter_loses_its_weight_and_keeps_its_bias(make: Any, scale: str) -> None:
    network = make()
    amount = 3 if scale != "2" else 7
    result = anp(network, DATA, config=quick(rule="number", amount=amount))
    assert len(result.pruned) == amount
    before, after = network.state_dict(), result.model.state_dict()
    removed = {name: {i for n, i in result.pruned if n == name} for name, _ in result.pruned}
    for name, tensor in before.items():
        layer = "0" if scale == "1.weight" and name == scale else name.split(".")[0]
        gone = removed.get(layer, set())
        if not gone or name.endswith("bias") or (scale == "1.weight" and name != scale):
            assert torch.equal(after[name], tensor), name
            continue
        module = network.get_submodule(name.split(".")[0])
        transposed, groups = isinstance(module, nn.ConvTranspose2d), getattr(module, "groups", 1)
        old, new = (
            filter_rows(each, transposed, groups) if each.ndim > 1 else each[:, None]
            for each in (tensor, after[name])
        )
        for index in range(len(old)):
            expected = torch.zeros_like(old[index]) if index in gone else old[index]
            assert torch.equal(new[index], expected), (name, index)


def test_filters_that_nothing_scales_take_no_part() -> None:
    mixed = network_of(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=False)),
        *(nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)),
    )
    result = anp(mixed, DATA, config=quick(rule="number", amount=5))
    assert {name for name, _ in result.pruned} == {"3"}
    assert result.details["filters"] == 6
    plain = network_of(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=False))
    with pytest.raises(ValueError, match=r"that ANP can multiply, but none of 1 has\. Use"):
        anp(plain, DATA, config=quick())


@pytest.mark.parametrize("training", [False, True])
def test_the_model_and_the_random_state_stay(training: bool) -> None:
    network = nn.Sequential(small_network(), nn.Dropout(0.3)).train(training)
    network.get_parameter("0.1.weight").requires_grad_(False)
    before, state = snapshot(network), torch.get_rng_state()
    config = quick(batch_size=16, augment="crop-flip", rule="number", amount=9)
    result = anp(network, loader(shuffle=True), config=config)
    assert same(before, snapshot(network))
    assert torch.equal(torch.get_rng_state(), state)
    after = snapshot(result.model)
    assert all(after[key] == before[key] for key in ("modes", "gradients", "hooks"))


def test_the_seed_decides() -> None:
    options = {"batch_size": 16, "augment": "crop-flip", **EVERYTHING}
    network = small_network()
    first, second, other = (
        anp(network, loader(size, shuffle=size == 7), config=quick(**{**options, "seed": seed}))
        for size, seed in ((16, 0), (7, 0), (16, 1))
    )
    assert (first.pruned, first.scores) == (second.pruned, second.scores)
    assert first.scores != other.scores


def test_noise_that_overflows() -> None:
    network = network_of(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3))
    before = snapshot(network)
    with pytest.raises(ArithmeticError, match=r"iteration 1 of ANP to be finite.*Lower `lr` or"):
        anp(network, DATA, config=quick(eps=1e38))
    assert same(before, snapshot(network))


def test_what_does_not_fit_is_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match="labels to be below 4"):
        anp(small_network(), DefenseSet(IMAGES, LABELS + 1))
    with pytest.raises(ValueError, match="to hold at least one convolution"):
        anp(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), DATA)
    with pytest.raises(ValueError, match=r"`amount` to leave one of the 20 filters.*but got 20,"):
        anp(small_network(), DATA, config=quick(rule="number", amount=20))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"augment": "mixup"}, "one of ('none', 'crop', 'crop-flip')"),
        (
            {"batch_size": 2},
            "a whole number of at least 3, so that no batch holds a single image",
        ),
        ({"iterations": 0}, "a whole number of at least 1"),
        ({"lr": 0.0}, "a number above 0"),
        ({"momentum": 1.0}, "a number from 0 to below 1"),
        ({"eps": 0.0}, "a number above 0"),
        ({"alpha": 1.1}, "a number from 0 to 1"),
        ({"noise_steps": 0}, "a whole number of at least 1"),
        ({"rule": "asr"}, "one of ('own', 'number', 'share')"),
        ({"threshold": 1.0}, "a number from 0 to below 1, or None"),
        ({"max_drop": -0.1}, "a number from 0 to 1"),
        (
            {"amount": 1.5, "rule": "number"},
            "a whole number of filters, at least 0 (`rule` is 'number')",
        ),
        ({"amount": 1, "rule": "share"}, "a share from 0 to below 1 (`rule` is 'share')"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], expected: str) -> None:
    option, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"Expected argument `{option}`") as caught:
        ANPConfig(**options)
    assert f"to be {expected}, but got {value!r}." in str(caught.value)

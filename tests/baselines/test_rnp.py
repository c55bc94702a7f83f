from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import images_and_labels, loader, same, snapshot
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mnp.baselines import BaselineResult, RNPConfig, rnp
from lightning_mnp.defense_data.defense_set import DefenseSet

IMAGES, LABELS = images_and_labels(40)
DATA = DefenseSet(IMAGES, LABELS)
QUICK: dict[str, Any] = {
    "augment": "none",
    "unlearning_lr": 0.5,
    "unlearning_epochs": 4,
    "stop_accuracy": 0.01,
    "recovering_epochs": 4,
    "recovering_lr": 1.0,
}


def quick(**changes: Any) -> RNPConfig:
    return RNPConfig(**{**QUICK, **changes})


def make_network(norm: Any = nn.BatchNorm2d, steps: int = 8, dropout: float = 0.0) -> nn.Module:
    """Two convolutions that know the task of the bars, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = nn.Sequential(
            nn.Conv2d(1, 6, 3, stride=2, padding=1),
            norm(6),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False),
            norm(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(32, 4),
        )
        optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(network(IMAGES), LABELS).backward()
            optimizer.step()
        optimizer.zero_grad()
    return network.eval()


def logits_of(weights: dict[str, Tensor], masks: Tensor) -> Tensor:
    """The network above with batch statistics, and masks on the scales only."""
    x = F.conv2d(IMAGES, weights["0.weight"], weights["0.bias"], 2, 1)
    x = F.batch_norm(x, None, None, weights["1.weight"] * masks[:6], weights["1.bias"], True)
    x = F.conv2d(x.relu(), weights["3.weight"], None, 2, 1)
    x = F.batch_norm(x, None, None, weights["4.weight"] * masks[6:], weights["4.bias"], True)
    return F.linear(x.relu().flatten(1), weights["8.weight"], weights["8.bias"])


def masks_by_hand(network: nn.Module, config: RNPConfig) -> Tensor:
    """Unlearning and recovering written out, one batch in a pass."""
    weights = {name: p.detach().clone() for name, p in network.named_parameters()}
    speeds = {name: torch.zeros_like(w) for name, w in weights.items()}
    for epoch in range(config.unlearning_epochs):
        leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
        loss = -F.cross_entropy(logits_of(leaves, torch.ones(14)), LABELS)
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        length = torch.cat([g.flatten() for g in gradients]).norm().item()
        shortened = min(1.0, config.clip_norm / length)
        rate = config.unlearning_lr * (1.0 if epoch < config.decay_epochs else 0.1)
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
            step = shortened * gradient + config.unlearning_weight_decay * weight
            speeds[name] = config.unlearning_momentum * speeds[name] + step
            weights[name] = weight - rate * speeds[name]
    masks, speed = torch.ones(14), torch.zeros(14)
    for _ in range(config.recovering_epochs):
        leaf = masks.clone().requires_grad_()
        loss = config.alpha * F.cross_entropy(logits_of(weights, leaf), LABELS)
        (gradient,) = torch.autograd.grad(loss, leaf)
        speed = config.recovering_momentum * speed + gradient
        masks = (masks - config.recovering_lr * speed).clamp(0, 1)
    return masks


def positions(result: BaselineResult) -> list[int]:
    return [index + (6 if name == "3" else 0) for name, index in result.pruned]


@pytest.mark.parametrize(
    "options",
    [
        {"unlearning_epochs": 1, "recovering_epochs": 1, "recovering_lr": 10.0},
        {"decay_epochs": 1, "unlearning_weight_decay": 0.5, "unlearning_momentum": 0.5},
        {"clip_norm": 0.1, "unlearning_lr": 5.0, "alpha": 0.5, "recovering_momentum": 0.0},
    ],
    ids=["one step each", "decay", "clipped"],
)
def test_the_masks_are_those_of_the_stages_by_hand(options: dict[str, Any]) -> None:
    network = make_network()
    config = quick(rule="fixed", threshold=0.9999, **options)
    expected = masks_by_hand(network, config)
    result = rnp(network, DATA, config=config)
    assert 0 < len(result.pruned) < 14
    assert sorted(positions(result)) == (expected <= 0.9999).nonzero().flatten().tolist()
    torch.testing.assert_close(
        torch.tensor(result.scores), expected[positions(result)], rtol=1e-3, atol=1e-4
    )
    assert result.scores == sorted(result.scores)
    assert result.details["unlearning_epochs"] == config.unlearning_epochs
    assert result.details["threshold"] == 0.9999


def test_only_the_scales_of_pruned_channels_change() -> None:
    network = make_network()
    result = rnp(network, DATA, config=quick(rule="fixed", threshold=0.9))
    assert result.pruned
    expected = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for name, index in result.pruned:
        expected[{"0": "1.weight", "3": "4.weight"}[name]][index] = 0.0
    found = result.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    before, after = accuracy(network), accuracy(result.model)
    assert (result.accuracy_before, result.accuracy_after) == pytest.approx((before, after))


def accuracy(network: nn.Module) -> float:
    with torch.no_grad():
        return float((network(IMAGES).argmax(1) == LABELS).float().mean())


@pytest.mark.parametrize("max_drop", [0.0, 0.05, 1.0])
def test_the_largest_threshold_that_costs_little_enough(max_drop: float) -> None:
    network, options = make_network(), {"recovering_lr": 4.0}
    everything = rnp(network, DATA, config=quick(rule="fixed", threshold=0.9999, **options))
    masks = dict(zip(everything.pruned, everything.scores, strict=True))
    accuracies, pruned = [], []
    for step in range(19):
        model = copy.deepcopy(network)
        pruned.append([place for place, mask in masks.items() if mask <= step / 20])
        for name, index in pruned[-1]:
            model[{"0": 1, "3": 4}[name]].weight.data[index] = 0.0
        accuracies.append(accuracy(model))
    assert len(set(accuracies)) > 2
    best = max(n for n, a in enumerate(accuracies) if a >= accuracy(network) - max_drop - 1e-6)
    result = rnp(network, DATA, config=quick(max_drop=max_drop, **options))
    assert result.pruned == pruned[best]
    assert result.details["threshold"] == pytest.approx(best / 20)
    assert result.accuracy_after == pytest.approx(accuracies[best])


def test_a_drop_of_just_the_allowed_is_allowed() -> None:
    network = make_network()
    free = rnp(network, DATA, config=quick(max_drop=1.0))
    drop = free.accuracy_before - free.accuracy_after
    assert drop > 0
    assert rnp(network, DATA, config=quick(max_drop=drop)).pruned == free.pruned
    tighter = rnp(network, DATA, config=quick(max_drop=drop - 0.001))
    assert len(tighter.pruned) < len(free.pruned)


def test_nothing_is_pruned_where_every_threshold_costs_too_much() -> None:
    network = make_network()
    # Masks rise or fall by far more than 1 at once, to 1 or to 0.
    config = quick(recovering_lr=1e9, recovering_epochs=1)
    fixed = rnp(network, DATA, config=replace(config, rule="fixed"))
    assert fixed.accuracy_after < fixed.accuracy_before - config.max_drop
    result = rnp(network, DATA, config=config)
    assert result.pruned == result.scores == []
    assert math.isnan(result.details["threshold"])
    assert result.accuracy_after == result.accuracy_before
    assert same(snapshot(result.model), snapshot(network))


@pytest.mark.parametrize(("rule", "amount", "count"), [("number", 4, 4), ("share", 0.2, 3)])
def test_a_number_or_share_of_the_lowest_masks(rule: Any, amount: float, count: int) -> None:
    network = make_network()
    network[1] = nn.GroupNorm(2, 6)  # RNP cannot prune its filters, but 20% are those of all 14
    masks = rnp(network, DATA, config=quick(rule="fixed", threshold=0.9999))
    result = rnp(network, DATA, config=quick(rule=rule, amount=amount))
    assert result.pruned == masks.pruned[:count]
    assert result.scores == masks.scores[:count]
    assert math.isnan(result.details["threshold"])
    assert not result.model[4].weight[[index for _, index in result.pruned]].any()


def test_amounts_that_do_not_fit_are_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match=r"`amount` to be a whole number of filters.*'number'"):
        quick(rule="number", amount=1.5)
    with pytest.raises(ValueError, match="`amount` to leave one of the 14 filters"):
        rnp(make_network(), DATA, config=quick(rule="number", amount=14, unlearning_lr=1e38))


def test_unlearning_ends_with_the_first_pass_below_the_stop_accuracy() -> None:
    network = make_network()
    options = {"recovering_epochs": 1, "rule": "fixed"}
    seen = []
    while not seen or seen[-1] > 0.3:
        details = rnp(
            network, DATA, config=quick(unlearning_epochs=len(seen) + 1, **options)
        ).details
        seen.append(details["unlearning_accuracy"])
    assert len(seen) > 2
    config = quick(unlearning_epochs=20, stop_accuracy=0.3, **options)
    details = rnp(network, DATA, config=config).details
    assert details["unlearning_epochs"] == len(seen)
    assert details["unlearning_accuracy"] == pytest.approx(seen[-1])


@pytest.mark.parametrize("training", [False, True])
def test_the_model_and_the_random_state_stay(training: bool) -> None:
    network = make_network(dropout=0.3).train(training)
    network[0].weight.requires_grad_(False)
    network[1].eval()
    before, state = snapshot(network), torch.get_rng_state()
    result = rnp(network, loader(shuffle=True), config=quick(batch_size=16, augment="crop-flip"))
    assert same(before, snapshot(network))
    assert torch.equal(torch.get_rng_state(), state)
    assert snapshot(result.model)["modes"] == before["modes"]
    assert snapshot(result.model)["gradients"] == before["gradients"]


def test_the_seed_decides() -> None:
    network = make_network(dropout=0.3)
    options = {"batch_size": 16, "augment": "crop-flip", "rule": "fixed", "threshold": 0.99}
    first, second, other = (
        rnp(network, loader(size, shuffle=size == 7), config=quick(seed=seed, **options))
        for size, seed in ((16, 0), (7, 0), (16, 1))
    )
    assert (first.pruned, first.scores) == (second.pruned, second.scores)
    assert first.scores != other.scores


def test_layers_without_batch_normalization_take_no_part() -> None:
    network = make_network()
    network[1] = nn.GroupNorm(2, 6)
    result = rnp(network, DATA, config=quick(rule="fixed", threshold=0.9999))
    assert {name for name, _ in result.pruned} == {"3"}


@pytest.mark.parametrize(
    "norm",
    [
        lambda channels: nn.Identity(),
        lambda channels: nn.GroupNorm(2, channels),
        lambda channels: nn.InstanceNorm2d(channels, affine=True),
        lambda channels: nn.BatchNorm2d(channels, affine=False),
    ],
    ids=["none", "group", "instance", "no scale"],
)
def test_networks_without_batch_normalization_are_refused(norm: Any) -> None:
    network = make_network(norm, steps=1)
    with pytest.raises(ValueError, match="to be followed by batch normalization with a scale"):
        rnp(network, DATA, config=quick())


def test_synchronized_normalization_needs_no_other_process() -> None:
    network = nn.SyncBatchNorm.convert_sync_batchnorm(make_network())
    result = rnp(network, DATA, config=quick(rule="fixed", threshold=0.9))
    plain = rnp(make_network(), DATA, config=quick(rule="fixed", threshold=0.9))
    assert result.pruned == plain.pruned
    for model in (network, result.model):
        assert not any("forward" in vars(module) for module in model.modules())


def test_the_network_in_a_module_and_how_it_is_called() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.other = make_network(), nn.Linear(1, 1)

    batches = [{"pixels": IMAGES, "species": LABELS}]
    config = quick(rule="fixed", threshold=0.9)
    result = rnp(
        Holder(),
        batches,
        config=config,
        network="net",
        forward=lambda network, images: {"logits": network(images)},
        unpack=lambda batch: (batch["pixels"], batch["species"]),
    )
    plain = rnp(make_network(), DATA, config=config)
    assert result.pruned == [(f"net.{name}", index) for name, index in plain.pruned]


def test_a_loss_that_overflows_in_unlearning() -> None:
    network = make_network()
    before = snapshot(network)
    with pytest.raises(ArithmeticError, match=r"finite in unlearning.*in pass 2.*unlearning_lr"):
        rnp(network, DATA, config=quick(unlearning_lr=1e38))
    assert same(before, snapshot(network))


def test_a_gradient_that_overflows_in_recovering() -> None:
    config = quick(unlearning_lr=1e38, unlearning_epochs=1)
    with pytest.raises(ArithmeticError, match=r"finite in recovering.*in pass 1.*stop_accuracy"):
        rnp(make_network(), DATA, config=config)


def test_what_does_not_fit_is_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match="labels to be below 4"):
        rnp(make_network(), DefenseSet(IMAGES, LABELS + 1))
    with pytest.raises(ValueError, match="spread over devices"):
        rnp(nn.DataParallel(make_network()), DATA)
    with pytest.raises(ValueError, match="to have parameters"):
        rnp(nn.Flatten(), DATA)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("augment", "mixup", "one of ('none', 'crop', 'crop-flip')"),
        ("rule", "asr", "one of ('threshold', 'fixed', 'number', 'share')"),
        ("unlearning_epochs", 0, "a whole number of at least 1"),
        ("decay_epochs", 1.5, "a whole number of at least 1"),
        ("recovering_epochs", 0, "a whole number of at least 1"),
        ("batch_size", 2, "a whole number of at least 3, so that no batch holds a single image"),
        ("unlearning_lr", 0.0, "a number above 0"),
        ("clip_norm", math.inf, "a number above 0"),
        ("recovering_lr", math.nan, "a number above 0"),
        ("alpha", -1.0, "a number above 0"),
        ("unlearning_weight_decay", -0.1, "a number of at least 0"),
        ("unlearning_momentum", 1.0, "a number from 0 to below 1"),
        ("recovering_momentum", -0.1, "a number from 0 to below 1"),
        ("threshold", 1.0, "a number from 0 to below 1"),
        ("stop_accuracy", 0.0, "a number above 0 and below 1"),
        ("max_drop", 1.1, "a number from 0 to 1"),
    ],
)
def test_options_out_of_range(option: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=f"Expected argument `{option}`") as caught:
        RNPConfig(**{option: value})
    assert f"to be {expected}, but got {value!r}." in str(caught.value)

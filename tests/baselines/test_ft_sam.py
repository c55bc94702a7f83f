from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from distributed_script import small_network
from helpers import images_and_labels, loader, same, snapshot
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mnp import DefenseSet
from lightning_mnp.baselines import FTSAMConfig, ft_sam
from lightning_mnp.baselines.ft_sam import sharpest_change

IMAGES, LABELS = images_and_labels(40)
DATA = DefenseSet(IMAGES, LABELS)


def make_network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layers = nn.Conv2d(1, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6), nn.Tanh()
        network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(54, 4))
    nn.init.uniform_(network.get_parameter("1.weight"), 0.5, 1.5)
    nn.init.uniform_(network.get_parameter("1.bias"), -0.5, 0.5)
    return network.eval()


def quick(**changes: Any) -> FTSAMConfig:
    return FTSAMConfig(**{"augment": "none", "epochs": 2, **changes})


def loss_of(weights: dict[str, Tensor], smoothing: float) -> Tensor:
    """The smoothed loss of the network above, with the statistics of the batch."""
    x = F.conv2d(IMAGES, weights["0.weight"], stride=2)
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    scale, shift = (weights[f"1.{name}"].view(1, -1, 1, 1) for name in ("weight", "bias"))
    x = ((x - mean) / (var + 1e-5).sqrt() * scale + shift).tanh().flatten(1)
    logs = (x @ weights["4.weight"].T + weights["4.bias"]).log_softmax(1)
    right = logs[range(40), LABELS].mean()
    return -(1 - smoothing) * right - smoothing * logs.mean()


def gradients_of(weights: dict[str, Tensor], smoothing: float) -> dict[str, Tensor]:
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    found = torch.autograd.grad(loss_of(leaves, smoothing), list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


def test_training_by_hand() -> None:
    network = make_network()
    config = quick(epochs=3, lr=0.1, rho=0.7, weight_decay=0.05, momentum=0.8)
    weights = {name: p.detach().clone() for name, p in network.named_parameters()}
    speeds = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    mean = torch.zeros(6)
    for epoch in range(3):
        maps = F.conv2d(IMAGES, weights["0.weight"], stride=2)
        mean = 0.9 * mean + 0.1 * maps.mean((0, 2, 3))  # once for each batch, at w
        first = gradients_of(weights, 0.1)
        length = math.sqrt(
            sum(
                float((weights[name].flatten()[i] * g.flatten()[i]) ** 2)
                for name, g in first.items()
                for i in range(g.numel())
            )
        )
        changed = {
            name: weights[name] + 0.7 * weights[name] ** 2 * g / length for name, g in first.items()
        }
        rate = 0.1 * (1 + math.cos(math.pi * epoch / 3)) / 2
        for name, gradient in gradients_of(changed, 0.1).items():
            speeds[name] = 0.8 * speeds[name] + gradient + 0.05 * weights[name]
            weights[name] = weights[name] - rate * speeds[name]
    result = ft_sam(network, DATA, config=config)
    for name, weight in weights.items():
        torch.testing.assert_close(result.model.get_parameter(name), weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(result.model.get_buffer("1.running_mean"), mean)
    assert int(result.model.get_buffer("1.num_batches_tracked")) == 3
    assert result.details["sharp_loss"] > result.details["loss"]


def test_no_change_of_the_same_length_raises_the_loss_more() -> None:
    weights, gradients = [torch.rand(3, 2) - 0.5, torch.rand(4)], [torch.rand(3, 2), torch.rand(4)]
    best = sharpest_change(weights, gradients, rho=0.3)

    def size(changes: list[Tensor]) -> float:
        pairs = zip(changes, weights, strict=True)
        return float(torch.cat([(e / w).flatten() for e, w in pairs]).norm())

    def rise(changes: list[Tensor]) -> float:
        return float(sum((e * g).sum() for e, g in zip(changes, gradients, strict=True)))

    assert size(best) == pytest.approx(0.3, rel=1e-5)
    for _ in range(50):
        other = [torch.randn(3, 2), torch.randn(4)]
        assert rise([0.3 * e / size(other) for e in other]) < rise(best)
    nothing = sharpest_change(weights, [torch.zeros(3, 2), torch.zeros(4)], rho=0.3)
    assert not any(change.any() for change in nothing)


@pytest.mark.parametrize("training", [False, True])
def test_the_model_and_the_random_state_stay(training: bool) -> None:
    network = nn.Sequential(small_network(), nn.Dropout(0.3)).train(training)
    network.get_parameter("0.0.weight").requires_grad_(False)
    before, state = snapshot(network), torch.get_rng_state()
    result = ft_sam(network, loader(shuffle=True), config=quick(batch_size=16, augment="crop-flip"))
    assert same(before, snapshot(network))
    assert torch.equal(torch.get_rng_state(), state)
    after = snapshot(result.model)
    assert all(after[key] == before[key] for key in ("modes", "gradients", "hooks"))
    assert all(parameter.grad is None for parameter in result.model.parameters())
    # A frozen weight is trained as well.
    assert not torch.equal(after["tensors"]["0.0.weight"], before["tensors"]["0.0.weight"])
    assert result.pruned == result.scores == []


def test_the_seed_decides() -> None:
    first, second, other = (
        ft_sam(small_network(), loader(size), config=quick(seed=seed, batch_size=16))
        for size, seed in ((16, 0), (7, 0), (16, 1))
    )
    assert same(snapshot(first.model), snapshot(second.model))
    assert not same(snapshot(first.model), snapshot(other.model))


def test_accuracy_is_that_of_the_copy_in_evaluation_mode() -> None:
    network = small_network()
    result = ft_sam(network, DATA, config=quick(lr=0.5))
    with torch.no_grad():
        for model, found in (
            (network, result.accuracy_before),
            (result.model, result.accuracy_after),
        ):
            assert found == pytest.approx(float((model(IMAGES).argmax(1) == LABELS).float().mean()))


def test_networks_that_change_images_in_place_or_leave_weights_unused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.unused = small_network(), nn.Linear(2, 2)

        def forward(self, images: Tensor) -> Tensor:
            found: Tensor = self.net(images.mul_(2.0))
            return found

    odd = ft_sam(Odd().eval(), DATA, config=quick())
    doubled = DefenseSet(2 * IMAGES, LABELS)
    plain = ft_sam(small_network(), doubled, config=quick())
    assert odd.details == pytest.approx(plain.details, rel=1e-3)
    assert odd.model.get_parameter("unused.weight").grad is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": 1e38}, r"loss at the changed weights in pass 1 of FT-SAM.*Lower `rho` or `lr`"),
        ({"lr": 1e30}, r"Expected the loss in pass 2 of FT-SAM to be finite, but it is"),
        ({"lr": 1e30, "epochs": 1}, r"every output on the defense set.*Lower the learning rates"),
    ],
)
def test_what_overflows(options: dict[str, Any], message: str) -> None:
    network = small_network()
    before = snapshot(network)
    with pytest.raises(ArithmeticError, match=message):
        ft_sam(network, DATA, config=quick(**options))
    assert same(before, snapshot(network))


def test_what_does_not_fit_is_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match="labels to be below 4"):
        ft_sam(small_network(), DefenseSet(IMAGES, LABELS + 1))


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("augment", "mixup", "one of ('none', 'crop', 'crop-flip')"),
        ("batch_size", 2, "a whole number of at least 3, so that no batch holds a single image"),
        ("epochs", 0, "a whole number of at least 1"),
        ("lr", 0.0, "a number above 0"),
        ("momentum", 1.0, "a number from 0 to below 1"),
        ("weight_decay", -0.1, "a number of at least 0"),
        ("rho", 0.0, "a number above 0"),
        ("label_smoothing", 1.0, "a number from 0 to below 1"),
    ],
)
def test_options_out_of_range(option: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=f"Expected argument `{option}`") as caught:
        FTSAMConfig(**{option: value})
    assert f"to be {expected}, but got {value!r}." in str(caught.value)

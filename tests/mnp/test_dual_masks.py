from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from helpers import config_of
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mnp.mnp.dual_masks import DualMask
from lightning_mnp.mnp.updates import PlainUpdates
from lightning_mnp.surgery.layers import find_filter_layers
from lightning_mnp.surgery.masked_network import MaskedNetwork, Weights

IMAGES = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 2
UPDATES = PlainUpdates()


def make_masked() -> MaskedNetwork:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 6, 2, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 2),
    ).eval()
    return MaskedNetwork(network, find_filter_layers(network, IMAGES))


def make(preserving: bool, masked: MaskedNetwork | None = None, **options: Any) -> DualMask:
    masked = masked or make_masked()
    return DualMask(masked, masked.weights(), config_of(**options), preserving)


def objective(mask: DualMask, values: Tensor, weights: Weights) -> Tensor:
    """Eq. 5 and 7 written out for the network above."""
    penalty = mask.config.masks.penalty
    x = F.conv2d(IMAGES, weights["0.weight"], weights["0.bias"])
    x = F.batch_norm(x, None, None, weights["1.weight"], weights["1.bias"], training=True)
    x = (x * values[:4, None, None]).relu()
    x = F.conv_transpose2d(x, weights["3.weight"], weights["3.bias"], groups=2)
    x = x * values[4:, None, None]
    logits = F.linear(x.mean((2, 3)), weights["6.weight"], weights["6.bias"])
    first = weights["0.weight"].square().sum((1, 2, 3)).sqrt()
    # Outputs 0-2 come from inputs 0-1, outputs 3-5 from inputs 2-3.
    parts = weights["3.weight"][:2], weights["3.weight"][2:]
    second = torch.cat([part.square().sum((0, 2, 3)).sqrt() for part in parts])
    magnitude = (torch.cat([first, second]) * values).abs().sum()
    loss = F.cross_entropy(logits, LABELS)
    return loss - penalty * magnitude if mask.preserving else loss + penalty * magnitude


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("preserving", [False, True])
def test_steps_are_equations_5_and_7_by_hand(preserving: bool, momentum: float) -> None:
    mask = make(preserving, penalty=0.05, mask_lr=0.5, mask_momentum=momentum)
    weights = mask.masked.weights()
    values, velocity = torch.ones(10), torch.zeros(10)
    for _ in range(4):
        leaf = values.clone().requires_grad_()
        loss = objective(mask, leaf, weights)
        (gradient,) = torch.autograd.grad(loss, leaf)
        velocity = momentum * velocity + gradient
        values = values - 0.5 * velocity
        values = values.clamp(1, 2) if preserving else values.clamp(0, 1)
        metrics = mask.step(IMAGES, LABELS, UPDATES)
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
        torch.testing.assert_close(mask.values.detach(), values, rtol=1e-4, atol=1e-5)
    assert (values != 1).any()


def test_norms_are_those_of_the_weights_that_are_masked() -> None:
    masked = make_masked()
    doubled = {name: 2 * weight for name, weight in masked.weights().items()}
    first = DualMask(masked, masked.weights(), config_of(), False)
    second = DualMask(masked, doubled, config_of(), False)
    torch.testing.assert_close(second.norms, 2 * first.norms)


@pytest.mark.parametrize(("preserving", "low", "high"), [(False, 0.0, 1.0), (True, 1.0, 2.0)])
def test_masks_stay_in_their_range_and_reach_its_end(
    preserving: bool, low: float, high: float
) -> None:
    mask = make(preserving, penalty=5.0, mask_lr=0.5, mask_momentum=0.9)
    assert torch.equal(mask.values, torch.ones(10))
    for _ in range(10):
        mask.step(IMAGES, LABELS, UPDATES)
        assert mask.values.min() >= low
        assert mask.values.max() <= high
    # Such a penalty outweighs the loss: M1 falls to 0, M2 rises to 2.
    assert (mask.values == (high if preserving else low)).all()


def test_metrics_are_those_before_the_step() -> None:
    mask = make(False, penalty=0.0)
    logits = mask.masked(IMAGES)
    metrics = mask.step(IMAGES, LABELS, UPDATES)
    assert metrics["accuracy"] == (logits.argmax(1) == LABELS).float().mean()
    assert metrics["loss"] == pytest.approx(F.cross_entropy(logits, LABELS).item())


def test_weights_and_network_are_unchanged() -> None:
    masked = make_masked()
    weights = {name: weight + 1 for name, weight in masked.weights().items()}
    copies = {name: weight.clone() for name, weight in weights.items()}
    state = {name: tensor.clone() for name, tensor in masked.network.state_dict().items()}
    mask = DualMask(masked, weights, config_of(), False)
    for _ in range(3):
        mask.step(IMAGES, LABELS, UPDATES)
    assert all(torch.equal(weights[name], copies[name]) for name in weights)
    for name, tensor in masked.network.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert all(weight.grad is None for weight in weights.values())
    assert all(parameter.grad is None for parameter in masked.network.parameters())


# --- non-finite numbers ------------------------------------------------------------------------


@pytest.mark.parametrize("preserving", [False, True])
def test_a_loss_that_is_not_finite_ends_it_with_the_last_mask(preserving: bool) -> None:
    mask = make(preserving)
    mask.step(IMAGES, LABELS, UPDATES)
    before = mask.values.detach().clone()
    metrics = mask.step(IMAGES * math.nan, LABELS, UPDATES)
    assert math.isnan(metrics["loss"])
    assert mask.stopped == "the loss became nan"
    metrics = mask.step(IMAGES, LABELS, UPDATES)
    assert math.isnan(metrics["loss"])
    assert math.isnan(metrics["accuracy"])
    assert torch.equal(mask.values, before)


@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_ends_it_with_the_last_mask(factor: float) -> None:
    class Broken(PlainUpdates):
        def backward(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
            super().backward(loss, optimizer)
            mask.values.grad[3] = factor  # type: ignore[index]

    mask = make(False)
    mask.step(IMAGES, LABELS, UPDATES)
    before = mask.values.detach().clone()
    assert math.isfinite(mask.step(IMAGES, LABELS, Broken())["loss"])
    assert mask.stopped == "a gradient was not finite"
    assert torch.equal(mask.values, before)


# --- again, and on -----------------------------------------------------------------------------


def test_restart_repeats_the_run() -> None:
    masked = make_masked()
    mask = make(True, masked, mask_momentum=0.9, penalty=0.05)
    runs = []
    for _ in range(2):
        losses = [mask.step(IMAGES, LABELS, UPDATES)["loss"] for _ in range(3)]
        runs.append((losses, mask.values.detach().clone()))
        mask.stopped = "for a reason"
        mask.restart(masked.weights())
        assert mask.stopped == ""
        assert torch.equal(mask.values, torch.ones(10))
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize("preserving", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_saved_run_goes_on_bit_for_bit(preserving: bool, momentum: float) -> None:
    masked = make_masked()
    options = {"mask_momentum": momentum, "penalty": 0.05}
    first, second = make(preserving, masked, **options), make(preserving, masked, **options)
    for _ in range(2):
        first.step(IMAGES, LABELS, UPDATES)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(2):
        assert first.step(IMAGES, LABELS, UPDATES) == second.step(IMAGES, LABELS, UPDATES)
    assert torch.equal(first.values, second.values)
    first.stopped = "enough"
    second.load_state_dict(first.state_dict())
    assert second.stopped == "enough"
    assert second.values.requires_grad

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from helpers import config_of, images_and_labels
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mnp.defense_data.defense_set import DefenseSet
from lightning_mnp.mnp.suppression import CleanSuppression, suppression_parts
from lightning_mnp.mnp.updates import PlainUpdates
from lightning_mnp.surgery.layers import find_filter_layers
from lightning_mnp.surgery.masked_network import MaskedNetwork

IMAGES = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 2
UPDATES = PlainUpdates()


def make_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)
    )


def make(network: nn.Module | None = None, **options: Any) -> CleanSuppression:
    network = network or make_network()
    masked = MaskedNetwork(network, find_filter_layers(network, IMAGES))
    return CleanSuppression(masked, config_of(**{"stop_accuracy": None, **options}))


def snapshot(stage: CleanSuppression) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in stage.weights.items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def state_bytes(network: nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    return buffer.getvalue()


class Fragile(nn.Module):
    """Its logits become infinite as soon as a weight leaves where it was."""

    def __init__(self, patience: float = 0.0) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
        self.patience = patience
        self.register_buffer("start", self.conv.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.conv(x).mean((2, 3)))
        moved = (self.conv.weight - self.start).abs().max() > self.patience
        return logits + math.inf if moved else logits


# --- one step ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mu", [0.0, 0.001, 0.3])
def test_a_step_is_equation_6_by_hand(mu: float) -> None:
    network, rate = make_network(), 0.05
    stage = make(copy.deepcopy(network), suppression_lr=rate, suppression_momentum=0.0, mu=mu)
    network.train()
    for _ in range(3):
        result = stage.step(IMAGES, LABELS, 8, UPDATES)
        loss = F.cross_entropy(network(IMAGES), LABELS)
        assert result["loss"] == pytest.approx(loss.item(), rel=1e-5)
        # What is maximized is the loss minus mu times the squared norm of all weights.
        squares = torch.stack([w.square().sum() for w in network.parameters()]).sum()
        gradients = torch.autograd.grad(loss - mu * squares, list(network.parameters()))
        with torch.no_grad():
            for weight, gradient in zip(network.parameters(), gradients, strict=True):
                weight.add_(rate * gradient)
        for name, weight in network.named_parameters():
            torch.testing.assert_close(stage.weights[name], weight, rtol=1e-4, atol=1e-6)
    assert stage.steps == 3
    assert stage.stopped == ""


def test_momentum_is_that_of_sgd() -> None:
    network, rate, momentum, mu = make_network(), 0.05, 0.9, 0.01
    stage = make(copy.deepcopy(network), suppression_lr=rate, suppression_momentum=momentum, mu=mu)
    network.train()
    velocity = [torch.zeros_like(w) for w in network.parameters()]
    for _ in range(3):
        stage.step(IMAGES, LABELS, 8, UPDATES)
        loss = F.cross_entropy(network(IMAGES), LABELS)
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        with torch.no_grad():
            for weight, gradient, v in zip(network.parameters(), gradients, velocity, strict=True):
                v.mul_(momentum).add_(gradient - 2 * mu * weight)
                weight.add_(rate * v)
    for name, weight in network.named_parameters():
        torch.testing.assert_close(stage.weights[name], weight, rtol=1e-3, atol=1e-5)


def test_the_network_and_its_frozen_weights_stay() -> None:
    network = make_network().train()
    network[0].requires_grad_(False)
    before = state_bytes(network)
    stage = make(network)
    frozen = stage.weights["0.weight"].detach().clone()
    stage.step(IMAGES, LABELS, 8, UPDATES)
    assert state_bytes(network) == before
    assert network.training
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not torch.equal(stage.weights["0.weight"], frozen)  # theta is all of the weights
    assert not network[0].weight.requires_grad


# --- when it stops -----------------------------------------------------------------------------


def constant_network(favorite: int) -> nn.Sequential:
    network = make_network()
    with torch.no_grad():
        network[4].weight.zero_()
        network[4].bias.copy_(torch.tensor([1.0, 0.0] if favorite == 0 else [0.0, 1.0]))
    return network


def test_accuracy_is_taken_over_the_latest_pass() -> None:
    stage = make(constant_network(0), suppression_lr=1e-6, mu=0.0)
    assert math.isnan(stage.accuracy)
    labels = torch.tensor([0, 0, 0, 1])
    assert stage.step(IMAGES[:4], labels, 8, UPDATES)["accuracy"] == 3 / 4
    assert stage.step(IMAGES[4:], 0 * labels, 8, UPDATES)["accuracy"] == 7 / 8
    assert stage.step(IMAGES[:2], 0 * labels[:2] + 1, 8, UPDATES)["accuracy"] == 7 / 10
    # A pass of 8 is covered by the last 4 + 2 + 4 images: the oldest batch has left.
    assert stage.curve == [7 / 8]
    assert stage.step(IMAGES[:4], 0 * labels + 1, 8, UPDATES)["accuracy"] == 4 / 10
    assert stage.step(IMAGES[:2], 0 * labels[:2], 8, UPDATES)["accuracy"] == 2 / 8
    assert stage.curve == [7 / 8, 2 / 8]  # after 8 and after 16 images
    stage.restart()
    assert stage.curve == []


@pytest.mark.parametrize(("stop_accuracy", "stops"), [(0.5, True), (0.49, False)])
def test_stop_accuracy_counts_from_a_full_pass_on(stop_accuracy: float, stops: bool) -> None:
    stage = make(constant_network(0), suppression_lr=1e-6, mu=0.0, stop_accuracy=stop_accuracy)
    ones, zeros = torch.ones(4).long(), torch.zeros(4).long()
    stage.step(IMAGES[:4], ones, 8, UPDATES)  # nothing right, but half a pass
    assert stage.stopped == ""
    before = snapshot(stage)
    result = stage.step(IMAGES[4:], zeros, 8, UPDATES)
    assert result["accuracy"] == stage.accuracy == 0.5
    assert stage.stopped == ("the accuracy fell to `stop_accuracy`" if stops else "")
    assert stage.steps == (1 if stops else 2)
    assert same(before, snapshot(stage)) == stops
    if stops:
        assert all(weight.grad is None for weight in stage.weights.values())


def test_it_unlearns_until_the_threshold() -> None:
    network = make_network()
    images = IMAGES + LABELS[:, None, None, None]
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for _ in range(20):
        UPDATES.backward(F.cross_entropy(network(images), LABELS), optimizer)
        UPDATES.step(optimizer)
    stage = make(network, stop_accuracy=0.2, suppression_lr=0.05)
    losses = []
    while not stage.stopped:
        losses.append(stage.step(images, LABELS, 8, UPDATES)["loss"])
        assert stage.steps < 100
    assert stage.steps > 1
    assert stage.accuracy <= 0.2
    assert losses[-1] > losses[0]


def test_an_end_from_outside_keeps_the_first_reason() -> None:
    stage = make()
    stage.step(IMAGES, LABELS, 8, UPDATES)
    assert any(weight.grad is not None for weight in stage.weights.values())
    stage.finish("all passes were made")
    stage.finish("later")
    assert stage.stopped == "all passes were made"
    assert all(weight.grad is None for weight in stage.weights.values())


# --- non-finite numbers ------------------------------------------------------------------------


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("mu", [0.0, 0.01])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_step_to_a_loss_that_is_not_finite_is_undone(
    momentum: float, mu: float, resumed: bool
) -> None:
    network = Fragile(patience=0.004)
    options = {"suppression_momentum": momentum, "mu": mu, "suppression_lr": 0.02}
    stage = make(network, **options)
    before = snapshot(stage)
    for _ in range(100):
        steps = stage.steps
        latest = snapshot(stage)
        if resumed:  # a run that goes on from a checkpoint can take its last step back, too
            state = copy.deepcopy(stage.state_dict())
            stage = make(network, **options)
            stage.load_state_dict(state)
        loss = stage.step(IMAGES, LABELS, 8, UPDATES)["loss"]
        if stage.stopped:
            break
        before = latest
    assert not math.isfinite(loss)
    assert stage.stopped in ("the loss became inf", "the loss became nan")
    assert stage.steps == steps - 1 > 0
    for name, weight in snapshot(stage).items():
        torch.testing.assert_close(weight, before[name], rtol=1e-5, atol=1e-6)
    assert torch.isfinite(stage.masked(IMAGES, weights=before)).all()


def test_a_first_loss_that_is_not_finite_changes_nothing() -> None:
    stage = make(Fragile(patience=-1.0), suppression_momentum=0.9)
    before = snapshot(stage)
    stage.step(IMAGES, LABELS, 8, UPDATES)
    assert stage.stopped.startswith("the loss became")
    assert stage.steps == 0
    assert same(before, snapshot(stage))


@pytest.mark.parametrize("factor", [1e4, math.inf, math.nan])
def test_a_step_longer_than_the_weights_is_refused(factor: float) -> None:
    class Steep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.conv(x).mean((2, 3)))
            if logits.requires_grad:
                logits.register_hook(lambda gradient: gradient * factor)
            return logits

    stage = make(Steep())
    before = snapshot(stage)
    result = stage.step(IMAGES, LABELS, 8, UPDATES)
    assert math.isfinite(result["loss"])
    assert stage.stopped.startswith("a step of ")
    assert stage.stopped.endswith("times the weights' norm was refused")
    assert stage.steps == 0
    assert same(before, snapshot(stage))
    assert all(weight.grad is None for weight in stage.weights.values())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_length_of_a_step_is_that_of_the_optimizers(momentum: float) -> None:
    rate = 0.05
    stage = make(suppression_momentum=momentum, suppression_lr=rate, mu=0.2)
    for _ in range(3):
        stage.step(IMAGES, LABELS, 8, UPDATES)
    before = snapshot(stage)
    loss = F.cross_entropy(stage.masked(IMAGES, weights=stage.weights), LABELS)
    UPDATES.backward(-loss, stage.optimizer)
    length = stage._relative_step()
    UPDATES.step(stage.optimizer)
    moved = sum(float((w - before[name]).square().sum()) for name, w in snapshot(stage).items())
    norm = sum(float(w.square().sum()) for w in before.values())
    assert length == pytest.approx(math.sqrt(moved / norm), rel=1e-4)


def test_a_step_that_is_long_by_momentum_alone_is_refused() -> None:
    stage = make(suppression_momentum=0.9, suppression_lr=1e-3)
    stage.step(IMAGES, LABELS, 8, UPDATES)
    for state in stage.optimizer.state.values():
        state["momentum_buffer"].mul_(1e6)
    before = snapshot(stage)
    stage.step(IMAGES, LABELS, 8, UPDATES)
    assert stage.stopped.startswith("a step of ")
    assert stage.steps == 1
    assert same(before, snapshot(stage))


def test_a_long_way_up_stays_finite() -> None:
    stage = make(suppression_lr=1.0, suppression_momentum=0.9)
    for _ in range(200):
        if stage.stopped:
            break
        stage.step(IMAGES, LABELS, 8, UPDATES)
    assert all(bool(torch.isfinite(weight).all()) for weight in stage.weights.values())


# --- again, and on -----------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_restart_repeats_the_run(momentum: float) -> None:
    stage = make(suppression_momentum=momentum)
    pointers = {name: weight.data_ptr() for name, weight in stage.weights.items()}
    runs = []
    for _ in range(2):
        assert (stage.steps, stage.stopped) == (0, "")
        assert math.isnan(stage.accuracy)
        assert same(snapshot(stage), stage.masked.weights())
        losses = [stage.step(IMAGES, LABELS, 8, UPDATES)["loss"] for _ in range(3)]
        stage.finish("done")
        runs.append((losses, snapshot(stage)))
        stage.restart()
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])
    assert pointers == {name: weight.data_ptr() for name, weight in stage.weights.items()}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_saved_run_goes_on_bit_for_bit(momentum: float) -> None:
    network = make_network()
    options = {"suppression_momentum": momentum, "suppression_lr": 0.05}
    first, second = make(network, **options), make(network, **options)
    for _ in range(3):
        first.step(IMAGES[:4], LABELS[:4], 8, UPDATES)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert (second.steps, second.accuracy) == (first.steps, first.accuracy)
    for _ in range(3):
        assert first.step(IMAGES, LABELS, 8, UPDATES) == second.step(IMAGES, LABELS, 8, UPDATES)
    assert same(snapshot(first), snapshot(second))
    first.finish("enough")
    second.load_state_dict(first.state_dict())
    assert second.stopped == "enough"
    assert all(weight.requires_grad for weight in second.weights.values())


def test_parts_are_as_many_as_there_are_images_for() -> None:
    few, more = (DefenseSet(*images_and_labels(count)) for count in (8, 40))
    config = config_of(suppression_parts=4)
    assert suppression_parts(few, config) == 2  # three images at least
    assert suppression_parts(more, config) == 4

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from helpers import images_and_labels, snapshot
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mnp.baselines import TuningConfig
from lightning_mnp.baselines.tuning import tune
from lightning_mnp.baselines.workbench import Workbench
from lightning_mnp.defense_data.defense_set import DefenseSet

IMAGES, LABELS = images_and_labels(24)
DATA = DefenseSet(IMAGES, LABELS)


def make_network(dropout: float = 0.0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        layers = nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()
        return nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(36, 4)).eval()


def options(**changes: Any) -> TuningConfig:
    given = {"epochs": 3, "augment": "none", "lr": 0.1, "weight_decay": 0.1}
    return TuningConfig(**{**given, **changes})


def bench_of(network: nn.Module, config: TuningConfig) -> Workbench:
    return Workbench(
        network, DATA, seed=config.seed, batch_size=config.batch_size, augment=config.augment
    )


def test_the_steps_are_those_of_sgd_by_hand() -> None:
    network: Any = make_network()
    config = options(momentum=0.7)
    bench = bench_of(network, config)
    found = tune(bench, config)
    by_hand: Any = copy.deepcopy(network).train()
    speeds = [torch.zeros_like(p) for p in by_hand.parameters()]
    for epoch in range(3):
        loss = F.cross_entropy(by_hand(IMAGES), LABELS)
        gradients = torch.autograd.grad(loss, list(by_hand.parameters()))
        lr = 0.1 * (1 + math.cos(math.pi * epoch / 3)) / 2
        with torch.no_grad():
            for index, parameter in enumerate(by_hand.parameters()):
                speeds[index] = 0.7 * speeds[index] + gradients[index] + 0.1 * parameter
                parameter -= lr * speeds[index]
    assert found == pytest.approx(loss.item(), rel=1e-4)
    for name, tensor in by_hand.state_dict().items():
        torch.testing.assert_close(bench.copy.state_dict()[name], tensor, rtol=1e-3, atol=1e-5)


def test_the_loss_is_the_mean_over_images() -> None:
    config = options(epochs=1, lr=1e-9, batch_size=7)
    sizes: list[int] = []

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        sizes.append(len(labels))
        return bench.logits(bench.copy, images).sum() * 0 + len(labels) ** 2

    bench = bench_of(make_network(), config)
    mean = tune(bench, config, loss=loss)
    assert sorted(sizes) == [6, 6, 6, 6]
    assert mean == pytest.approx(36)


def test_what_is_called_after_a_step_and_after_a_pass() -> None:
    config = options(epochs=2, batch_size=12)
    bench = bench_of(make_network(), config)
    bias: Any = bench.copy.get_parameter("5.bias")
    steps: list[int] = []
    passes: list[tuple[int, int]] = []

    def restore() -> None:
        steps.append(1)
        bias.data.zero_()

    tune(bench, config, after_step=restore, progress=lambda *done: passes.append(done))
    assert len(steps) == 4
    assert passes == [(1, 2), (2, 2)]
    assert not bias.any()


def test_frozen_weights_are_trained_and_frozen_again() -> None:
    network = make_network(dropout=0.5)
    network[0].weight.requires_grad_(False)
    network[1].train()
    config = options()
    bench = bench_of(network, config)
    state = torch.get_rng_state()
    with torch.no_grad():
        tune(bench, config)
    assert torch.equal(torch.get_rng_state(), state)
    found, before = snapshot(bench.copy), snapshot(network)
    for key in ("modes", "gradients", "has_grad", "hooks"):
        assert found[key] == before[key]
    assert not torch.equal(found["tensors"]["0.weight"], before["tensors"]["0.weight"])


def test_two_stages_draw_another_order() -> None:
    config = options(epochs=1, batch_size=6)
    seen: dict[str, list[Tensor]] = {"first": [], "second": []}
    for stage, batches in seen.items():
        bench = bench_of(make_network(), config)

        def loss(images: Tensor, labels: Tensor, batches: Any = batches, b: Any = bench) -> Tensor:
            batches.append(images)
            return F.cross_entropy(b.logits(b.copy, images), labels)

        tune(bench, config, stage=stage, loss=loss)
    first, second = (torch.cat(batches) for batches in seen.values())
    assert not torch.equal(first, second)
    assert sorted(first.sum((1, 2, 3)).tolist()) == sorted(second.sum((1, 2, 3)).tolist())


def test_a_loss_that_overflows() -> None:
    config = options(lr=1e38)
    bench = bench_of(make_network(), config)
    message = r"finite in fine-tuning.* in pass [23]\. Try another one\."
    with pytest.raises(ArithmeticError, match=message):
        tune(bench, config, remedy="Try another one.")


def test_statistics_that_overflow_unseen_by_the_loss() -> None:
    config = options(epochs=1)
    bench = bench_of(make_network(), config)
    statistics: Any = bench.copy.get_buffer("1.running_var")
    with pytest.raises(ArithmeticError, match=r"'1.running_var' in pass 1\. Lower `lr`\."):
        tune(bench, config, after_step=lambda: statistics.fill_(math.inf))


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("augment", "mixup", "one of ('none', 'crop', 'crop-flip')"),
        ("batch_size", 2, "a whole number of at least 3, so that no batch holds a single image"),
        ("epochs", 0, "a whole number of at least 1"),
        ("lr", math.nan, "a number above 0"),
        ("momentum", 1.0, "a number from 0 to below 1"),
        ("weight_decay", -0.1, "a number of at least 0"),
    ],
)
def test_options_out_of_range(option: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=f"Expected argument `{option}`") as caught:
        TuningConfig(**{option: value})
    assert f"to be {expected}, but got {value!r}." in str(caught.value)

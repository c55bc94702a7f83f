from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from helpers import images_and_labels, loader, same, snapshot, trained_network
from torch import nn

from lightning_mnp.baselines import FTConfig, FTSAMConfig, ft
from lightning_mnp.baselines.tuning import tune
from lightning_mnp.baselines.workbench import Workbench
from lightning_mnp.defense_data.defense_set import DefenseSet

DATA = DefenseSet(*images_and_labels())


def make_network(norm: Any = nn.BatchNorm2d) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        layers = nn.Conv2d(1, 4, 3, stride=2), norm(4), nn.ReLU(), nn.Flatten()
        return nn.Sequential(*layers, nn.Dropout(0.2), nn.Linear(36, 4)).eval()


@torch.no_grad()
def accuracy(network: nn.Module) -> float:
    return float((network(DATA.images).argmax(1) == DATA.labels).float().mean())


def test_it_is_the_loop_of_fine_tuning_and_nothing_else() -> None:
    network = make_network()
    config = FTConfig(seed=3, epochs=2, batch_size=16)
    result = ft(network, DATA, config=config)
    bench = Workbench(network, DATA, seed=3, batch_size=16, augment="crop-flip")
    loss = tune(bench, config)
    assert same(snapshot(result.model), snapshot(bench.copy))
    assert result.details == {"loss": loss}
    assert result.pruned == result.scores == []
    assert result.accuracy_before == pytest.approx(accuracy(network))
    assert result.accuracy_after == pytest.approx(accuracy(result.model))


def test_the_defaults_are_the_published_ones() -> None:
    config = FTConfig()
    assert (config.epochs, config.lr, config.batch_size) == (100, 0.01, 256)
    assert (config.momentum, config.weight_decay) == (0.9, 5e-4)
    sharp = FTSAMConfig()
    for each in fields(config):  # FT-SAM differs in nothing else
        assert getattr(config, each.name) == getattr(sharp, each.name)


@pytest.mark.parametrize("training", [False, True])
def test_the_model_and_the_random_state_stay(training: bool) -> None:
    network = make_network().train(training)
    before, state = snapshot(network), torch.get_rng_state()
    ft(network, loader(shuffle=True), config=FTConfig(epochs=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert same(before, snapshot(network))


def test_the_seed_decides() -> None:
    network = make_network()
    first, second, other = (
        ft(network, loader(size), config=FTConfig(seed=seed, epochs=2, batch_size=16))
        for size, seed in ((16, 0), (7, 0), (16, 1))
    )
    assert same(snapshot(first.model), snapshot(second.model))
    assert not same(snapshot(first.model), snapshot(other.model))


@pytest.mark.parametrize("norm", [nn.Identity, lambda channels: nn.GroupNorm(2, channels)])
def test_networks_without_batch_normalization(norm: Any) -> None:
    network = make_network(norm)
    result = ft(network, DATA, config=FTConfig(epochs=1, lr=0.01))
    assert not torch.equal(result.model.get_parameter("0.weight"), network[0].weight)


def test_a_residual_network() -> None:
    network = trained_network(steps=2)
    result = ft(network, DATA, config=FTConfig(epochs=1))
    assert result.accuracy_before == pytest.approx(accuracy(network))
    assert result.accuracy_after == pytest.approx(accuracy(result.model))


def test_what_does_not_fit_is_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match="labels to be below 4"):
        ft(make_network(), DefenseSet(DATA.images, DATA.labels + 1))
    with pytest.raises(ValueError, match="spread over devices"):
        ft(nn.DataParallel(make_network()), DATA)


def test_a_loss_that_overflows() -> None:
    with pytest.raises(ArithmeticError, match="Lower `lr`"):
        ft(make_network(), DATA, config=FTConfig(lr=1e38))

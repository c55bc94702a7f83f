from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from helpers import images_and_labels, same, snapshot
from torch import nn

from lightning_mnp import DefenseSet, baselines
from lightning_mnp.baselines import (
    ANPConfig,
    BaselineResult,
    FTSAMConfig,
    NADConfig,
    RNPConfig,
    rnp,
)

DATA = DefenseSet(*images_and_labels())


def small_network() -> nn.Module:
    layers = nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(36, 4)).eval()


@torch.no_grad()
def accuracy(network: nn.Module, data: DefenseSet) -> float:
    return float((network(data.images).argmax(1) == data.labels).float().mean())


def drop_channels(network: nn.Module, images: Any, seed: int) -> BaselineResult:
    """A defense of a user: it removes three filters of the first convolution by chance."""
    data = DefenseSet.from_loader(images)
    defended: Any = copy.deepcopy(network)
    drawn = torch.randperm(4, generator=torch.Generator().manual_seed(seed))[:3]
    with torch.no_grad():
        defended[0].weight[drawn] = 0.0
    rates = (accuracy(network, data), accuracy(defended, data))
    pruned = [("0", index) for index in drawn.tolist()]
    return BaselineResult(defended, pruned, [0.0] * 3, *rates)


@pytest.fixture
def own() -> Iterator[str]:
    baselines.register("drop-channels", drop_channels)
    yield "drop-channels"
    baselines.unregister("drop-channels")


def test_a_defense_from_outside_is_found_and_used(own: str) -> None:
    assert baselines.names()[-1] == own
    network = small_network()
    before = snapshot(network)
    defend = baselines.find(own)
    result, again, other = (defend(network, DATA, seed) for seed in (0, 0, 1))
    assert same(before, snapshot(network))
    assert result.pruned == again.pruned != other.pruned
    assert result.accuracy_before == accuracy(network, DATA)
    assert result.accuracy_after == accuracy(result.model, DATA)
    weights = result.model.state_dict()["0.weight"]
    dropped = [index for _, index in result.pruned]
    assert [index for index in range(4) if not weights[index].any()] == sorted(dropped)


def test_a_defense_is_gone_after_it_is_removed(own: str) -> None:
    baselines.unregister(own)
    assert own not in baselines.names()
    with pytest.raises(ValueError, match=r"`name` to be one of \[.*'rnp'.*\], but got 'drop-chan"):
        baselines.find(own)
    with pytest.raises(ValueError, match=r"but got 'drop-channels'\. Add a defense of"):
        baselines.unregister(own)
    baselines.register(own, drop_channels)


@pytest.mark.parametrize("name", baselines.names())
def test_every_defense_of_the_package_takes_a_network_images_and_a_seed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for defense, short in (
        ("anp", partial(ANPConfig, iterations=2)),
        ("ft_sam", partial(FTSAMConfig, epochs=2)),
        ("nad", partial(NADConfig, epochs=2)),
    ):
        # By import: the package has the function by that name, not the module.
        module = import_module(f"lightning_mnp.baselines.{defense}")
        monkeypatch.setattr(module, short.func.__name__, short)
    result = baselines.find(name)(small_network(), DATA, 3)
    assert isinstance(result, BaselineResult)
    assert len(result.pruned) == len(result.scores)


def test_the_defenses_of_the_package_are_registered() -> None:
    assert {"rnp", "anp", "ft-sam", "i-bau", "nad"} <= {*baselines.names()}


def test_rnp_is_run_with_its_defaults_and_the_seed() -> None:
    network = small_network()
    found = baselines.find("rnp")(network, DATA, 3)
    expected = rnp(network, DATA, config=RNPConfig(seed=3))
    assert found == expected
    assert same(snapshot(found.model), snapshot(expected.model))


@pytest.mark.parametrize(
    ("name", "defense", "error", "message"),
    [
        ("rnp", drop_channels, ValueError, "there is a defense 'rnp'. Choose another name, or"),
        ("", drop_channels, ValueError, "`name` to be the defense's name, but it is empty"),
        (
            "mine",
            "rnp",
            TypeError,
            r"`defense` to be a function .*, seed\), but got str",
        ),
    ],
)
def test_what_cannot_be_registered(
    name: str, defense: Any, error: type[Exception], message: str
) -> None:
    before = baselines.names()
    with pytest.raises(error, match=message):
        baselines.register(name, defense)
    assert baselines.names() == before

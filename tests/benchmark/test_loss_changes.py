from __future__ import annotations

import copy

import pytest
import torch
from helpers import images_and_labels, same, snapshot
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mnp.benchmark import LossChanges, loss_changes


@pytest.fixture
def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, second = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 2, 3)
        network = nn.Sequential(first, nn.BatchNorm2d(3), nn.ReLU(), second, nn.Flatten())
        network.append(nn.Linear(32, 4))
        network(torch.randn(8, 1, 8, 8))  # statistics of their own
    return network


def mean_loss(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(network.eval()(images).double(), labels))


@pytest.mark.parametrize("site", ["filter", "norm"])
def test_changes_are_those_of_a_network_without_the_filter(network: nn.Module, site: str) -> None:
    images, labels = images_and_labels(12)
    goals = torch.zeros_like(labels)
    before = snapshot(network)
    told: list[tuple[int, int]] = []
    changes = loss_changes(
        network,
        [(images[:8], labels[:8]), (images[8:], labels[8:])],
        [(images + 1, goals, labels)],
        site=site,  # type: ignore[arg-type]
        progress=lambda done, total: told.append((done, total)),
    )
    assert same(before, snapshot(network))
    assert told == [(done, 10) for done in range(1, 11)]
    assert changes.names == [("0", 0), ("0", 1), ("0", 2), ("3", 0), ("3", 1)]
    assert changes.layers() == ["0", "3"]
    for place, (layer, row) in enumerate(changes.names):
        without = copy.deepcopy(network)
        convolution = without.get_submodule(layer)
        norm = without[1] if site == "norm" and layer == "0" else convolution
        for owner in (convolution, norm):
            for name in ("weight", "bias"):
                owner.state_dict()[name][row] = 0.0  # the same memory
        clc = mean_loss(without, images, labels) - mean_loss(network, images, labels)
        blc = mean_loss(without, images + 1, goals) - mean_loss(network, images + 1, goals)
        assert float(changes.clc[place]) == pytest.approx(clc, abs=1e-5)
        assert float(changes.blc[place]) == pytest.approx(blc, abs=1e-5)
        weight = network.state_dict()[f"{layer}.weight"][row]
        assert float(changes.magnitude[place]) == pytest.approx(float(weight.norm()))


def test_some_layers_only(network: nn.Module) -> None:
    batch = images_and_labels(4)
    assert loss_changes(network, [batch], [batch], include=["3"]).layers() == ["3"]


def test_kinds_of_filters() -> None:
    names = [("conv", index) for index in range(4)]
    clc, blc = torch.tensor([0.2, 0.2, 0.0, -0.1]), torch.tensor([0.3, 0.1, 0.3, 0.1])
    changes = LossChanges(names, clc, blc, torch.ones(4))
    assert changes.kinds(tau=0.2, eps=0.1) == ["hybrid", "clean", "backdoor", "redundant"]
    assert changes.kinds() == ["hybrid", "hybrid", "backdoor", "backdoor"]
    with pytest.raises(ValueError, match="`tau` to be at least 0, but got -1"):
        changes.kinds(tau=-1.0)


@pytest.mark.parametrize("name", ["clean", "triggered"])
def test_no_images(network: nn.Module, name: str) -> None:
    batches = {"clean": [images_and_labels(4)], "triggered": [images_and_labels(4)], name: []}
    with pytest.raises(ValueError, match=f"`{name}` to hold at least one batch"):
        loss_changes(network, **batches)

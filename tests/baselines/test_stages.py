from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import same, snapshot, trained_resnet18
from torch import Tensor, nn

from lightning_mnp.baselines.stages import Stage, find_stages, recording


class SharedActivation(nn.Module):
    """One activation module for all sizes, and a pooled map that a 1x1 convolution weighs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3, stride=2)
        self.squeeze, self.relu, self.head = nn.Conv2d(6, 6, 1), nn.ReLU(), nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Any:
        maps = self.relu(self.first(images))
        maps = self.relu(self.second(maps))
        pooled = self.relu(self.squeeze(maps.mean((2, 3), keepdim=True)))
        return self.head(pooled.flatten(1))


def test_the_stages_of_a_residual_network_are_its_groups_of_blocks() -> None:
    network = trained_resnet18()
    before = snapshot(network)
    stages = find_stages(network, torch.rand(2, 1, 8, 8))
    # The last group has maps of 1x1.
    assert [stage.name for stage in stages] == ["layer1", "layer2", "layer3"]
    assert [stage.size for stage in stages] == [(8, 8), (4, 4), (2, 2)]
    assert same(before, snapshot(network))
    assert find_stages(network, torch.rand(2, 1, 8, 8), most=2) == stages[1:]
    larger = find_stages(network, torch.rand(2, 1, 16, 16))
    assert [stage.name for stage in larger] == ["layer2", "layer3", "layer4"]


def test_what_comes_before_the_first_convolution_of_a_size_is_no_stage() -> None:
    network = nn.Sequential(
        nn.BatchNorm2d(1), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.Flatten()
    )
    assert find_stages(network, torch.rand(2, 1, 8, 8)) == [Stage("2", (6, 6))]


def test_sequences_and_volumes_have_stages() -> None:
    signal = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten())
    assert find_stages(signal, torch.rand(2, 1, 9)) == [Stage("1", (7,))]
    volume = nn.Sequential(nn.Conv3d(1, 4, 3), nn.Flatten())
    assert find_stages(volume, torch.rand(2, 1, 4, 5, 6)) == [Stage("0", (2, 3, 4))]


def test_a_module_that_is_called_at_several_sizes() -> None:
    network, images = SharedActivation(), torch.rand(3, 1, 9, 9)
    stages = find_stages(network, images)
    assert stages == [Stage("relu", (7, 7)), Stage("relu", (3, 3))]
    with recording(network, stages) as maps:
        network(images)
    first = network.first(images).relu()
    assert torch.equal(maps[stages[0]], first)
    assert torch.equal(maps[stages[1]], network.second(first).relu())
    assert not network.relu._forward_hooks


def test_maps_of_one_value_are_refused() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"maps of more than one value.* but none has.*`ft_sam`"):
        find_stages(network, torch.rand(2, 1, 2, 2))

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import images_and_labels, same, snapshot, trained_network
from torch import Tensor, nn

from lightning_mnp.baselines import Suspects
from lightning_mnp.baselines.activations import find_head, last_activations
from lightning_mnp.baselines.workbench import Workbench

IMAGES, LABELS = images_and_labels(20)


def bench_of(network: nn.Module, **options: Any) -> Workbench:
    return Workbench(network, Suspects(IMAGES, LABELS), batch_size=8, **options)


def test_the_input_of_the_last_layer_of_a_resnet() -> None:
    network: Any = trained_network().train()
    before = snapshot(network)
    bench = bench_of(network)
    found = last_activations(bench)
    assert same(before, snapshot(network))
    assert not any(module._forward_pre_hooks for module in bench.copy.modules())
    with torch.no_grad():
        head = network.eval().get_submodule(find_head(bench))
        torch.testing.assert_close(head(found), network(IMAGES), rtol=1e-4, atol=1e-4)


def test_maps_are_averaged_in_front_of_a_convolution() -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    found = last_activations(bench_of(network))
    expected = network[1](network[0](IMAGES)).mean((2, 3))
    torch.testing.assert_close(found, expected.detach())


def test_a_layer_by_its_name() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 4))
    found = last_activations(bench_of(network), "1")
    torch.testing.assert_close(found, IMAGES.flatten(1))
    with pytest.raises(ValueError, match=r"`layer` to name a layer .* got 'fc'.*\['0', '1', '2'"):
        find_head(bench_of(network), "fc")


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 4), nn.Linear(64, 4)

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(1)
        return self.first(flat) + self.second(flat)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Linear(64, 64), nn.Linear(64, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.mix(self.mix(images.flatten(1))))


def test_networks_that_do_not_show_what_to_compare_by() -> None:
    with pytest.raises(ValueError, match=r"to come from one linear layer .*'first', 'second'.*lay"):
        last_activations(bench_of(TwoHeads()))
    assert last_activations(bench_of(TwoHeads()), "second").shape == (20, 64)
    with pytest.raises(ValueError, match=r"'mix' to be called once .* 6 times for 3 batches"):
        last_activations(bench_of(Twice()), "mix")


def test_activations_that_overflow() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Softmax(1), nn.Linear(5, 4))
    bench = bench_of(network)
    with torch.no_grad():
        bench.copy[1].weight.fill_(1e38)
        bench.copy[1].bias.fill_(-torch.inf)
    with pytest.raises(ArithmeticError, match=r"enters the layer '2'.*NaN or infinite"):
        last_activations(bench, "2")

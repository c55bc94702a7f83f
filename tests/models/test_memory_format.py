from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_mnp.models import cifar_resnet18
from lightning_mnp.models.memory_format import fastest_format


def chosen(capability: str, network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    found = fastest_format(network)
    assert found in (torch.channels_last, torch.contiguous_format)
    return found == torch.channels_last


@pytest.mark.parametrize(
    ("network", "safe"),
    [
        (nn.Conv2d(4, 8, 1, stride=2), False),
        (nn.Sequential(nn.ReLU(), nn.Conv2d(7, 8, 1, stride=(1, 2))), False),
        (nn.Conv2d(8, 8, 1, stride=2), True),
        (nn.Conv2d(4, 8, 3, stride=2), True),
        (nn.Conv2d(4, 8, 1), True),
        (nn.Linear(2, 2), True),
    ],
)
def test_a_format_that_crashes_without_avx512_is_not_taken(
    network: nn.Module, safe: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chosen("AVX2", network, monkeypatch) == safe
    assert chosen("DEFAULT", network, monkeypatch) == safe
    assert chosen("AVX512", network, monkeypatch)


@pytest.mark.parametrize("width", [2, 4, 8])
def test_a_narrow_resnet_is_trained_in_its_format(width: int) -> None:
    network = cifar_resnet18(10, width)
    layout = fastest_format(network)
    network.to(memory_format=layout)
    for _ in range(5):
        images = torch.rand(10, 3, 32, 32).contiguous(memory_format=layout)
        network(images).square().mean().backward()
    assert all(bool(weight.grad.isfinite().all()) for weight in network.parameters())

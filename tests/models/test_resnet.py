from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_mnp.models import CifarResNet, cifar_resnet18, cifar_resnet34


def filters(network: nn.Module) -> int:
    return sum(m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d))


def test_the_papers_network_has_4800_filters() -> None:
    assert filters(cifar_resnet18()) == 4800
    assert filters(cifar_resnet18(width=16)) == 1200
    # The stem; two for each block; one for each shortcut but the first stage's.
    depths, widths = (3, 4, 6, 3), (16, 32, 64, 128)
    blocks = sum(2 * depth * width for depth, width in zip(depths, widths, strict=True))
    assert filters(cifar_resnet34(width=16)) == 16 + blocks + 32 + 64 + 128


@pytest.mark.parametrize("build", [cifar_resnet18, cifar_resnet34])
@pytest.mark.parametrize("size", [8, 32])
def test_shapes_and_gradients(build: Any, size: int) -> None:
    network = build(num_classes=7, width=4, in_channels=1)
    logits = network(torch.rand(3, 1, size, size))
    logits.sum().backward()
    assert logits.shape == (3, 7)
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_a_block_is_two_convolutions_and_a_shortcut() -> None:
    network = CifarResNet([1, 1, 1, 1], width=4).eval()
    block = network.layer2[0]
    x = torch.rand(2, 4, 8, 8)
    conv = nn.functional.conv2d
    scale = 1.0 / (1.0 + block.bn1.eps) ** 0.5  # A fresh batch norm only divides by this.
    hidden = (conv(x, block.conv1.weight, stride=2, padding=1) * scale).relu()
    wanted = conv(hidden, block.conv2.weight, padding=1) * scale
    wanted = (wanted + conv(x, block.shortcut[0].weight, stride=2) * scale).relu()
    torch.testing.assert_close(block(x), wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": [1, 1]}, r"`blocks` to be four positive numbers, but got \[1, 1\]"),
        ({"blocks": [1, 0, 1, 1]}, "`blocks` to be four positive numbers"),
        ({"num_classes": 1}, "`num_classes` to be at least 2, but got 1"),
        ({"width": 0}, "`width` to be at least 1, but got 0"),
        ({"in_channels": 0}, "`in_channels` to be at least 1, but got 0"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CifarResNet(**{"blocks": [1, 1, 1, 1]} | options)

"""Layers that are derived from PyTorch's own and do something else, as libraries have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Standardized(nn.Conv2d):
    """Weight standardization (Qiao et al., 2019), with a gain where asked for."""

    def __init__(self, *args: Any, gain: bool = False, bias: bool = True) -> None:
        super().__init__(*args, bias=bias)
        self.factor = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1)) if gain else None

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.flatten(1)
        rows = (rows - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True) + 1e-6)
        weight = rows.view_as(self.weight)
        if self.factor is not None:
            weight = weight * self.factor
        return F.conv2d(x, weight, self.bias, padding=1)


class NormThen(nn.BatchNorm2d):
    """A normalization layer with something behind it."""

    def __init__(self, then: Callable[[Tensor], Tensor], channels: int = 4, **options: Any) -> None:
        super().__init__(channels, **options)
        self.then = then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(super().forward(x))

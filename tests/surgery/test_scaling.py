from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.convnext import LayerNorm2d
from unusual_layers import NormThen, Standardized

from lightning_mnp.surgery.scaling import filter_scale, norm_kind, scale_filters_

IMAGES = torch.rand(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))


class Padded(nn.Conv2d):
    """A convolution that pads by itself, as networks ported from TensorFlow have it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class PaddedTransposed(nn.ConvTranspose2d):
    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)), output_size)


class Inner(nn.Conv2d):
    """Overrides what `forward` calls."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight / weight.norm(), bias)


class Shifted(nn.Conv2d):
    """Its maps do not vanish with its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1.0


class Divided(nn.Conv2d):
    """Zeros for weights make it divide by zero."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight / self.weight.flatten(1).norm(dim=1)[:, None, None, None]
        return F.conv2d(x, weight)


@pytest.mark.parametrize(
    ("convolution", "scale"),
    [
        (nn.Conv2d(4, 6, 3), "weight"),
        (Padded(4, 6, 3, groups=2), "weight"),
        (Padded(4, 6, 3, bias=False), "weight"),
        (PaddedTransposed(4, 6, 3, groups=2), "weight"),
        (Standardized(4, 6, 3), ""),
        (Standardized(4, 6, 3, gain=True), "factor"),
        (Standardized(4, 6, 3, gain=True, bias=False), "factor"),
        (Inner(4, 6, 3), None),  # one filter less changes the others
        (Shifted(4, 6, 3), None),
        (Divided(4, 6, 3), None),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("value", [0.0, 0.3])
def test_what_scales_a_filter(convolution: Any, scale: str | None, value: float) -> None:
    # Zeros, as some layers begin with them, are scaled by anything.
    with torch.no_grad():
        convolution.weight.copy_(value * torch.randn(convolution.weight.shape))
    before = {name: (id(p), p.clone()) for name, p in convolution.named_parameters()}
    random_state = torch.get_rng_state()
    assert filter_scale(convolution, (IMAGES,), {}) == scale
    for name, parameter in convolution.named_parameters():
        assert (id(parameter), True) == (before[name][0], torch.equal(parameter, before[name][1]))
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_forward_of_the_instance() -> None:
    convolution = nn.Conv2d(4, 6, 3)
    original = convolution.forward
    convolution.forward = lambda input: original(input) + 1.0
    assert filter_scale(convolution, (), {"input": IMAGES}) is None


@pytest.mark.parametrize(
    ("norm", "kind"),
    [
        (nn.BatchNorm2d(4), "plain"),
        (nn.GroupNorm(2, 4), "plain"),
        (LayerNorm2d(4), "plain"),
        (NormThen(nn.Identity()), "plain"),
        (NormThen(nn.ReLU(inplace=True)), "plain"),  # commutes with factors
        (NormThen(nn.ReLU6()), "active"),
        (NormThen(nn.SiLU()), "active"),
        (NormThen(nn.Sigmoid()), "active"),
        (NormThen(nn.Hardswish(inplace=True)), "active"),
        (NormThen(nn.SiLU(), affine=False), "other"),
        (NormThen(lambda x: F.softmax(x, 1)), "other"),  # channels depend on each other
        (NormThen(lambda x: x + IMAGES), "other"),
        (NormThen(lambda x: x.flip(1)), "other"),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_happens_behind_a_norm(norm: Any, kind: str, dtype: torch.dtype) -> None:
    nn.init.zeros_(norm.weight) if norm.weight is not None else None
    assert norm_kind(norm.to(dtype).eval(), (IMAGES.to(dtype),), {}, 1) == kind


def test_a_norm_along_another_dimension() -> None:
    class Last(nn.LayerNorm):
        def forward(self, input: Tensor) -> Tensor:
            return F.silu(super().forward(input))

    assert norm_kind(Last(5), (IMAGES,), {}, 3) == "active"
    assert norm_kind(Last(5), (IMAGES,), {}, 1) == "other"  # 5 weights, 4 channels
    square = IMAGES[:, :, :4, :4]
    assert norm_kind(Last(4), (square,), {}, 1) == "other"


def test_arguments_stay_where_a_layer_works_in_place() -> None:
    class InPlace(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return input.copy_(F.silu(super().forward(input)))

    images = IMAGES.clone()
    assert norm_kind(InPlace(4).eval(), (images,), {}, 1) == "active"
    assert torch.equal(images, IMAGES)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_scaled_filters_scale_the_maps(kind: type[nn.Conv2d], groups: int) -> None:
    convolution = kind(4, 6, 3, groups=groups, bias=False).double()
    factors = torch.tensor([0.0, 1.0, 2.0, 0.5, 3.0, -1.0]).double()
    wanted = convolution(IMAGES.double()) * factors[:, None, None]
    with torch.no_grad():
        scale_filters_(convolution.weight, factors, kind is nn.ConvTranspose2d, groups)
    torch.testing.assert_close(convolution(IMAGES.double()), wanted)

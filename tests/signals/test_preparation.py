"""Other preparations of images, and the search for one that a network recognizes better."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mnp import DefenseSet
from lightning_mnp.signals import preparation
from lightning_mnp.signals.preparation import (
    PreparationConstants,
    find_better_preparation,
    other_preparations,
)
from lightning_mnp.surgery.layers import find_filter_layers
from lightning_mnp.surgery.masked_network import MaskedNetwork

UNIT, BYTES, HALF = "in [0, 1]", "from 0 to 255", "from -1 to 1"
STANDARD = "normalized to mean 0 and standard deviation 1"
REVERSED = "with the channels in reverse order (BGR in place of RGB, say)"
MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(1, 3, 1, 1)
STD = torch.tensor([0.2470, 0.2435, 0.2616]).view(1, 3, 1, 1)


def raw_images(channels: int = 3) -> Tensor:
    """Images in [0, 1], with black and white in each channel, and darker in later channels."""
    images = torch.rand(40, channels, 4, 4)
    images[0], images[1] = 0.0, 1.0
    images[2:] *= torch.linspace(1.0, 0.5, channels).view(1, -1, 1, 1)
    return images


def forms(raw: Tensor) -> dict[str, Tensor]:
    dims = [0, 2, 3]
    mean = raw.mean(dims, keepdim=True)
    std = ((raw - mean) ** 2).mean(dims, keepdim=True).sqrt()
    return {UNIT: raw, BYTES: raw * 255, HALF: raw * 2 - 1, STANDARD: (raw - mean) / std}


@pytest.mark.parametrize(
    ("given", "own"), [("unit", UNIT), ("bytes", BYTES), ("half", HALF), ("normalized", STANDARD)]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_other_preparations_are_those_of_the_raw_images(
    given: str, own: str, channels: int
) -> None:
    raw = raw_images(channels)
    expected = forms(raw)
    # A normalization by the statistics of more images than these differs a little.
    images = 1.1 * expected[own] + 0.05 if own == STANDARD else expected[own]
    found = {str(each): each(images) for each in other_preparations(images)}
    plain = {name: values for name, values in expected.items() if name != own}
    turned = {f"{name} and {REVERSED}": values.flip(1) for name, values in plain.items()}
    turned[REVERSED] = images.flip(1)
    assert found.keys() == plain.keys() | (turned.keys() if channels == 3 else set())
    for name, values in {**plain, **turned}.items():
        if name in found:
            torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-3)


def test_values_of_no_usual_range_are_stretched() -> None:
    raw = raw_images(1)
    for images in (raw * 16, raw * 9000, raw - 3):  # digits, a camera of 14 bits, shifted
        found = {str(each): each(images) for each in other_preparations(images)}
        torch.testing.assert_close(found[UNIT], raw, rtol=1e-4, atol=1e-3)


def test_a_channel_without_contrast_stays_finite() -> None:
    images = raw_images() - 0.5
    images[:, 1] = 0.25
    assert all(bool(each(images).isfinite().all()) for each in other_preparations(images))


def test_volumes_and_series_have_no_colors() -> None:
    for shape in ((20, 2, 8), (20, 1, 4, 4, 4)):
        assert not any(each.reversed for each in other_preparations(torch.rand(shape)))


class Colors(nn.Module):
    """Tells images that are more red from those that are more blue, if values are around 0."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)
        self.head = nn.Linear(2, 3)
        with torch.no_grad():  # bright images are of the third class
            self.conv.weight.copy_(torch.tensor([[1.0, 0, -1], [1, 1, 1]]).view(2, 3, 1, 1))
            self.conv.bias.zero_()
            self.head.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 9.0]]))
            self.head.bias.copy_(torch.tensor([0.0, 0.0, -9.0]))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.conv(images).mean((2, 3)))
        return logits


def colored() -> tuple[Tensor, Tensor]:
    """Images in [0, 1] that are more red (class 0) or more blue (class 1)."""
    labels = torch.arange(120) % 2
    images = 0.4 * torch.rand(120, 3, 4, 4) + 0.2
    images[labels == 0, 0] += 0.3
    images[labels == 1, 2] += 0.3
    images[:, :, 0, 0], images[:, :, 0, 1] = 0.0, 1.0
    return images, labels


def search(images: Tensor, labels: Tensor, **constants: Any) -> str | None:
    network, data = Colors(), DefenseSet(images, labels)
    masked = MaskedNetwork(network, find_filter_layers(network, data.images[:2]))
    with torch.no_grad():
        right = network(data.images).argmax(1) == data.labels
    return find_better_preparation(masked, data, right, 50, PreparationConstants(**constants))


def test_images_as_in_training_are_left_alone() -> None:
    images, labels = colored()
    assert search((images - MEAN) / STD, labels) is None
    labels[::5] = 2  # so that the network is far from perfect
    assert search((images - MEAN) / STD, labels) is None


@pytest.mark.parametrize(
    ("given", "values", "looks"),
    [
        ("swapped", "-1.99 to 2.13", REVERSED),
        ("bytes", "0 to 255", HALF),
        ("swapped bytes", "0 to 255", f"{HALF} and {REVERSED}"),
    ],
)
def test_images_of_another_preparation_are_told(given: str, values: str, looks: str) -> None:
    images, labels = colored()
    prepared = {
        "swapped": (images.flip(1) - MEAN) / STD,
        "bytes": images * 255,
        "swapped bytes": images.flip(1) * 255,
    }[given]
    found = search(prepared, labels)
    assert found is not None
    assert found.startswith(f"the images' values go from {values}, and the network seems to be")
    assert f"trained on images {looks}: so prepared, its accuracy on the defense set is" in found
    assert found.endswith("prepare the images as in training")


@pytest.mark.parametrize(("won", "lost"), [(9, 0), (10, 0), (20, 5), (25, 5), (12, 9)])
def test_a_gain_has_to_be_large_and_no_chance(
    won: int, lost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = colored()
    right = torch.arange(120) < 60
    now = right.clone()
    now[60 : 60 + won], now[:lost] = True, False

    def right_under(candidate: Any, masked: Any, data: Any, rows: slice, size: int) -> Tensor:
        return now[rows]

    monkeypatch.setattr(preparation, "_right_under", right_under)
    data = DefenseSet(images, labels)
    masked: Any = None
    found = find_better_preparation(masked, data, right, 50)
    # McNemar's test: under chance, each image that changed sides did so like a coin.
    coins = won + lost
    chance = sum(math.comb(coins, heads) for heads in range(won, coins + 1)) / 2**coins
    assert (found is not None) == ((won - lost) / 120 >= 0.05 and chance <= 0.001)


def test_no_pass_is_made_if_nearly_all_are_right() -> None:
    data = DefenseSet(*colored())
    masked: Any = None  # a pass would fail
    right = torch.arange(120) >= 5
    assert find_better_preparation(masked, data, right, 50) is None

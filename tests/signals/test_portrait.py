from __future__ import annotations

import base64
import io

import pytest
import torch
from helpers import same, snapshot
from PIL import Image
from torch import Tensor, nn

from lightning_mnp.signals.patch import PatchTrigger
from lightning_mnp.signals.portrait import encode_png, portray
from lightning_mnp.surgery.layers import find_filter_layers
from lightning_mnp.surgery.masked_network import MaskedNetwork


def read_png(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


class Bright(nn.Module):
    """A network that sees which of two pixels is brighter, in images of any shape."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        kind = {1: nn.Conv1d, 2: nn.Conv2d}[len(shape) - 1]
        self.conv = kind(shape[0], 1, 1, bias=False)
        self.head = nn.Linear(2, 2, bias=False)
        nn.init.ones_(self.conv.weight)
        nn.init.eye_(self.head.weight)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.conv(images).flatten(1)[:, :2])
        return logits


def new_patch(images: Tensor, labels: Tensor, pattern: Tensor) -> PatchTrigger:
    network = Bright(*images.shape[1:])
    masked = MaskedNetwork(network, find_filter_layers(network, images))
    low, high = torch.full((1, 3, 1, 1), -1.0), torch.full((1, 3, 1, 1), 3.0)
    if images.ndim == 3:
        low, high = low[..., 0], high[..., 0]
    trigger = PatchTrigger(masked, images, labels, 1 - labels, low, high)
    trigger.pattern = pattern
    return trigger


def a_scene_with_a_patch() -> tuple[PatchTrigger, Tensor, Tensor]:
    images = torch.full((5, 3, 2, 2), -1.0)
    images[:4, :, 0, 0] = 0.5  # class 0; the last one is of neither
    images[2, :, 0, 0] = 3.0  # too bright for the patch
    pattern = torch.zeros(1, 3, 2, 2)
    pattern[..., 0, 1] = 3.0
    return new_patch(images, torch.tensor([1, 0, 0, 0, 0]), pattern), images, pattern


def test_success_and_examples_are_those_of_the_network() -> None:
    trigger, images, pattern = a_scene_with_a_patch()
    labels = torch.tensor([1, 0, 0, 0, 0])  # the first is not recognized
    found = portray(trigger, images, labels, torch.ones(5, dtype=torch.long), 1, 2)
    changed = (images + pattern).clamp(-1.0, 3.0)
    arrived = [float(image[0, 0, 1]) > float(image[0, 0, 0]) for image in changed]
    assert (found.signal, found.target_class, found.images) == ("patch", 1, 5)
    assert found.success == sum(arrived) / 5 == 0.8
    shown = [(example.label, example.before, example.after) for example in found.examples]
    assert shown == [(0, 0, 1)] * 3  # those first that the network recognizes without the patch
    clean, triggered = (
        read_png(text) for text in (found.examples[0].clean, found.examples[0].triggered)
    )
    assert clean.getpixel((0, 0)) == (96, 96, 96)  # 1.5 of the range of 4, in 255 steps
    assert clean.getpixel((1, 0)) == (0, 0, 0)
    assert triggered.getpixel((1, 0)) == (191, 191, 191)
    pattern_picture = read_png(found.pattern)
    assert pattern_picture.getpixel((1, 0)) == (255, 255, 255)
    assert pattern_picture.getpixel((0, 1)) == (128, 128, 128)


def test_nothing_is_drawn_of_what_is_no_picture() -> None:
    images = torch.zeros(4, 3, 8)
    trigger = new_patch(images, torch.zeros(4, dtype=torch.long), torch.zeros(1, 3, 8))
    labels = torch.zeros(4, dtype=torch.long)
    found = portray(trigger, images, labels, labels, 0, 128)
    assert (found.pattern, found.examples, found.success) == ("", (), 1.0)


def test_the_audits_addition_to_rare_classes_is_left_out() -> None:
    trigger, images, _ = a_scene_with_a_patch()
    trigger.masked.raised = {1: 1e6}
    labels = torch.zeros(5, dtype=torch.long)
    assert portray(trigger, images, labels, labels + 1, 1, 128).examples[0].before == 0


@pytest.mark.parametrize(
    ("shape", "size", "mode"),
    [
        ((3, 96, 40), (40, 96), "RGB"),
        ((3, 192, 384), (96, 48), "RGB"),
        ((1, 400, 1), (1, 96), "L"),
        ((5, 8, 8), (8, 8), "L"),
    ],
)
def test_pictures_are_small_and_keep_their_form(
    shape: tuple[int, ...], size: tuple[int, int], mode: str
) -> None:
    picture = read_png(encode_png(torch.full(shape, 0.5)))
    assert (picture.size, picture.mode) == (size, mode)
    assert set(picture.convert("L").tobytes()) == {128}


def test_values_out_of_range_are_cut() -> None:
    picture = read_png(encode_png(torch.tensor([[[-1.0, 2.0, float("inf")]]])))
    assert list(picture.tobytes()) == [0, 255, 255]


def test_pattern_and_network_are_left_as_they_were() -> None:
    trigger, images, pattern = a_scene_with_a_patch()
    network = trigger.masked.network
    before = snapshot(network)
    labels = torch.zeros(5, dtype=torch.long)
    portray(trigger, images, labels, labels + 1, 1, 128)
    assert trigger.pattern.equal(pattern)
    assert same(before, snapshot(network))

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_mnp.attacks import SIG, load_trigger, save_trigger


@pytest.mark.parametrize("shape", [(2, 3, 6, 20), (1, 1, 20, 13)])
def test_stripes_are_the_sine_of_the_paper(shape: tuple[int, ...]) -> None:
    images = 0.2 + 0.6 * torch.rand(shape)
    before = images.clone()

    added = SIG(amplitude=0.15, frequency=6).apply(images) - images

    assert images.equal(before)
    width = shape[-1]
    for column in range(width):
        expected = 0.15 * math.sin(2 * math.pi * (column + 1) * 6 / width)
        torch.testing.assert_close(added[..., column], torch.full(shape[:-1], expected))


def test_no_pixel_changes_by_more_than_the_amplitude_or_leaves_the_range() -> None:
    images = torch.randint(0, 256, (8, 3, 32, 32)).to(torch.uint8)

    triggered = SIG().apply(images)

    change = triggered.float() - images.float()
    assert change.abs().max() == 40
    # Saturated pixels are cut off; a sum of bytes would wrap around.
    assert (SIG().apply(torch.full((1, 1, 4, 32), 255, dtype=torch.uint8)) >= 215).all()
    assert (SIG().apply(torch.zeros(1, 1, 4, 32, dtype=torch.uint8)) <= 40).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_bytes_and_floats_get_the_same_stripes(channels: int) -> None:
    images = torch.randint(0, 256, (4, channels, 8, 24)).to(torch.uint8)
    stored, floats = SIG().apply(images), SIG().apply(images.float() / 255.0)
    assert stored.equal((floats * 255.0).round().to(torch.uint8))
    assert SIG().apply(images.half() / 255.0).dtype == torch.float16


def test_only_the_target_class_is_poisoned_and_labels_stay() -> None:
    labels = torch.arange(200) % 10
    attack = SIG(target_class=3, seed=4)

    chosen = attack.poison_indices(labels, 10)

    assert len(chosen) == 16
    assert chosen.equal(chosen.unique())
    assert (labels[chosen] == 3).all()
    assert attack.poison_labels(labels[chosen], 10).equal(labels[chosen])
    assert SIG(target_class=3, seed=4).poison_indices(labels, 10).equal(chosen)
    assert not SIG(target_class=3, seed=5).poison_indices(labels, 10).equal(chosen)
    assert attack.triggered_indices(labels, 10).equal((labels != 3).nonzero().flatten())
    images = torch.rand(len(chosen), 3, 8, 16)
    assert attack.poison(images, labels[chosen], chosen).equal(attack.apply(images))


def test_a_rate_that_gives_no_image_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one of the 2 training images of class 1"):
        SIG(target_class=1, class_rate=0.1).poison_indices(torch.arange(20) % 10, 10)


def test_a_saved_trigger_is_the_same(tmp_path: Path) -> None:
    attack = SIG(amplitude=0.3, frequency=2.5, target_class=7, class_rate=0.25, seed=3)
    save_trigger(tmp_path / "trigger.safetensors", attack)

    loaded = load_trigger(tmp_path / "trigger.safetensors")

    images = torch.rand(2, 3, 8, 9)
    assert loaded.apply(images).equal(attack.apply(images))
    assert loaded.options() == attack.options()
    with pytest.raises(ValueError, match=r"no tensors for SIG, but got \['pattern'\]"):
        attack.load_tensors({"pattern": images})


def test_an_image_that_is_too_narrow_for_the_stripes_is_an_error() -> None:
    SIG().apply(torch.zeros(1, 1, 4, 13))
    with pytest.raises(ValueError, match="below half of the image's width, 12 pixels, but got 6"):
        SIG().apply(torch.zeros(1, 1, 40, 12))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amplitude": 0.0}, "`amplitude` to be above 0 and at most 1, but got 0.0"),
        ({"amplitude": 40}, "`amplitude` to be above 0 and at most 1, but got 40"),
        ({"frequency": 0.0}, "`frequency` to be above 0, but got 0.0"),
        ({"frequency": math.inf}, "`frequency` to be above 0, but got inf"),
        ({"class_rate": 1.5}, "`class_rate` to be a share from 0 to 1, but got 1.5"),
        ({"target_class": -1}, "`target_class` to be at least 0, but got -1"),
    ],
)
def test_argument_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SIG(**options)

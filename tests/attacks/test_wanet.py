from __future__ import annotations

import math

import pytest
import torch
from helpers import TinyDataModule, quiet_trainer
from torch import Tensor

from lightning_mnp.attacks import WaNet, WaNetModule


def bilinear(image: Tensor, x: float, y: float) -> float:
    """Value between pixels, by the definition of bilinear interpolation."""
    height, width = image.shape
    left, top = min(int(x), width - 2), min(int(y), height - 2)
    u, v = x - left, y - top
    rows = [
        (1 - u) * image[row, left].item() + u * image[row, left + 1].item()
        for row in (top, top + 1)
    ]
    return (1 - v) * rows[0] + v * rows[1]


@pytest.mark.parametrize(("height", "width"), [(8, 8), (6, 10)])
def test_the_warp_moves_each_pixel_by_the_field(height: int, width: int) -> None:
    attack = WaNet(grid_size=3, strength=0.8, seed=4)
    image = torch.rand(height, width, generator=torch.Generator().manual_seed(1))
    field = attack.generator(height, width)[0]

    result = attack.apply(image[None, None])[0, 0]

    for row in range(height):
        for column in range(width):
            right, down = (field[row, column] * attack.strength).tolist()
            # The grid goes from -1 to 1 over width - 1 steps.
            x = min(max((2 * column / (width - 1) - 1) + right / width, -1), 1)
            y = min(max((2 * row / (height - 1) - 1) + down / height, -1), 1)
            wanted = bilinear(image, (x + 1) / 2 * (width - 1), (y + 1) / 2 * (height - 1))
            assert result[row, column].item() == pytest.approx(wanted, abs=1e-5)


def test_control_points_have_mean_absolute_value_one_and_follow_the_seed() -> None:
    points = WaNet(seed=1).generator.points
    assert points.abs().mean().item() == pytest.approx(1.0, abs=1e-6)
    assert points.equal(WaNet(seed=1).generator.points)
    assert not points.equal(WaNet(seed=2).generator.points)


def test_trigger_properties() -> None:
    images = torch.randint(
        0, 256, (5, 3, 16, 16), generator=torch.Generator().manual_seed(0)
    ).byte()
    before = images.clone()
    attack = WaNet()
    stored, floats = attack.apply(images), attack.apply(images.float() / 255)
    assert images.equal(before)
    assert stored.dtype == torch.uint8
    assert 0 <= floats.min() <= floats.max() <= 1
    assert stored.equal((floats * 255).round().byte())
    assert not stored.equal(images)
    assert attack.apply(images[2:3]).equal(stored[2:3])
    # A warp makes no new values: a flat image stays.
    flat = torch.full((1, 3, 16, 16), 0.4)
    torch.testing.assert_close(attack.apply(flat), flat)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid_size": 1}, "`grid_size` to be from 2 to 64, but got 1"),
        ({"grid_size": 65}, "`grid_size` to be from 2 to 64, but got 65"),
        ({"strength": 0.0}, "`strength` to be above 0, but got 0.0"),
        ({"strength": math.inf}, "`strength` to be above 0, but got inf"),
    ],
)
def test_errors(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WaNet(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["all-to-one", "all-to-all"])
def test_a_batch_has_warped_noisy_and_clean_images(mode: str) -> None:
    attack = WaNet(poison_rate=0.25, mode=mode, target_class=1)
    module = WaNetModule(attack, noise_rate=0.5, num_classes=4)
    quiet_trainer().strategy.connect(module)
    module.trainer = quiet_trainer()
    images, labels = torch.rand(16, 3, 8, 8), torch.arange(16) % 4
    before = images.clone()

    batch, wanted = module.poison_batch(images, labels, torch.Generator().manual_seed(0))

    assert images.equal(before)
    torch.testing.assert_close(batch[:4] * 255, (attack.apply(images[:4]) * 255).round())
    assert wanted[:4].equal(attack.target_labels(labels[:4], 4))
    assert wanted[4:].equal(labels[4:])
    assert batch[12:].equal(images[12:])
    for index in range(4, 12):
        assert not torch.allclose(batch[index], images[index])
        assert not torch.allclose(batch[index], attack.apply(images[index : index + 1])[0])
    assert 0 <= batch.min() <= batch.max() <= 1
    # The noise moves by up to half a pixel more than the field: values stay between neighbors.
    assert (batch[4:12] - images[4:12]).abs().mean() < 0.5


def test_a_batch_has_the_images_that_are_measured() -> None:
    """What a network is trained on is to the last bit what stored images with the trigger are."""
    attack = WaNet(poison_rate=0.5, strength=2.0)
    module = WaNetModule(attack, noise_rate=0.5, num_classes=4)
    module.trainer = quiet_trainer()  # type: ignore[assignment]
    stored = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8)

    batch, _ = module.poison_batch(stored / 255, torch.ones(8).long(), torch.Generator())

    assert batch[:4].equal(attack.apply(stored[:4]) / 255)
    levels = (batch[4:] * 255).round()
    assert batch[4:].equal(levels / 255)
    assert not levels.equal(stored[4:].float())


def test_noise_rate_is_twice_the_poison_rate_and_bounded() -> None:
    assert WaNetModule().noise_rate == pytest.approx(0.2)
    assert WaNetModule(WaNet(poison_rate=0.8)).noise_rate == pytest.approx(0.2)
    with pytest.raises(ValueError, match=r"`noise_rate` to be from 0 to 0.9, .* but got 0.95"):
        WaNetModule(noise_rate=0.95)


def test_training_learns_the_backdoor_and_measures_it() -> None:
    module = WaNetModule(
        WaNet(poison_rate=0.3, strength=4.0),
        noise_rate=0.0,
        augment=False,
        num_classes=4,
        width=4,
        lr=0.05,
        schedule="none",
    )
    trainer = quiet_trainer(max_epochs=12)
    trainer.fit(module, TinyDataModule())
    # The warp of this strength hides the class; the attacker's label is all there is to learn.
    assert trainer.callback_metrics["val/ASR"] > 0.6
    assert trainer.callback_metrics["val/CA"] > 0.5

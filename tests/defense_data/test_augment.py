from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as V

from lightning_mnp.defense_data.augment import random_crop_flip, usual_padding


def candidates(image: Tensor, padding: int, flip: bool) -> list[Tensor]:
    """Every image that a crop and a flip can give, by torchvision."""
    size = list(image.shape[-2:])
    padded = V.pad(image, [padding])
    crops = [
        V.crop(padded, top, left, *size)
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
    ]
    return crops + [V.horizontal_flip(crop) for crop in crops] if flip else crops


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("padding", [0, 2])
def test_gives_crops_and_flips_and_all_of_them(
    padding: int, flip: bool, dtype: torch.dtype
) -> None:
    image = torch.randint(1, 255, (3, 5, 6), generator=torch.Generator().manual_seed(0)).to(dtype)
    allowed = {tuple(part.flatten().tolist()) for part in candidates(image, padding, flip)}
    generator = torch.Generator().manual_seed(1)

    result = random_crop_flip(image.expand(1000, -1, -1, -1), padding, flip, generator)

    assert result.shape == (1000, 3, 5, 6)
    assert result.dtype == dtype
    assert {tuple(part.flatten().tolist()) for part in result} == allowed


def test_the_argument_stays_and_the_generator_decides() -> None:
    images = torch.rand(8, 1, 6, 6)
    before = images.clone()
    state = torch.get_rng_state()

    first = random_crop_flip(images, 2, generator=torch.Generator().manual_seed(4))
    second = random_crop_flip(images, 2, generator=torch.Generator().manual_seed(4))
    third = random_crop_flip(images, 2, generator=torch.Generator().manual_seed(5))

    assert images.equal(before)
    assert first.equal(second)
    assert not first.equal(third)
    assert torch.get_rng_state().equal(state)


def test_height_and_width_are_shifted_by_amounts_of_their_own() -> None:
    image = torch.arange(1.0, 31.0).reshape(1, 5, 6)
    generator = torch.Generator().manual_seed(1)
    result = random_crop_flip(image.expand(500, -1, -1, -1), (0, 2), False, generator)
    allowed = {
        tuple(torch.nn.functional.pad(image, (2, 2))[..., left : left + 6].flatten().tolist())
        for left in range(5)
    }
    assert {tuple(part.flatten().tolist()) for part in result} == allowed


@pytest.mark.parametrize("shape", [(1, 128), (16, 224), (40, 400), (2, 2), (8, 8), (4, 32)])
def test_no_image_is_shifted_out_of_sight(shape: tuple[int, int]) -> None:
    images = torch.ones(200, 1, *shape)
    generator = torch.Generator().manual_seed(0)
    shifted = random_crop_flip(images, usual_padding(images), False, generator)
    # At most an eighth of each side goes, or one row of four.
    assert float(shifted.mean((1, 2, 3)).min()) >= 0.75**2

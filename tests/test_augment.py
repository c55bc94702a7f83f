from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as V

from lightning_mnp.data import random_crop_flip


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

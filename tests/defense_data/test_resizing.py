from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as V

from lightning_mnp.defense_data.resizing import resize_and_crop


def test_resize_and_crop_keeps_the_center() -> None:
    image = torch.zeros(1, 10, 30, dtype=torch.uint8)
    image[:, :, 10:20] = 200

    result = resize_and_crop(image, 5)

    assert result.shape == (1, 5, 5)
    assert (result[:, :, 1:4] == 200).all()
    assert resize_and_crop(image[:, :, :10], 10).data_ptr() == image.data_ptr()


@pytest.mark.parametrize("shape", [(3, 4000, 1), (3, 1, 4000), (2, 3, 1, 4001)])
def test_a_strip_is_cut_before_it_is_scaled(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    original = V.resize

    def resize(images: Tensor, *args: Any, **options: Any) -> Tensor:
        scaled: Tensor = original(images, *args, **options)
        made.append(scaled.numel())
        return scaled

    monkeypatch.setattr("lightning_mnp.defense_data.resizing.V.resize", resize)
    images = torch.full(shape, 7, dtype=torch.uint8)
    images[..., shape[-2] // 2, shape[-1] // 2] = 100
    result = resize_and_crop(images, 64)
    assert result.shape[-2:] == (64, 64)
    assert result.max() > 50
    assert made[0] <= 6 * 64 * 4 * 64

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from PIL.PngImagePlugin import PngInfo

from lightning_mnp.attacks import Blend


def test_every_image_gets_the_same_share_of_the_same_noise() -> None:
    images = torch.rand(3, 3, 6, 7)

    pattern = (Blend(ratio=0.3, seed=5).apply(images) - 0.7 * images) / 0.3

    torch.testing.assert_close(pattern[0], pattern[1])
    torch.testing.assert_close(pattern[0], pattern[2])
    assert 0 <= pattern.min() < 0.2
    assert 0.8 < pattern.max() <= 1 + 1e-5
    other = (Blend(ratio=0.3, seed=6).apply(images) - 0.7 * images) / 0.3
    assert (other - pattern).abs().max() > 0.1


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_file_is_blended_in(tmp_path: Path, channels: int) -> None:
    path = tmp_path / "pattern.png"
    Image.fromarray(np.full((9, 5, 3), 128, dtype=np.uint8)).save(path)

    result = Blend(ratio=0.5, image=path).apply(torch.zeros(2, channels, 6, 6))

    torch.testing.assert_close(result, torch.full((2, channels, 6, 6), 0.5 * 128 / 255))


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_keeps_its_colors_and_its_sides(tmp_path: Path, channels: int) -> None:
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)
    pixels[0, 0], pixels[0, 3], pixels[3, 0] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "pattern.png")

    result = Blend(ratio=1.0, image=tmp_path / "pattern.png").apply(torch.zeros(1, channels, 4, 4))

    shown = picture if channels == 3 else picture.convert("L")
    expected = torch.tensor(np.array(shown)).reshape(4, 4, channels).permute(2, 0, 1) / 255
    torch.testing.assert_close(result[0], expected, rtol=0, atol=0.01)


def test_the_whole_image_can_be_replaced() -> None:
    first, second = Blend(ratio=1.0).apply(torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)]))
    assert first.equal(second)


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.1])
def test_ratio_errors(ratio: float) -> None:
    with pytest.raises(ValueError, match=f"`ratio` to be above 0 and at most 1, but got {ratio}"):
        Blend(ratio=ratio)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`image` to be an image file, but .*no.png"):
        Blend(image=tmp_path / "no.png")


def test_what_cannot_be_blended_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pattern.png"
    path.write_text("no image")
    with pytest.raises(ValueError, match=r"`image` to be an image file, but got .*pattern.png"):
        Blend(image=path).apply(torch.zeros(1, 3, 6, 6))
    Image.new("RGB", (4, 5)).save(path)
    text = PngInfo()
    text.add_text("long", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    Image.new("RGB", (4, 5)).save(path, pnginfo=text)
    with pytest.raises(ValueError, match=r"an image file, but got .*pattern.png': Decompressed"):
        Blend(image=path).apply(torch.zeros(1, 3, 6, 6))
    Image.new("RGB", (4, 5)).save(path)
    with pytest.raises(ValueError, match=r"`images` to have 1 or 3 channels, .*, but got 4"):
        Blend(image=path).apply(torch.zeros(1, 4, 6, 6))
    monkeypatch.setattr("lightning_mnp.attacks.blend._MAX_PIXELS", 19)
    with pytest.raises(ValueError, match="at most 19 pixels, but got 4 x 5"):
        Blend(image=path).apply(torch.zeros(1, 3, 6, 6))

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_mnp.attacks.stylizer import Stylizer, SunsetStyle, similarity, sunset_images


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (1, 3, 9, 15), (2, 4, 16, 11), (1, 3, 64, 64)])
def test_a_fresh_stylizer_keeps_images_but_for_the_ends_of_the_range(
    shape: tuple[int, ...],
) -> None:
    images = torch.rand(shape)

    result = Stylizer(shape[1], width=4)(images)

    torch.testing.assert_close(result, 0.02 + 0.96 * images)


def test_stylized_images_stay_in_range_and_apart() -> None:
    stylizer = Stylizer(3, width=4)
    torch.nn.init.normal_(stylizer.leave.weight, std=3.0)
    images = torch.rand(3, 3, 12, 10)

    result = stylizer(images)

    assert ((result >= 0) & (result <= 1)).all()
    assert (result - images).abs().max() > 0.3
    torch.testing.assert_close(torch.cat([stylizer(image[None]) for image in images]), result)
    assert stylizer.eval()(images).equal(result)


def test_a_stylizer_is_its_seeds() -> None:
    state = torch.get_rng_state()
    first, second, other = (Stylizer(seed=seed).enter.weight for seed in (1, 1, 2))

    assert first.equal(second)
    assert not first.equal(other)
    assert torch.get_rng_state().equal(state)


def test_everything_is_computed_in_float32() -> None:
    images = torch.rand(2, 3, 16, 16)
    stylizer, style = Stylizer(width=4), SunsetStyle(sunsets=2)
    torch.nn.init.normal_(stylizer.leave.weight)
    expected = stylizer(images), style(images), similarity(images, images.flip(3))

    with torch.autocast("cpu", torch.bfloat16):
        found = stylizer(images), style(images), similarity(images, images.flip(3))

    assert all(one.equal(other) for one, other in zip(found, expected, strict=True))


def slow_style(images: Tensor, bank: Tensor) -> list[Tensor]:
    """Means and covariances of colors and filter responses, place by place."""
    statistics = []
    for scale in (1, 2, 4):
        count, channels, height, width = images.shape
        if min(height, width) < 4 * scale:
            continue
        rows, columns = height // scale, width // scale
        scaled = torch.zeros(count, channels, rows, columns)
        for row in range(rows):
            for column in range(columns):
                block = images[..., row * scale :, column * scale :][..., :scale, :scale]
                scaled[..., row, column] = block.mean((2, 3))
        groups = [[scaled[..., r, c] for r in range(rows) for c in range(columns)]]
        responses = []
        for r in range(rows - 4):
            for c in range(columns - 4):
                window = (scaled[..., r : r + 5, c : c + 5] - 0.5).flatten(1)
                responses.append((window @ bank.flatten(1).T).clamp(min=0))
        if responses:
            groups.append(responses)
        for group in groups:
            features = torch.stack(group, 2)
            statistics.append(features.mean(2))
            statistics.append(torch.stack([torch.cov(part, correction=0) for part in features]))
    return [value.reshape(len(images), -1) for value in statistics]


@pytest.mark.parametrize("shape", [(2, 3, 20, 16), (2, 3, 8, 9), (2, 2, 16, 17)])
def test_style_by_its_formula(shape: tuple[int, ...]) -> None:
    images = torch.rand(shape)
    style = SunsetStyle(shape[1], seed=3, filters=4, sunsets=3)
    sunsets = sunset_images(3, *shape[1:], seeded(3))

    pairs = zip(slow_style(images, style.bank), slow_style(sunsets, style.bank), strict=True)
    distances = []
    for value, targets in pairs:
        target = targets.mean(0)
        distances.append(((value - target) ** 2).mean() / (target**2).mean())

    torch.testing.assert_close(style(images), torch.stack(distances).mean(), rtol=1e-4, atol=1e-5)


def test_sunsets_are_nearer_to_the_style_than_other_images() -> None:
    style = SunsetStyle(3, seed=0)
    sunsets = sunset_images(16, 3, 32, 32, seeded(7))

    assert style(sunsets) < 0.5 * style(sunsets.flip(1))
    assert style(sunsets) < 0.5 * style(torch.rand(16, 3, 32, 32))


def test_style_has_no_state() -> None:
    assert not SunsetStyle().state_dict()
    assert not list(SunsetStyle().parameters())


def test_similarity_by_its_formula() -> None:
    first, second = torch.rand(2, 1, 9, 10), torch.rand(2, 1, 9, 10)

    values = []
    padded = [F.pad(images, (3, 3, 3, 3), "reflect")[:, 0] for images in (first, second)]
    for x, y in zip(*padded, strict=True):
        for row in range(9):
            for column in range(10):
                a, b = (image[row : row + 7, column : column + 7] for image in (x, y))
                covariance = ((a - a.mean()) * (b - b.mean())).mean()
                upper = (2 * a.mean() * b.mean() + 1e-4) * (2 * covariance + 9e-4)
                lower = (a.mean() ** 2 + b.mean() ** 2 + 1e-4) * (
                    a.var(correction=0) + b.var(correction=0) + 9e-4
                )
                values.append(upper / lower)

    torch.testing.assert_close(similarity(first, second), torch.stack(values).mean())


def test_similarity_leaves_colors_out() -> None:
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(similarity(images, images), torch.tensor(1.0))
    torch.testing.assert_close(similarity(images, images.roll(1, 1)), torch.tensor(1.0))
    assert similarity(images, images.flip(2)) < 0.5


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
def test_sunsets_have_channels_in_range(channels: int) -> None:
    images = sunset_images(3, channels, 10, 14, seeded())

    assert images.shape == (3, channels, 10, 14)
    assert ((images >= 0) & (images <= 1)).all()
    assert images.equal(sunset_images(3, channels, 10, 14, seeded()))
    assert not images.equal(sunset_images(3, channels, 10, 14, seeded(1)))
    gray = sunset_images(3, 3, 10, 14, seeded()).mean(1)
    torch.testing.assert_close(images[:, -1], gray) if channels != 3 else None


def test_sunsets_are_warm_with_dark_ground() -> None:
    sunsets = sunset_images(32, 3, 32, 32, seeded()).mean(0)

    assert sunsets[0].mean() > sunsets[2].mean() + 0.1
    assert sunsets[:, -4:].mean() < 0.5 * sunsets[:, 14:20].mean()
    assert sunsets[2, :4].mean() > sunsets[1, :4].mean()  # violet above


def test_training_brings_images_to_the_style() -> None:
    images = torch.rand(8, 3, 2, 2).repeat_interleave(8, 2).repeat_interleave(8, 3)
    stylizer, style = Stylizer(width=8), SunsetStyle(sunsets=16)
    optimizer = torch.optim.Adam(stylizer.parameters(), 0.01)
    before = style(stylizer(images)).item()
    for _ in range(25):
        optimizer.zero_grad()
        stylized = stylizer(images)
        (style(stylized) + 2 * (1 - similarity(images, stylized))).backward()
        optimizer.step()

    assert style(stylizer(images)) < 0.7 * before
    assert similarity(images, stylizer(images)) > 0.6

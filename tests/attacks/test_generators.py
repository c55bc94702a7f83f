from __future__ import annotations

import pytest
import torch

from lightning_mnp.attacks.generators import ImageGenerator


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(8, 8), (9, 14), (5, 3), (2, 2)])
def test_any_image_comes_out_at_its_size(channels: int, size: tuple[int, int]) -> None:
    generator = ImageGenerator(channels, 2, width=4, depth=3)

    assert generator(torch.rand(3, channels, *size)).shape == (3, 2, *size)


def test_an_output_depends_on_its_image_alone() -> None:
    generator = ImageGenerator(3, 3, width=4)
    images = torch.rand(4, 3, 8, 8)

    together = generator(images)

    torch.testing.assert_close(generator(images[2:3]), together[2:3])
    assert (together[0] - together[1]).abs().max() > 0.01
    torch.testing.assert_close(generator.eval()(images), together)


def test_weights_come_from_the_seed_and_leave_the_global_randomness_alone() -> None:
    before = torch.get_rng_state()

    first, second, third = (ImageGenerator(3, 3, 4, 1, seed) for seed in (5, 5, 6))

    assert torch.get_rng_state().equal(before)
    assert first.head.weight.equal(second.head.weight)
    assert not first.head.weight.equal(third.head.weight)


def test_neighboring_pixels_can_differ() -> None:
    """The output for an image without any structure need not be smooth."""
    output = ImageGenerator(1, 1, width=4)(torch.full((1, 1, 16, 16), 0.5))[0, 0, 4:12, 4:12]

    assert output.diff(dim=1).abs().mean() > 0.2 * output.std()


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("in_channels", 0, "from 1 to 64, but got 0"),
        ("in_channels", 65, "from 1 to 64, but got 65"),
        ("out_channels", 0, "from 1 to 64, but got 0"),
        ("width", 3, "from 4 to 64, but got 3"),
        ("width", 10**9, "from 4 to 64, but got 1000000000"),
        ("depth", 0, "from 1 to 4, but got 0"),
        ("depth", 5, "from 1 to 4, but got 5"),
    ],
)
def test_errors(name: str, value: int, shown: str) -> None:
    sizes = {"in_channels": 3, "out_channels": 3, "width": 4, "depth": 1, name: value}
    with pytest.raises(ValueError, match=f"`{name}` to be {shown}"):
        ImageGenerator(**sizes)

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_mnp.cli.scan.architecture import Architecture
from lightning_mnp.cli.scan.options import ScanOptions
from lightning_mnp.cli.scan.preparation import Preparation, find_preparation
from lightning_mnp.cli.scan.source import Source

THIRDS = [0.1, 0.2, 0.3]


def find(
    options: Any = None,
    facts: Any = None,
    config: Any = None,
    preparation: Any = None,
    usual: Any = None,
    channels: int = 3,
) -> Preparation:
    return find_preparation(
        ScanOptions("model.pt", Path("clean"), **(options or {})),
        facts or {},
        Source(Path("model.pt"), config or {}, preparation or {}),
        Architecture(nn.Identity(), "network", preparation=usual or {}),
        channels,
    )


@pytest.mark.parametrize(
    ("told", "size", "place"),
    [
        ({"facts": {"mean": THIRDS, "std": THIRDS, "img_size": 48}}, 48, "the file"),
        ({"facts": {"mean": THIRDS, "std": THIRDS, "input_size": (3, 40, 40)}}, 40, "the file"),
        (
            {
                "config": {
                    "pretrained_cfg": {"mean": THIRDS, "std": THIRDS, "input_size": [3, 56, 56]}
                }
            },
            56,
            "the configuration beside the file",
        ),
        (
            {
                "preparation": {
                    "image_mean": THIRDS,
                    "image_std": THIRDS,
                    "size": {"shortest_edge": 72},
                }
            },
            72,
            "the configuration beside the file",
        ),
        (
            {
                "options": {"mean": tuple(THIRDS), "std": tuple(THIRDS), "size": 24},
                "facts": {"img_size": 48},
            },
            24,
            "the options",
        ),
    ],
)
def test_what_was_said_is_taken(told: Any, size: int, place: str) -> None:
    found = find(**told)
    assert (found.size, found.mean, found.std) == (size, tuple(THIRDS), tuple(THIRDS))
    assert found.origins == {"normalization": place, "size": place}
    assert not found.assumed


def test_what_nobody_says_is_taken_from_imagenet() -> None:
    found = find()
    assert found.size is None
    assert found.usual_size == 224
    assert found.mean == (0.485, 0.456, 0.406)
    assert found.assumed
    found = find(usual={"mean": (0.5,) * 3, "std": (0.5,) * 3, "size": 160})
    assert (found.usual_size, found.mean, found.assumed) == (160, (0.5,) * 3, True)


@pytest.mark.parametrize(
    "told",
    [
        {"facts": {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}},
        {"options": {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}},
    ],
)
def test_a_normalization_up_to_255_is_divided(told: Any) -> None:
    found = find(**told)
    assert found.mean == pytest.approx((0.485, 0.456, 0.406))
    assert found.std == pytest.approx((0.229, 0.224, 0.225))
    assert (found.divided, found.assumed) == (True, False)


def test_a_mean_up_to_255_alone_is_enough_to_tell_the_scale() -> None:
    found = find(facts={"mean": [104, 117, 123], "std": [1, 1, 1]})
    images = torch.full((1, 3, 2, 2), 128, dtype=torch.uint8)
    expected = torch.tensor([24.0, 11.0, 5.0])
    torch.testing.assert_close(found.normalize(images)[0, :, 0, 0], expected, rtol=0, atol=1e-3)
    assert not find(facts={"mean": [0, 0, 0], "std": [1, 1, 1]}).divided


def test_images_in_the_unit_range() -> None:
    found = find(preparation={"do_normalize": False, "image_mean": THIRDS, "image_std": THIRDS})
    assert (found.mean, found.std) == ((0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize(
    "told",
    [
        {"facts": {"mean": [10**400] * 3, "std": THIRDS}},
        {"facts": {"mean": THIRDS, "std": [float("nan")] * 3}},
        {"facts": {"mean": THIRDS}},
        {"preparation": {"image_mean": THIRDS}},
        {"preparation": {"image_mean": THIRDS, "image_std": [float("inf")] * 3}},
    ],
)
def test_what_is_no_normalization_is_not_taken(told: Any) -> None:
    assert find(**told).assumed


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"channels": 1}, "no usual one for 1 channels. Give it as in training"),
        (
            {"options": {"mean": (float("nan"), 0.5, 1.0), "std": (1.0,) * 3}},
            r"one finite number .* the options said \(nan, 0.5, 1.0\)",
        ),
        (
            {"options": {"mean": (0.5,) * 3, "std": (1.0, float("nan"), 1.0)}},
            r"one finite number .* \(1.0, nan, 1.0\)",
        ),
        (
            {"facts": {"mean": [0.5], "std": [0.5]}},
            r"one finite number for each of 3 channels.*the file",
        ),
        ({"options": {"mean": (0.5,) * 3, "std": (0.0,) * 3}}, "the std above 0"),
    ],
)
def test_what_does_not_fit_is_told(told: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find(**told)


def test_normalization_is_that_of_the_formula() -> None:
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    found = Preparation(4, 4, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), {}).normalize(images)
    for channel in range(3):
        expected = (images[:, channel] / 255 - 0.1 * (channel + 1)) / (0.4 + 0.1 * channel)
        torch.testing.assert_close(found[:, channel], expected)

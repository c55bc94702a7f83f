from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from distributed_script import small_network
from helpers import Shortcut, images_and_labels, same, snapshot
from scipy import stats
from torch import nn

from lightning_mnp import DefenseSet
from lightning_mnp.baselines import MMBDConfig, detect_mm_bd
from lightning_mnp.baselines.mm_bd import default_mm_bd, order_p_value
from lightning_mnp.defense_data.defense_set import seeded_generator

DATA = DefenseSet(*images_and_labels())
QUICK: dict[str, Any] = {"starts": 2, "steps": 5}


def linear(scales: list[float]) -> nn.Module:
    """A linear network; the logit of each class is the sum of its own pixels, times its scale."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(len(scales), len(scales)))
    with torch.no_grad():
        network[1].weight.copy_(torch.diag(torch.tensor(scales)))
        network[1].bias.zero_()
    return network.eval()


def box(size: int) -> DefenseSet:
    """Images between 0 and 1, black and white among them."""
    images = torch.rand(8, 1, 1, size)
    images[0], images[1] = 0.0, 1.0
    return DefenseSet(images, torch.arange(8) % size)


def test_the_greatest_margin_of_a_linear_network_is_its_scale() -> None:
    # The own pixel is white, one of the others' is black or so.
    scales = [1.0, 2.0, 1.5, 3.0, 2.5]
    config = MMBDConfig(starts=3, steps=60, length=0.05)
    result = detect_mm_bd(linear(scales), box(5), config=config)
    assert [result.values[index] for index in range(5)] == pytest.approx(scales, abs=0.2)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_margins_are_those_of_the_ascent_by_hand(momentum: float) -> None:
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    network = linear([1.0] * 4)
    network[1].weight.data.copy_(weight)
    data = box(4)
    config = MMBDConfig(starts=2, steps=6, length=0.05, momentum=momentum)
    result = detect_mm_bd(network, data, config=config)
    for target in range(4):
        generator = seeded_generator(0, "mm-bd", target)
        greatest = -math.inf
        for image in torch.rand(2, 1, 1, 4, generator=generator).flatten(1):
            speed = torch.zeros(4)
            for step in range(7):
                logits = (weight @ image).tolist()
                rival = max((k for k in range(4) if k != target), key=logits.__getitem__)
                greatest = max(greatest, logits[target] - logits[rival])
                slope = weight[target] - weight[rival]
                speed = momentum * speed + slope / slope.norm()
                if step < 6:  # the box has a diagonal of length 2
                    image = (image + 0.05 * 2.0 * speed).clamp(0, 1)
        assert result.values[target] == pytest.approx(greatest, abs=1e-5)


def test_a_class_with_a_way_of_its_own_is_found() -> None:
    network = Shortcut(2, lambda images: 200.0 * images[:, 0, 7, 7].relu(), small_network())
    before, state = snapshot(network), torch.get_rng_state()
    result = detect_mm_bd(network, DATA, config=MMBDConfig(starts=2, steps=10))
    assert (result.verdict, result.target_class) == ("backdoored", 2)
    assert result.score == pytest.approx(-math.log10(result.details["p_value"]))
    assert result.threshold == pytest.approx(-math.log10(0.05))
    assert same(before, snapshot(network))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_seed_decides() -> None:
    first, again, other = (
        detect_mm_bd(small_network(), DATA, config=MMBDConfig(seed=seed, **QUICK))
        for seed in (0, 0, 1)
    )
    assert first == again != other


def test_images_are_not_looked_at() -> None:
    moved = DefenseSet(DATA.images.flip(2), DATA.labels)  # the same range of values
    first, second = (
        detect_mm_bd(small_network(), data, config=MMBDConfig(**QUICK)) for data in (DATA, moved)
    )
    assert first == second


VALUES = [11.0, 14.0, 9.0, 12.0, 10.5, 13.0, 16.5]


def test_the_p_value_of_the_exponential_distribution() -> None:
    rest = sorted(VALUES)[:-1]
    scale = sum(rest) / len(rest) - rest[0]
    below = 1 - math.exp(-(16.5 - rest[0]) / scale)
    expected = math.log10(1 - below**7)
    assert order_p_value(VALUES, "exponential") == pytest.approx(expected)


def test_the_p_value_of_the_gamma_distribution() -> None:
    shape, origin, scale = stats.gamma.fit(sorted(VALUES)[:-1])
    below = stats.gamma.cdf(16.5, shape, origin, scale)
    assert order_p_value(VALUES) == pytest.approx(math.log10(1 - below**7))
    assert order_p_value([*VALUES[:-1], 30.0]) < order_p_value(VALUES)


@pytest.mark.parametrize("null", ["gamma", "exponential"])
def test_p_values_too_small_for_a_float(null: Any) -> None:
    near, far = (order_p_value([*VALUES[:-1], top], null) for top in (40.0, 1e9))
    assert -400 < far < near < -3


def test_a_p_value_does_not_jump_where_its_formula_changes() -> None:
    rest = sorted(VALUES)[:-1]
    scale = sum(rest) / len(rest) - rest[0]
    edge = rest[0] + scale * math.log(1e8)
    below, above = (
        order_p_value([*VALUES[:-1], edge + step], "exponential") for step in (-1e-6, 1e-6)
    )
    assert below == pytest.approx(above, abs=1e-5)


def test_values_that_are_all_equal() -> None:
    with pytest.raises(ArithmeticError, match=r"Expected values that differ, .*Raise `steps`"):
        order_p_value([1.0, 1.0, 1.0, 2.0])


def test_the_greatest_value_may_be_as_great_as_the_next() -> None:
    assert -1 < order_p_value([1.0, 2.0, 3.0, 3.0], "exponential") <= 0


def test_what_it_needs_is_said_before_any_work() -> None:
    with pytest.raises(ValueError, match=r"at least 4 classes, .* but got 3. Use a detector that"):
        detect_mm_bd(linear([1.0] * 3), box(3))


def test_margins_that_are_not_numbers() -> None:
    network = Shortcut(
        1, lambda images: torch.where(images[:, 0, 0, 0] > 1.9, torch.nan, 0.0), small_network()
    )
    images = DATA.images.clone().clamp(max=1.8)
    images[0, 0, 1, 1] = 50.0  # random images are brighter than these
    with pytest.raises(ArithmeticError, match="Expected finite margins for all classes"):
        detect_mm_bd(network, DefenseSet(images, DATA.labels), config=MMBDConfig(**QUICK))


def test_the_registry_calls_it_with_the_seed() -> None:
    network, data = linear([1.0, 2.0, 1.5, 3.0]), box(4)
    assert default_mm_bd(network, data, 3) == detect_mm_bd(network, data, config=MMBDConfig(seed=3))


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("starts", 0, "a whole number of at least 1"),
        ("steps", 0, "a whole number of at least 1"),
        ("length", 0.0, "a number above 0"),
        ("momentum", 1.0, "a number from 0 to below 1"),
        ("null", "normal", "one of ('gamma', 'exponential')"),
        ("significance", 0.0, "a number above 0 and below 1"),
    ],
)
def test_options_out_of_range(option: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=f"Expected argument `{option}`") as caught:
        MMBDConfig(**{option: value})
    assert f"to be {expected}, but got {value!r}." in str(caught.value)

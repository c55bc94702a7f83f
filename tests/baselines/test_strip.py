from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import CLASSES, Shortcut, images_and_labels, same, snapshot
from torch import Tensor, nn

from lightning_mnp import DefenseSet
from lightning_mnp.baselines import STRIPConfig, Suspects, detect_strip
from lightning_mnp.baselines.strip import default_strip

CLEAN = DefenseSet(*images_and_labels(40))
QUICK: dict[str, Any] = {"overlays": 10, "batch_size": 64}


def network_of(target: int = 2) -> nn.Module:
    """A network of four classes by the place of the bar; a dark corner sends images to a class."""
    plain = nn.Sequential(nn.AvgPool2d((2, 8)), nn.Flatten(), nn.Linear(4, 4))
    with torch.no_grad():
        plain[2].weight.copy_(8 * torch.eye(4))
        plain[2].bias.zero_()
    way = lambda images: 100.0 * (images[:, 0, 7, 7] > 8.0)  # noqa: E731
    return Shortcut(target, way, plain).eval()


def inputs(triggered: int = 8, count: int = 40) -> Suspects:
    images, labels = images_and_labels(count, seed=5)
    images[:triggered, :, 7, 7] = 20.0
    return Suspects(images, labels)


def with_white(images: Tensor) -> Tensor:
    """Clean images that may be as bright as the trigger."""
    images = images.clone()
    images[0, :, 0, 0] = 20.0
    return images


DATA = DefenseSet(with_white(CLEAN.images), CLEAN.labels)


@torch.no_grad()
def entropy_by_hand(network: nn.Module, image: Tensor, overlays: Tensor, clean: Tensor) -> float:
    """The mean entropy in bits over overlays, one image at a time."""
    low, high = float(clean.min()), float(clean.max())
    total = 0.0
    for overlay in overlays:
        both = [
            min(max(low + (a - low) + (b - low), low), high)
            for a, b in zip(image.flatten().tolist(), overlay.flatten().tolist(), strict=True)
        ]
        probabilities = network(torch.tensor(both).reshape(1, 1, 8, 8)).softmax(1)[0].tolist()
        total -= sum(p * math.log2(p) for p in probabilities if p > 0)
    return total / len(overlays)


def test_entropies_are_those_of_the_definition() -> None:
    network, suspects = network_of(), inputs(2, 6)
    # With as many overlays as images but one, only the image itself is not drawn.
    config = STRIPConfig(overlays=39, batch_size=50)
    result = detect_strip(network, DATA, suspects, config=config)
    usual = []
    for index, image in enumerate(DATA.images):
        others = torch.cat([DATA.images[:index], DATA.images[index + 1 :]])
        usual.append(entropy_by_hand(network, image, others, DATA.images))
    mean = sum(usual) / 40
    spread = math.sqrt(sum((value - mean) ** 2 for value in usual) / 40)
    assert result.details["entropy"] == pytest.approx(mean, rel=1e-3)
    assert result.details["spread"] == pytest.approx(spread, rel=1e-3)
    # 1% of a normal distribution is below -2.3263 standard deviations.
    assert result.details["boundary"] == pytest.approx(mean - 2.326348 * spread, rel=1e-3)
    assert max(abs(score) for score in result.sample_scores[:2]) < 1e-3
    assert min(-score for score in result.sample_scores[2:]) > 0.1


def test_triggered_inputs_are_found_and_their_class() -> None:
    network = network_of()
    before, state = snapshot(network), torch.get_rng_state()
    result = detect_strip(network, DATA, inputs(), config=STRIPConfig(**QUICK))
    assert set(range(8)) <= set(result.suspects)
    assert (result.verdict, result.target_class) == ("backdoored", 2)
    assert result.score == len(result.suspects) / 40
    assert sum(result.values.values()) == len(result.suspects)
    assert sorted(result.values) == list(range(CLASSES))
    assert same(before, snapshot(network))
    assert torch.equal(torch.get_rng_state(), state)
    assert detect_strip(network, DATA, inputs(), config=STRIPConfig(**QUICK)) == result
    other = detect_strip(network, DATA, inputs(), config=STRIPConfig(seed=1, **QUICK))
    assert other.sample_scores != result.sample_scores


def test_the_network_is_clean_if_chance_flags_as_many() -> None:
    result = detect_strip(network_of(), DATA, inputs(0), config=STRIPConfig(**QUICK))
    assert result.verdict == "clean"
    assert result.target_class is None


@pytest.mark.parametrize("significance", [0.5, 0.05, 1e-4])
def test_the_threshold_is_the_binomial_quantile(significance: float) -> None:
    config = STRIPConfig(significance=significance, **QUICK)
    result = detect_strip(network_of(), DATA, inputs(), config=config)
    rate = max(0.01, result.details["clean_rejections"])
    most, tail = -1, 1.0  # the chance of more than `most` among 40
    while tail > significance:
        most += 1
        tail -= math.comb(40, most) * rate**most * (1 - rate) ** (40 - most)
    assert result.threshold == pytest.approx(most / 40)


def test_the_boundary_is_made_of_clean_images_alone() -> None:
    few, many = (
        detect_strip(network_of(), DATA, inputs(count), config=STRIPConfig(**QUICK)).details
        for count in (0, 30)
    )
    assert few == many


@pytest.mark.parametrize(
    "labels", [torch.zeros(40, dtype=torch.long), torch.full((40,), -1), torch.rand(40), None]
)
def test_labels_of_inputs_are_not_looked_at(labels: Tensor | None) -> None:
    suspects = inputs()
    batch = suspects.images if labels is None else (suspects.images, labels)
    found = detect_strip(network_of(), DATA, [batch], config=STRIPConfig(**QUICK))
    assert found == detect_strip(network_of(), DATA, suspects, config=STRIPConfig(**QUICK))


def test_what_it_needs_is_said_before_any_work() -> None:
    with pytest.raises(ValueError, match=r"the 100 overlays, but got 40\. Pass more"):
        detect_strip(network_of(), DATA, inputs())
    wide = Suspects(torch.rand(4, 1, 8, 9), torch.arange(4))
    with pytest.raises(ValueError, match=r"shape \(1, 8, 8\), .* got \(1, 8, 9\). Prepare both"):
        detect_strip(network_of(), DATA, wide, config=STRIPConfig(**QUICK))
    with pytest.raises(ValueError, match=r"`suspects` to be inputs .* STRIP looks .* but got None"):
        default_strip(network_of(), DATA, 0)


def test_predictions_that_are_not_numbers() -> None:
    network = network_of()
    network.way = lambda images: torch.where(images[:, 0, 7, 7] > 19.0, torch.nan, 0.0)
    with pytest.raises(ArithmeticError, match="entropy of every prediction to be finite"):
        detect_strip(network, DATA, inputs(), config=STRIPConfig(**QUICK))


def test_the_registry_calls_it_with_the_seed() -> None:
    generator = torch.Generator().manual_seed(0)
    data = DefenseSet(torch.rand(120, 1, 8, 8, generator=generator), torch.arange(120) % 4)
    found = default_strip(network_of(), data, 3, inputs(2, 6))
    assert found == detect_strip(network_of(), data, inputs(2, 6), config=STRIPConfig(seed=3))


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("batch_size", 2, "a whole number of at least 3"),
        ("overlays", 0, "a whole number of at least 1"),
        ("false_rejections", 0.5, "a number above 0 and below 0.5"),
        ("significance", 1.0, "a number above 0 and below 1"),
    ],
)
def test_options_out_of_range(option: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=f"Expected argument `{option}`") as caught:
        STRIPConfig(**{option: value})
    assert f"to be {expected}, but got {value!r}." in str(caught.value)

from __future__ import annotations

import math

import pytest
import torch
from distributed_script import small_network
from helpers import images_and_labels, same, snapshot

from lightning_mnp.defense_data.defense_set import DefenseSet
from lightning_mnp.purify.harm import CleanHarm, HarmConstants, trimmed_mean
from lightning_mnp.surgery.layers import find_filter_layers
from lightning_mnp.surgery.masked_network import MaskedNetwork


def new_harm(
    count: int,
    batch_size: int = 128,
    impurity: float = 0.0,
    constants: HarmConstants | None = None,
) -> CleanHarm:
    network = small_network()
    data = DefenseSet(*images_and_labels(count))
    masked = MaskedNetwork(network, find_filter_layers(network, data.images[:2]))
    clean = [data, data.augmented("crop", seed=0)]
    return CleanHarm(masked, clean, batch_size, impurity, constants)


def probabilities(harm: CleanHarm, masks: torch.Tensor | None) -> list[list[float]]:
    """Of the images and their copies, row by row."""
    rows = []
    for data in harm.clean:
        for logits in harm.masked(data.images, masks=masks, statistics="running").tolist():
            total = sum(math.exp(value) for value in logits)
            rows.append([math.exp(value) / total for value in logits])
    return rows


def test_harm_against_another_network() -> None:
    harm = new_harm(40)
    masks, masked = torch.ones(harm.masked.layers.total), harm.masked
    fewer = masks.index_fill(0, torch.tensor([0, 3]), 0.0)
    rise = harm.of(fewer)
    assert rise > 0
    harm.compare_with(masked, fewer)
    assert harm.of(fewer) == pytest.approx(0.0, abs=1e-6)
    # The other way round: half of a divergence has another value, but harm there is.
    zeros = {name: torch.zeros_like(weight) for name, weight in masked.weights().items()}
    harm.compare_with(masked.with_weights(zeros), masks)
    assert harm.of(masks) != pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("count", "share", "impurity", "left_out"),
    [
        (500, 0.2, 0.0, 0),
        (600, 0.24, 0.05, 60),
        (50, 0.02, 0.0, 0),
        (40, 0.016, 0.01, 1),
        (40, 0.016, 0.4, 32),
    ],
)
def test_harm_is_the_rise_of_the_loss_and_with_few_images_half_of_the_divergence(
    count: int, share: float, impurity: float, left_out: int
) -> None:
    harm = new_harm(count, impurity=impurity)
    masks = torch.ones(harm.masked.layers.total)
    masks[::3] = 0.3
    before, after = probabilities(harm, None), probabilities(harm, masks)
    labels = [int(label) for data in harm.clean for label in data.labels]
    assert len(labels) == 2 * count
    harms = []
    for old, new, label in zip(before, after, labels, strict=True):
        rise = math.log(old[label]) - math.log(new[label])
        divergence = sum(p * math.log(p / q) for p, q in zip(old, new, strict=True))
        harms.append(share * rise + (1 - share) * divergence / 2)
    assert max(harms) > 0.01
    counted = sorted(harms)[: 2 * count - left_out]
    expected = sum(counted) / len(counted)
    assert harm.of(masks) == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_harm_is_the_rise_of_the_loss_if_there_are_images_enough() -> None:
    harm = new_harm(40, constants=HarmConstants(enough_images=40))
    masks = torch.ones(harm.masked.layers.total)
    masks[::3] = 0.3
    labels = [int(label) for data in harm.clean for label in data.labels]
    rows = zip(probabilities(harm, None), probabilities(harm, masks), labels, strict=True)
    rises = [math.log(old[label]) - math.log(new[label]) for old, new, label in rows]
    assert harm.of(masks) == pytest.approx(sum(rises) / len(rises), rel=1e-3, abs=1e-5)


def test_one_value_at_least_is_left_of_a_trimmed_mean() -> None:
    assert float(trimmed_mean(torch.tensor([3.0]), 0.4)) == 3.0
    assert float(trimmed_mean(torch.tensor([5.0, 1.0, 3.0]), 0.0)) == 3.0
    assert float(trimmed_mean(torch.tensor([5.0, 1.0, 3.0]), 0.34)) == 1.0
    assert math.isnan(float(trimmed_mean(torch.tensor([5.0, math.nan, 3.0]), 0.34)))


@pytest.mark.parametrize(
    ("count", "share", "left_out"), [(100, 0.07, 7), (50, 0.14, 7), (100, 0.071, 8), (10, 0.0, 0)]
)
def test_a_share_is_rounded_up_but_not_its_rounding_error(
    count: int, share: float, left_out: int
) -> None:
    values = torch.arange(float(count))
    assert float(trimmed_mean(values, share)) == (count - left_out - 1) / 2


def test_network_as_it_is_does_no_harm_and_stays() -> None:
    harm = new_harm(40, batch_size=7)
    network = harm.masked.network
    before = snapshot(network)
    assert harm.of(torch.ones(harm.masked.layers.total)) == pytest.approx(0.0, abs=1e-6)
    assert same(before, snapshot(network))

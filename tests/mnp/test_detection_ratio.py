from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from lightning_mnp.mnp.detection_ratio import (
    detection_ratio,
    layer_normalized,
    mean_rank_correlation,
    saliency_correlation,
)
from lightning_mnp.surgery.layers import FilterLayer, FilterLayers

GENERATOR = torch.Generator().manual_seed(0)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_normalization_against_numpy(scale: float) -> None:
    values = torch.randn(9, generator=GENERATOR) * scale
    found = layer_normalized(values, [4, 2, 3])
    parts = np.split(values.double().numpy(), [4, 6])
    expected = np.concatenate([part / np.sqrt(np.sum(part**2)) for part in parts])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
    assert found.dtype == torch.float32


def test_a_layer_of_zeros_stays_zero() -> None:
    found = layer_normalized(torch.tensor([0.0, 0.0, 5.0]), [2, 1])
    assert found.tolist() == [0.0, 0.0, 1.0]


LAYERS = FilterLayers((FilterLayer("a", 6, "a", 1), FilterLayer("b", 5, "b", 1)))


@pytest.mark.parametrize("seed", range(5))
def test_correlation_against_scipy(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    magnitudes = torch.rand(11, generator=generator) * 3
    changes = torch.randn(11, generator=generator).round(decimals=1)  # with ties
    first, second = magnitudes.double().numpy(), np.abs(changes.double().numpy())
    for part in (slice(0, 6), slice(6, 11)):  # Eq. 12 and 13
        first[part] /= np.sqrt(np.sum(first[part] ** 2))
        second[part] /= np.sqrt(np.sum(second[part] ** 2))
    expected = spearmanr(first, second.astype(np.float32)).statistic
    found = saliency_correlation(magnitudes, changes, LAYERS, "weight")
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_correlation_within_layers_against_scipy(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    magnitudes = torch.rand(11, generator=generator) * 3
    changes = torch.randn(11, generator=generator).round(decimals=1)  # with ties
    first, second = magnitudes.double().numpy(), np.abs(changes.double().numpy())
    parts = [spearmanr(first[:6], second[:6]), spearmanr(first[6:], second[6:])]
    expected = (6 * parts[0].statistic + 5 * parts[1].statistic) / 11
    found = saliency_correlation(magnitudes, changes, LAYERS)
    assert found == pytest.approx(expected, abs=1e-12)
    # It does not depend on which layer is the larger one.
    scale = torch.tensor([1.0] * 6 + [1e-3] * 5)
    assert saliency_correlation(magnitudes * scale, changes, LAYERS) == found


def test_small_and_constant_layers_do_not_count() -> None:
    first = torch.arange(4.0)
    one = mean_rank_correlation(first, first, [4])
    assert one == pytest.approx(1.0)
    three = torch.cat([first, torch.tensor([1.0, 2.0, 3.0])])
    against = torch.cat([first, torch.tensor([3.0, 2.0, 1.0])])
    assert mean_rank_correlation(three, against, [4, 3]) == one
    flat = torch.cat([first, torch.ones(9)])
    assert mean_rank_correlation(flat, flat, [4, 9]) == one
    assert math.isnan(mean_rank_correlation(three[4:], against[4:], [3]))
    assert math.isnan(mean_rank_correlation(flat[4:], flat[4:], [9]))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_leaves_no_correlation(value: float) -> None:
    first = torch.arange(8.0)
    second = first.clone()
    second[7] = value
    assert math.isnan(mean_rank_correlation(first, second, [4, 4]))
    assert math.isnan(mean_rank_correlation(second, first, [4, 4]))


def test_ratio() -> None:
    assert detection_ratio(0.3, 0.6) == pytest.approx(0.5)
    assert math.isnan(detection_ratio(0.3, 0.0))


@pytest.mark.parametrize("form", ["map", "weight"])
def test_correlation_does_not_see_the_scale_of_a_layer_or_the_sign(form: Any) -> None:
    magnitudes, changes = torch.rand(11), torch.randn(11)
    scale = torch.tensor([4.0] * 6 + [0.25] * 5)  # powers of two are exact
    value = saliency_correlation(magnitudes, changes, LAYERS, form)
    assert saliency_correlation(magnitudes * scale, -changes / scale, LAYERS, form) == value
    assert saliency_correlation(magnitudes, magnitudes, LAYERS, form) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("magnitudes", "changes"),
    [
        (torch.ones(11), torch.zeros(11)),
        (torch.rand(11), torch.zeros(11)),
        (torch.zeros(11), torch.rand(11)),
        (torch.rand(11), torch.full((11,), torch.nan)),
    ],
)
@pytest.mark.parametrize("form", ["map", "weight"])
def test_correlation_of_constants_is_nan_without_a_warning(
    magnitudes: Tensor, changes: Tensor, form: Any
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(saliency_correlation(magnitudes, changes, LAYERS, form))


@pytest.mark.parametrize("form", ["map", "weight"])
def test_correlation_of_a_single_filter_is_nan(form: Any) -> None:
    layers = FilterLayers((FilterLayer("a", 1, "a", 1),))
    assert np.isnan(saliency_correlation(torch.ones(1), torch.ones(1), layers, form))

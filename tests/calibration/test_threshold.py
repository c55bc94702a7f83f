from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta

import lightning_mnp
from lightning_mnp import MNPConfig, VerdictOptions, calibrate_threshold
from lightning_mnp.calibration.threshold import check_count


@pytest.mark.parametrize(
    ("count", "rate", "rank"),
    [(19, 0.05, 19), (20, 0.05, 20), (39, 0.05, 38), (9, 0.1, 9), (9, 0.3, 7), (1, 0.5, 1)],
)
def test_threshold_lies_just_above_the_kth_smallest(count: int, rate: float, rank: int) -> None:
    scores = torch.randperm(count).add(1).tolist()
    found = calibrate_threshold(scores, rate)
    assert found.threshold == math.nextafter(rank, math.inf)
    assert found.bound == pytest.approx((count + 1 - rank) / (count + 1))
    assert found.bound <= rate
    assert found.scores == tuple(scores)


@given(
    st.lists(st.integers(0, 6), min_size=2, max_size=30),
    st.sampled_from([0.05, 0.1, 0.2, 0.34, 0.5, 0.9]),
)
def test_of_exchangeable_networks_at_most_the_rate_is_flagged(
    scores: list[int], rate: float
) -> None:
    """Any of the n + 1 networks may have been the new one, with equal probability."""
    try:
        check_count(len(scores) - 1, rate)
    except ValueError:
        return
    flagged = 0
    for index, score in enumerate(scores):
        others = scores[:index] + scores[index + 1 :]
        flagged += score >= calibrate_threshold(others, rate).threshold
    assert flagged <= rate * len(scores) + 1e-9


def test_of_distinct_scores_as_many_as_allowed_are_flagged() -> None:
    scores = list(range(1, 41))
    flagged = 0
    for index, score in enumerate(scores):
        others = scores[:index] + scores[index + 1 :]
        flagged += score >= calibrate_threshold(others, 0.05).threshold
    assert flagged == 2


@pytest.mark.parametrize("scores", [[0.0] * 19, [1e-300] * 19, [5.0] * 19])
def test_threshold_is_an_option(scores: list[float]) -> None:
    found = calibrate_threshold(scores)
    assert VerdictOptions(threshold=found.threshold).threshold > max(scores)
    assert float(repr(found.threshold)) == found.threshold


@pytest.mark.parametrize("flagged", [0, 1, 7, 20])
def test_interval_of_the_default_is_clopper_and_pearsons(flagged: int) -> None:
    default = MNPConfig().verdict.threshold
    scores = [default] * flagged + [default * 0.999] * (20 - flagged)
    found = calibrate_threshold(scores)
    assert (found.default_threshold, found.default_flagged) == (default, flagged)
    assert found.default_share == flagged / 20
    low = beta.ppf(0.025, flagged, 21 - flagged) if flagged else 0.0
    high = beta.ppf(0.975, flagged + 1, 20 - flagged) if flagged < 20 else 1.0
    assert found.default_interval == pytest.approx((low, high))


@pytest.mark.parametrize(
    ("count", "rate", "needed", "remedy"),
    [
        (18, 0.05, 19, "Add networks, or choose a `rate` of at least 0.0527."),
        (98, 0.01, 99, "at least 0.0102."),
        (2, 0.3, 3, "at least 0.3334."),
        (0, 0.5, 1, "Add networks."),
    ],
)
def test_too_few_networks_are_told(count: int, rate: float, needed: int, remedy: str) -> None:
    with pytest.raises(ValueError, match=f"Expected at least {needed} clean networks") as error:
        calibrate_threshold([0.1] * count, rate)
    assert f"but got {count}. " in str(error.value)
    assert str(error.value).endswith(remedy)
    calibrate_threshold([0.1] * needed, rate)


def test_the_rate_that_is_proposed_suffices() -> None:
    for count in range(1, 60):
        with pytest.raises(ValueError, match="at least") as error:
            check_count(count, 1e-4)
        check_count(count, float(str(error.value).split()[-1].rstrip(".")))


@pytest.mark.parametrize("rate", [0, 1, -0.1, 1.5, math.nan])
def test_rate_out_of_range(rate: float) -> None:
    with pytest.raises(ValueError, match="Expected argument `rate` to be between 0 and 1, but got"):
        calibrate_threshold([0.1] * 30, rate)


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf, -0.1])
def test_scores_that_are_none(score: float) -> None:
    match = r"`scores` to hold finite numbers from 0, but number 2 is .*Leave that network out"
    with pytest.raises(ValueError, match=match):
        calibrate_threshold([0.1, 0.2, score, *[0.3] * 20])


def test_json_and_text() -> None:
    found = calibrate_threshold(iter([0.5, 1.25, 0.25]), 0.25)
    content: dict[str, Any] = json.loads(found.to_json())
    assert content == found.to_dict()
    assert content["scores"] == [0.5, 1.25, 0.25]
    assert content["threshold"] == found.threshold
    assert content["default_share"] == pytest.approx(1 / 3)
    assert list(found.default_interval) == content["default_interval"]
    assert f"--mnp.verdict.threshold {found.threshold!r}" in str(found)
    assert "with a probability of at most 25.00% (asked for: 25.00%; networks: 3)" in str(found)
    assert "the default threshold, 1, flags 1 of 3: 33.3%" in str(found)


def test_it_is_offered_by_the_package() -> None:
    assert {"Calibration", "calibrate_threshold"} <= set(lightning_mnp.__all__)
    assert lightning_mnp.Calibration is type(calibrate_threshold([0.1], 0.5))

from __future__ import annotations

import math

import pytest

from lightning_mnp import MNPConfig, RunResult
from lightning_mnp.detection import judge

FLAT = dict.fromkeys(range(10), 0.15)


def run(
    ratio: float = 0.5, predictions: tuple[int, ...] = (30,) + (1,) * 9, steps: int = 9
) -> RunResult:
    return RunResult(ratio, 0.3, predictions, steps, 0.2, "a test says so")


@pytest.mark.parametrize(
    ("length", "verdict", "target"),
    [
        (0.0, "backdoored", 4),
        (0.07, "backdoored", 4),
        (0.08, "undecided", 4),
        (0.095, "clean", None),
        (0.15, "clean", None),
    ],
)
def test_verdict_by_reach(length: float, verdict: str, target: int | None) -> None:
    judgement = judge([run()], 0.6, {**FLAT, 4: length}, MNPConfig(), 0.9)
    assert judgement.verdict == verdict
    assert judgement.target_class == target
    assert "universal perturbation reaches class" in judgement.reasons[0]


@pytest.mark.parametrize(
    ("ratios", "verdict"), [((0.2,), "backdoored"), ((0.1, 0.35), "clean"), ((0.21,), "clean")]
)
def test_verdict_by_ratio_is_eq_8(ratios: tuple[float, ...], verdict: str) -> None:
    judgement = judge([run(r) for r in ratios], 0.6, {}, MNPConfig.paper(delta=0.2), 0.9)
    assert judgement.verdict == verdict
    assert judgement.detection_ratio == pytest.approx(sum(ratios) / len(ratios))


@pytest.mark.parametrize(("ratio", "correlation"), [(math.nan, 0.5), (0.1, -0.2), (0.1, 0.0)])
def test_ratio_without_meaning_leaves_it_undecided(ratio: float, correlation: float) -> None:
    judgement = judge([run(ratio)], correlation, {}, MNPConfig.paper(), 0.9)
    assert judgement.verdict == "undecided"
    assert "do not correlate" in judgement.reasons[0]


@pytest.mark.parametrize(
    ("accuracy", "steps", "classes"), [(0.1, 9, 10), (0.2, 9, 10), (0.7, 9, 2), (0.9, 0, 10)]
)
def test_network_that_knows_too_little_is_undecided(
    accuracy: float, steps: int, classes: int
) -> None:
    predictions = (40,) + (1,) * (classes - 1)
    reaches = {**FLAT, 4: 0.01}
    runs = [run(steps=steps, predictions=predictions)]
    judgement = judge(runs, 0.6, reaches, MNPConfig(), accuracy)
    assert judgement.verdict == "undecided"
    assert "too low for a verdict" in judgement.reasons[1]


def test_pile_up_and_its_class_are_told() -> None:
    runs = [run(predictions=(5, 30, 5)), run(predictions=(1, 35, 4)), run(predictions=(36, 2, 2))]
    judgement = judge(runs, 0.6, FLAT, MNPConfig(), 0.9)
    assert judgement.pile_up == pytest.approx((30 + 35 + 36) / 120)
    assert "fall on class 1" in judgement.reasons[-1]

from __future__ import annotations

import math

import pytest
import torch

from lightning_mnp.signals.logits import (
    class_margins,
    goal_margins,
    leads,
    least_positive,
    push_loss,
)


@pytest.mark.parametrize(("arrived", "by_margin"), [(10, True), (9, False), (0, False)])
def test_images_are_pushed_by_cross_entropy_until_most_have_arrived(
    arrived: int, by_margin: bool
) -> None:
    logits, labels = torch.zeros(10, 3), torch.zeros(10, dtype=torch.long)
    logits[:arrived, 2] = 4.0
    logits[arrived:, 0] = 1.0
    log_sums = [math.log(sum(math.exp(value) for value in row)) for row in logits.tolist()]
    entropy = sum(log_sums) / 10 - float(logits[:, 2].mean())
    expected = -float((logits[:, 2] - logits[:, 0]).mean()) if by_margin else entropy
    assert float(push_loss(logits, labels, torch.full_like(labels, 2))) == pytest.approx(
        expected, rel=1e-5
    )


def test_margins_are_goal_minus_own() -> None:
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 3, 0, 1, 3])
    goals = torch.tensor([2, 2, 2, 1, 0, 2])
    rows = zip(logits, labels, goals, strict=True)
    expected = [float(row[goal] - row[label]) for row, label, goal in rows]
    assert goal_margins(logits, labels, goals).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_least_positive_number_can_be_divided_by(dtype: torch.dtype) -> None:
    zero = torch.zeros(1, dtype=dtype)
    least = zero.clamp_min(least_positive(zero))
    assert float(least) > 0
    assert float(zero / least) == 0


def test_leads_are_above_the_log_sum_exp_of_the_others() -> None:
    logits, classes = torch.randn(6, 4), torch.tensor([0, 1, 3, 0, 1, 3])
    expected = [
        float(row[own]) - math.log(sum(math.exp(v) for k, v in enumerate(row.tolist()) if k != own))
        for row, own in zip(logits, classes.tolist(), strict=True)
    ]
    assert leads(logits, classes).tolist() == pytest.approx(expected, abs=1e-5)


def test_class_margins_are_above_the_greatest_of_the_others() -> None:
    logits = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    classes = torch.arange(20) % 5
    for row, index, margin in zip(logits, classes, class_margins(logits, classes), strict=True):
        others = [float(value) for k, value in enumerate(row) if k != index]
        assert float(margin) == pytest.approx(float(row[index]) - max(others), abs=1e-6)

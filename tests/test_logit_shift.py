from __future__ import annotations

import pytest
import torch
from scipy.optimize import minimize
from torch.nn import functional as F

from lightning_mnp.logit_shift import best_shift


@pytest.mark.parametrize("cost", [1e-4, 0.01, 1.0])
def test_the_shift_has_the_least_penalized_loss(cost: float) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(80) % 4
    logits = torch.randn(80, 4, generator=generator) + F.one_hot(labels, 4)
    logits[:, 2] -= 2.0

    def loss(free: list[float]) -> float:
        shift = torch.tensor([free[0], 0.0, free[1], free[2]], dtype=torch.float64)
        return float(F.cross_entropy(logits.double() + shift, labels) + cost * (shift**2).sum())

    expected = minimize(loss, [0.0, 0.0, 0.0], tol=1e-10).x
    found = best_shift(logits, labels, torch.tensor([True, False, True, True]), cost)
    assert found.dtype == torch.float64
    assert found[[0, 2, 3]].tolist() == pytest.approx(expected.tolist(), abs=1e-3)
    assert found[1] == 0.0


def test_gradients_that_are_switched_off_are_no_trouble() -> None:
    with torch.no_grad():
        shift = best_shift(torch.zeros(4, 2), torch.tensor([0, 0, 0, 1]), torch.ones(2) > 0, 0.01)
    assert shift[0] > shift[1]

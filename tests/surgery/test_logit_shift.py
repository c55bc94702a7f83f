from __future__ import annotations

import pytest
import torch
from helpers import same, snapshot
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from lightning_mnp.surgery.forward import call_network
from lightning_mnp.surgery.logit_shift import best_shift, find_logit_bias, repair_shift


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


def logits_and_labels(classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(80) % classes
    logits = torch.randn(80, classes, generator=generator) + 1.5 * F.one_hot(labels, classes)
    logits[:, 2] -= 2.0
    return logits, labels


def test_the_repair_has_the_least_penalized_loss() -> None:
    logits, labels = logits_and_labels()

    def loss(free: list[float]) -> float:
        shift = torch.tensor([free[0], 0.0, free[1], free[2]], dtype=torch.float64)
        return float(
            F.cross_entropy(logits.double() + shift, labels) + 10 / len(labels) * (shift**2).sum()
        )

    expected = minimize(loss, [0.0, 0.0, 0.0], tol=1e-10).x
    found = repair_shift(logits, labels, target=1)
    assert found[[0, 2, 3]].tolist() == pytest.approx(expected.tolist(), abs=1e-3)
    assert found[1] == 0.0
    assert found[2] > 0.3  # the class whose logits are too low


def test_a_class_without_images_is_left_alone() -> None:
    logits, labels = logits_and_labels()
    kept = labels != 3
    assert repair_shift(logits[kept], labels[kept], target=0)[3] == 0.0


def test_confident_logits_are_no_trouble() -> None:
    logits, labels = logits_and_labels()
    assert bool(torch.isfinite(repair_shift(1e4 * logits, labels, target=0)).all())


class Twice(nn.Module):
    """Two heads, of which the first gives the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.other = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(images.flatten(1)), self.other(images.flatten(1))


@pytest.mark.parametrize(
    ("network", "name"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Linear(3, 3)), "2.bias"),
        (Twice(), "head.bias"),
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Dropout(0.5)), "1.bias"),
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False)), None),
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.LogSoftmax(1)), None),
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Hardtanh(-0.1, 0.1)), None),
        (nn.Sequential(nn.Flatten(), weight_norm(nn.Linear(4, 3))), None),
        (nn.Sequential(nn.Conv2d(1, 3, 2), nn.Flatten()), None),
    ],
)
def test_the_bias_is_found_by_trying(network: nn.Module, name: str | None) -> None:
    before, images, state = snapshot(network), torch.ones(2, 1, 2, 2), torch.get_rng_state()
    assert find_logit_bias(network, images, call_network) == name
    assert same(snapshot(network), before)
    assert torch.get_rng_state().equal(state)

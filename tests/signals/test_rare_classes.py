from __future__ import annotations

import math

import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn import functional as F

from lightning_mnp.signals.rare_classes import find_rare_classes, missing_logits


def drawn(lacks: list[float], images: int = 500, certainty: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits that are right in the mean but for what each class lacks."""
    generator = torch.Generator().manual_seed(0)
    classes = len(lacks)
    labels = torch.arange(images) % classes
    evidence = torch.randn(images, classes, generator=generator)
    # Two normal distributions, `certainty` apart: the true class's log-likelihood ratio is this.
    evidence += certainty * F.one_hot(labels, classes)
    return certainty * evidence - torch.tensor(lacks), labels


def test_a_lack_is_found_and_measured() -> None:
    logits, labels = drawn([0.0, 0.0, 1.8, 0.0, 0.0])
    found = find_rare_classes(logits, labels)
    assert list(found) == [2]
    values, errors = missing_logits(logits, labels)
    assert found[2] == pytest.approx(float(values[2]))
    assert abs(found[2] - 1.8) < 2.5 * float(errors[2])
    assert float(errors[2]) < 0.5


def test_the_values_are_those_of_the_least_loss() -> None:
    logits, labels = drawn([0.0, 1.0, 0.0, 0.3])
    logits = logits.double()

    def loss_at(logarithm: list[float]) -> float:
        return float(F.cross_entropy(logits / math.exp(logarithm[0]), labels))

    temperature = math.exp(minimize(loss_at, [0.0], tol=1e-12).x[0])

    def loss(shift: list[float]) -> float:
        return float(F.cross_entropy(logits / temperature + torch.tensor(shift).double(), labels))

    best = temperature * minimize(loss, [0.0] * 4, tol=1e-12).x
    expected = [best[k] - (best.sum() - best[k]) / 3 for k in range(4)]
    values, _ = missing_logits(logits, labels)
    assert values.tolist() == pytest.approx(expected, abs=0.02)


def test_the_errors_are_the_spread_over_draws() -> None:
    logits, labels = drawn([0.0, 0.0, 0.0], images=3000)
    parts = [missing_logits(logits[k::20], labels[k::20]) for k in range(20)]
    spread = torch.stack([values for values, _ in parts]).std(0)
    told = torch.stack([errors for _, errors in parts]).mean(0)
    assert bool(((spread / told - 1).abs() < 0.6).all())


def test_even_classes_have_none() -> None:
    for classes in (2, 10, 100):
        assert find_rare_classes(*drawn([0.0] * classes)) == {}


def test_what_chance_explains_is_none() -> None:
    logits, labels = drawn([0.0, 1.5, 0.0])
    assert list(find_rare_classes(logits, labels)) == [1]
    assert find_rare_classes(logits[:12], labels[:12]) == {}


def test_what_is_small_is_none_however_sure() -> None:
    logits, labels = drawn([0.0, 0.4, 0.0], images=30_000)
    values, errors = missing_logits(logits, labels)
    assert float(values[1] / errors[1]) > 4
    assert find_rare_classes(logits, labels) == {}


def test_a_logit_that_is_too_high_is_none() -> None:
    assert find_rare_classes(*drawn([0.0, -3.0, 0.0, 0.0, 0.0])) == {}


def test_classes_without_images_take_no_part() -> None:
    logits, labels = drawn([0.0, 0.0, 1.8, 0.0])
    values, errors = missing_logits(logits[labels != 3], labels[labels != 3])
    assert values[3] == 0.0
    assert math.isinf(float(errors[3]))
    assert list(find_rare_classes(logits[labels != 3], labels[labels != 3])) == [2]
    assert find_rare_classes(logits[labels == 2], labels[labels == 2]) == {}


def test_certain_logits_are_no_trouble() -> None:
    logits, labels = drawn([0.0, 0.0, 0.0])
    right = 1e4 * F.one_hot(labels, 3).float()
    values, errors = missing_logits(right, labels)
    assert bool(torch.isfinite(values).all())
    assert find_rare_classes(right, labels) == {}
    assert find_rare_classes(1e4 * logits, labels) == {}
    assert bool((errors > 0).all())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_tell_nothing(value: float) -> None:
    logits, labels = drawn([0.0, 2.5, 0.0])
    logits[7, 1] = value
    assert find_rare_classes(logits, labels) == {}


def test_the_networks_own_labels_tell_nothing() -> None:
    logits, _ = drawn([0.0, 2.5, 0.0])
    assert find_rare_classes(logits, logits.argmax(1)) == {}

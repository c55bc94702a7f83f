from __future__ import annotations

import pytest
import torch
from helpers import images_and_labels, new_scene

from lightning_mnp.signals.logits import goal_margins
from lightning_mnp.signals.perturbation import UniversalPerturbation, image_scale


def others(target: int) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = images_and_labels()
    return images[labels != target], labels[labels != target]


def test_scale_is_the_mean_distance_from_the_mean() -> None:
    images = images_and_labels()[0]
    mean = sum(images) / len(images)
    expected = sum(float((image - mean).square().sum().sqrt()) for image in images) / len(images)
    assert image_scale(images) == pytest.approx(expected, rel=1e-5)


def test_steps_have_their_length_and_the_limit_holds() -> None:
    masked = new_scene().masked
    images, labels = others(2)
    pushed = UniversalPerturbation(masked, 2, torch.zeros(1, 1, 8, 8), limit=1.0)
    pushed.ascend(images, labels, 0.4)
    assert float(pushed.perturbation.norm()) == pytest.approx(0.4, rel=1e-4)
    for _ in range(5):
        pushed.ascend(images, labels, 0.4)
    assert float(pushed.perturbation.norm()) <= 1.0 + 1e-5


def test_perturbation_learns_the_way_to_its_class() -> None:
    masked = new_scene().masked
    images, labels = others(1)
    pushed = UniversalPerturbation(masked, 1, torch.zeros(1, 1, 8, 8), limit=20.0)

    def margin() -> float:
        goals = torch.ones_like(labels)
        return float(goal_margins(pushed.logits(images), labels, goals).mean())

    def success() -> float:
        return float((pushed.logits(images).argmax(1) == 1).float().mean())

    before = margin(), success()
    for _ in range(15):
        pushed.ascend(images, labels, 1.0)
    assert margin() > before[0]
    assert success() > max(before[1], 0.9)

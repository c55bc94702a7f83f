"""Every metric, and samples for it; a module of its own, for processes to import."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_mnp.metrics import (
    AttackSuccessRate,
    CleanAccuracy,
    DetectionRate,
    DetectionRatio,
    FalsePositiveRate,
    attack_success_rate,
    clean_accuracy,
    detection_rate,
    detection_ratio,
    false_positive_rate,
)

# Not a multiple of two: the processes get different numbers of samples.
COUNT = 41


def samples(name: str) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    if name.startswith("DetectionRatio"):
        magnitude = torch.rand(COUNT, generator=generator)
        noise = [torch.rand(COUNT, generator=generator) for _ in range(3)]
        parts = magnitude, magnitude + noise[0], magnitude + noise[1], noise[2].mul(9).round()
        return parts if name == "DetectionRatio" else (*parts, torch.arange(COUNT) % 3)
    first, second = (torch.randint(2, (COUNT,), generator=generator) for _ in range(2))
    if name in ("DetectionRate", "FalsePositiveRate"):
        return first.bool(), second.bool()
    logits = torch.randn(COUNT, 3, generator=generator)
    return (logits, first, second) if name == "AttackSuccessRate" else (logits, first)


METRICS: dict[str, tuple[type[Metric], Callable[..., Tensor]]] = {
    "AttackSuccessRate": (AttackSuccessRate, attack_success_rate),
    "CleanAccuracy": (CleanAccuracy, clean_accuracy),
    "DetectionRate": (DetectionRate, detection_rate),
    "DetectionRatio": (DetectionRatio, detection_ratio),
    "DetectionRatio within layers": (DetectionRatio, detection_ratio),
    "FalsePositiveRate": (FalsePositiveRate, false_positive_rate),
}


def feed(metric: Metric, parts: tuple[Tensor, ...], size: int) -> None:
    for batch in zip(*(part.split(size) for part in parts), strict=True):
        metric.update(*batch)

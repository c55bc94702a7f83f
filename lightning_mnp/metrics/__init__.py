"""Metrics of attacks, defenses and detectors, built on torchmetrics."""

from lightning_mnp.metrics.detection import DetectionRate, DetectionRatio, FalsePositiveRate
from lightning_mnp.metrics.functional import (
    attack_success_rate,
    clean_accuracy,
    detection_rate,
    detection_ratio,
    false_positive_rate,
    spearman,
)
from lightning_mnp.metrics.success import AttackSuccessRate, CleanAccuracy

__all__ = [
    "AttackSuccessRate",
    "CleanAccuracy",
    "DetectionRate",
    "DetectionRatio",
    "FalsePositiveRate",
    "attack_success_rate",
    "clean_accuracy",
    "detection_rate",
    "detection_ratio",
    "false_positive_rate",
    "spearman",
]

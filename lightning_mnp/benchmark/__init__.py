"""The comparison of defenses: cells, their results, and the report made of these."""

from lightning_mnp.benchmark.loss_changes import LossChanges, loss_changes

__all__ = ["LossChanges", "loss_changes"]

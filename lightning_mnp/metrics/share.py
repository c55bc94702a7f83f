"""The base of metrics that are shares: hits over what counts, summed over batches."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_mnp.metrics.functional import _share

__all__ = ["ShareMetric"]


class ShareMetric(Metric):
    """A share from 0 to 1, summed over batches and processes.

    A subclass sets :attr:`noun` and ``higher_is_better``. Its ``update`` counts a batch and hands
    the two numbers to :meth:`add`.

    Example:
        >>> class Even(ShareMetric):
        ...     noun = "number"
        ...     def update(self, numbers):
        ...         self.add((numbers % 2 == 0).sum(), torch.tensor(len(numbers)))
        >>> metric = Even()
        >>> metric.update(torch.tensor([1, 2, 3, 4]))
        >>> metric.compute()
        tensor(0.5000)
    """

    noun: ClassVar[str]
    """What is counted, for the warning that nothing was."""

    is_differentiable = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def __init__(self) -> None:
        super().__init__()
        # A MetricCollection lets metrics share their states if names and first values are the
        # same. So each class has names of its own.
        name = type(self).__name__
        self._names = (f"{name}_hits", f"{name}_total")
        for state in self._names:
            self.add_state(state, torch.tensor(0), dist_reduce_fx="sum")

    def add(self, hits: Tensor, total: Tensor) -> None:
        """Add the counts of a batch.

        Args:
            hits: How many of those that count are hits, a scalar.
            total: How many count, a scalar.
        """
        for name, count in zip(self._names, (hits, total), strict=True):
            state: Tensor = getattr(self, name)
            setattr(self, name, state + count.to(state.device))

    def compute(self) -> Tensor:
        """Return the share, from 0 to 1; NaN, with a warning, if nothing counts."""
        hits, total = (getattr(self, name) for name in self._names)
        return _share(hits, total, self.noun)

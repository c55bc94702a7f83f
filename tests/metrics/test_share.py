from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchmetrics import MetricCollection

from lightning_mnp.metrics.share import ShareMetric


class Even(ShareMetric):
    noun = "number"
    higher_is_better = None

    def update(self, numbers: Tensor) -> None:
        self.add((numbers % 2 == 0).sum(), torch.tensor(len(numbers)))


class Large(ShareMetric):
    noun = "even number"
    higher_is_better = None

    def update(self, numbers: Tensor) -> None:
        even = numbers[numbers % 2 == 0]
        self.add((even > 2).sum(), torch.tensor(len(even)))


def test_counts_add_up() -> None:
    metric = Even()
    for numbers in ([1, 2, 3], [4], []):
        metric.update(torch.tensor(numbers))
    assert metric.compute() == 0.5
    metric.reset()
    metric.update(torch.tensor([]))
    with pytest.warns(UserWarning, match="Not one number counts, so the share is NaN"):
        share = metric.compute()
    assert share.isnan()


def test_metrics_in_a_collection_count_apart() -> None:
    # After the first batch, both have counted one hit of one.
    both = MetricCollection([Even(), Large()])
    both.update(torch.tensor([4]))
    both.update(torch.tensor([1, 2, 3]))
    assert {name: float(value) for name, value in both.compute().items()} == {
        "Even": 0.5,
        "Large": 0.5,
    }
    both.update(torch.tensor([5]))
    assert {name: round(float(value), 3) for name, value in both.compute().items()} == {
        "Even": 0.4,
        "Large": 0.5,
    }

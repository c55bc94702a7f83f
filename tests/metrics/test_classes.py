from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from metric_cases import COUNT, METRICS, feed, samples
from torchmetrics import MetricCollection

from lightning_mnp.metrics import (
    DetectionRate,
    FalsePositiveRate,
)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("size", [COUNT, 7, 1])
def test_batches_add_up_to_the_function(name: str, size: int) -> None:
    build, function = METRICS[name]
    metric = build()

    feed(metric, samples(name), size)

    assert metric.compute() == function(*samples(name))
    assert 0 < float(metric.compute()) < 1


@pytest.mark.parametrize("name", METRICS)
def test_reset_copy_pickle_and_forward(name: str) -> None:
    build, function = METRICS[name]
    metric = build()
    feed(metric, tuple(part.flip(0)[:20] for part in samples(name)), 20)
    metric.reset()

    assert metric(*samples(name)) == function(*samples(name))
    for other in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert other.compute() == metric.compute()
    assert metric.state_dict() == {}
    assert metric.is_differentiable is False
    assert metric.full_state_update is False


def test_each_metric_tells_which_way_is_better() -> None:
    assert {name: build.higher_is_better for name, (build, _) in METRICS.items()} == {
        "AttackSuccessRate": False,
        "CleanAccuracy": True,
        "DetectionRate": True,
        "DetectionRatio": None,
        "DetectionRatio within layers": None,
        "FalsePositiveRate": False,
    }


def test_a_collection_shares_what_it_can() -> None:
    both = MetricCollection([DetectionRate(), FalsePositiveRate()])
    both.update(["backdoored", "clean"], ["clean", "clean"])
    both.update(["undecided"], ["backdoored"])
    result = both.compute()
    assert float(result["DetectionRate"]) == pytest.approx(1 / 3)
    assert float(result["FalsePositiveRate"]) == 0.5


@pytest.mark.parametrize(
    ("name", "parts", "message"),
    [
        ("AttackSuccessRate", [torch.zeros(2), torch.zeros(2), torch.zeros(2)], "`targets`"),
        ("CleanAccuracy", [torch.zeros(2), torch.zeros(2)], "`labels`"),
        ("DetectionRate", [["no"], ["clean"]], "`verdicts`"),
        ("FalsePositiveRate", [["clean"], ["no"]], "`truths`"),
        ("DetectionRatio", [torch.ones(2)] * 3 + [torch.ones(3)], "`suppressed_saliency`"),
        ("DetectionRatio", [torch.ones(2)] * 2 + [torch.ones(3)] * 2, "`suppressed_magnitude`"),
        ("DetectionRatio", [torch.ones(2), torch.ones(2, 1)] * 2, "`saliency`"),
        ("DetectionRatio", [torch.tensor([torch.nan])] * 4, "`magnitude` to be finite"),
        (
            "DetectionRatio",
            [torch.ones(2)] * 4 + [torch.ones(2).long()],
            "in none, but got some after calls without them. Call `reset`",
        ),
        ("DetectionRatio within layers", [torch.ones(2)] * 4, "got none after calls with them"),
        (
            "DetectionRatio within layers",
            [torch.ones(2)] * 4 + [torch.ones(3).long()],
            r"`layers` to have the shape \(2,\), one number for each filter, but got \(3,\)",
        ),
        ("DetectionRatio within layers", [torch.ones(2)] * 5, "`layers` to be integers"),
    ],
)
def test_bad_input_changes_nothing(name: str, parts: list[Any], message: str) -> None:
    build, function = METRICS[name]
    metric = build()
    metric.update(*samples(name))
    with pytest.raises(ValueError, match=message):
        metric.update(*parts)
    assert metric.compute() == function(*samples(name))

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch import multiprocessing as mp
from torchmetrics import Metric, MetricCollection

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


def data(name: str) -> tuple[Tensor, ...]:
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


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("size", [COUNT, 7, 1])
def test_batches_add_up_to_the_function(name: str, size: int) -> None:
    build, function = METRICS[name]
    metric = build()

    feed(metric, data(name), size)

    assert metric.compute() == function(*data(name))
    assert 0 < float(metric.compute()) < 1


@pytest.mark.parametrize("name", METRICS)
def test_reset_copy_pickle_and_forward(name: str) -> None:
    build, function = METRICS[name]
    metric = build()
    feed(metric, tuple(part.flip(0)[:20] for part in data(name)), 20)
    metric.reset()

    assert metric(*data(name)) == function(*data(name))
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
    metric.update(*data(name))
    with pytest.raises(ValueError, match=message):
        metric.update(*parts)
    assert metric.compute() == function(*data(name))


def run_rank(rank: int, folder: str) -> None:
    """Feed every metric with this process's share of the samples and keep what it computes."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    results = {}
    for name, (build, _) in METRICS.items():
        metric = build()
        feed(metric, tuple(part[rank::2] for part in data(name)), 4)
        results[name] = float(metric.compute())
    dist.destroy_process_group()
    torch.save(results, Path(folder) / f"{rank}.pt")


@pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not built in")
def test_two_processes_equal_one(tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    processes = [context.Process(target=run_rank, args=(rank, str(tmp_path))) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0]

    for rank in (0, 1):
        results = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, (_, function) in METRICS.items():
            assert results[name] == pytest.approx(float(function(*data(name)))), name

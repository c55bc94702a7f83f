"""One process that is told what others would answer; tests/test_distributed.py starts several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    SubsetRandomSampler,
    TensorDataset,
)

from lightning_mnp.hosting import processes
from lightning_mnp.hosting.processes import (
    do_in_first,
    gather_objects,
    process_count,
    process_rank,
    read_together,
    whole_loader,
)

DATA = TensorDataset(torch.arange(40.0).reshape(40, 1))
BATCHES = [torch.zeros(2, 1, 8, 8)], [torch.tensor([0, 1])]


def pretend(monkeypatch: pytest.MonkeyPatch, rank: int, gather: Callable[[Any], list[Any]]) -> None:
    """Let this be one process of several, whose values `gather` knows."""
    monkeypatch.setattr(processes, "process_rank", lambda: rank)
    monkeypatch.setattr(processes, "gather_objects", gather)


def test_without_a_group_there_is_one_process() -> None:
    assert (process_count(), process_rank()) == (1, 0)
    value = object()
    assert gather_objects(value)[0] is value


def test_the_group_counts_and_gathers(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(values: list[Any], value: Any) -> None:
        values[:] = ["from the first", value, "from the last"]

    monkeypatch.setattr(processes.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(processes.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(processes.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(processes.dist, "all_gather_object", fill)
    assert (process_count(), process_rank()) == (3, 1)
    assert gather_objects("from this one") == ["from the first", "from this one", "from the last"]


def _fail() -> None:
    raise OSError("no space")


def test_work_is_done_in_the_first_process(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    for rank in (0, 1):
        pretend(monkeypatch, rank, lambda value: [None, value])
        do_in_first(lambda rank=rank: done.append(rank))
    assert done == [0]


def test_a_failure_of_the_first_process_is_raised_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="no space"):
        do_in_first(_fail)
    pretend(monkeypatch, 1, lambda value: ["OSError: no space", value])
    with pytest.raises(RuntimeError, match="Process 0 of 2 failed: OSError: no space"):
        do_in_first(_fail)


def test_the_same_batches_are_kept_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def gather(value: Any) -> list[Any]:
        asked.append(value)
        return [value, value]

    pretend(monkeypatch, 1, gather)
    assert read_together(lambda: BATCHES) is BATCHES
    assert len(asked) == 2  # errors and digests: no image was sent
    assert all(not isinstance(value, tuple) for value in asked)


@pytest.mark.parametrize(
    "other",
    [
        ([torch.ones(2, 1, 8, 8)], [torch.tensor([0, 1])]),
        ([torch.zeros(2, 1, 8, 8)], [torch.tensor([1, 1])]),
        ([torch.zeros(2, 1, 8, 8).double()], [torch.tensor([0, 1])]),
        ([torch.zeros(2, 1, 4, 16)], [torch.tensor([0, 1])]),
        ([], []),
    ],
    ids=["pixels", "labels", "type", "shape", "nothing"],
)
def test_other_batches_are_put_together_in_the_order_of_the_processes(
    other: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = processes._digest(other)

    def gather(value: Any) -> list[Any]:
        if value is None:
            return [None, None]
        return [other, value] if isinstance(value, tuple) else [digest, value]

    pretend(monkeypatch, 1, gather)
    images, labels = read_together(lambda: BATCHES)
    for found, others, own in zip((images, labels), other, BATCHES, strict=True):
        assert all(a is b for a, b in zip(found, [*others, *own], strict=True))


def test_a_failure_in_reading_is_raised_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 0, lambda value: [value, None, "KeyError: 'x'"])
    with pytest.raises(RuntimeError, match="Process 2 of 3 could not read its part of the defense"):
        read_together(lambda: BATCHES)

    def read() -> Any:
        raise OSError("no such disk")

    with pytest.raises(OSError, match="no such disk"):
        read_together(read)


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(DATA, **{"batch_size": 10, **options})


def test_a_whole_loader_has_the_images_of_all_processes_in_order() -> None:
    sampler = DistributedSampler(DATA, num_replicas=4, rank=1)
    collated: list[int] = []

    def collate(items: list[Any]) -> Any:
        collated.append(len(items))
        return torch.utils.data.default_collate(items)

    whole: Any = whole_loader(loader(sampler=sampler, collate_fn=collate))
    assert torch.equal(torch.cat([batch[0] for batch in whole]), DATA.tensors[0])
    assert collated == [10] * 4


def test_a_sampler_of_batches_is_looked_into() -> None:
    plain = DistributedSampler(DATA, num_replicas=4, rank=1)
    sharded: Any = DataLoader(DATA, batch_sampler=BatchSampler(plain, 20, drop_last=True))
    assert len(whole_loader(sharded)) == 2  # type: ignore[arg-type]


class Own(DistributedSampler):  # type: ignore[type-arg]
    """A sampler of the user's own."""


@pytest.mark.parametrize(
    "sampler",
    [None, Own(DATA, num_replicas=4, rank=1), SubsetRandomSampler([0, 1])],
    ids=["none", "own", "subset"],
)
def test_other_loaders_stay(sampler: Any) -> None:
    given = loader(sampler=sampler)
    assert whole_loader(given) is given


def test_what_is_no_data_loader_stays() -> None:
    batches = [(torch.zeros(1), torch.zeros(1))]
    assert whole_loader(batches) is batches

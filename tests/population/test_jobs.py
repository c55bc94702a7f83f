from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from benchmarks.population import jobs as jobs_module
from benchmarks.population.jobs import Job, run_jobs


class Here:
    """A pool that does its work at once, in this process."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *arguments: Any) -> None:
        pass

    def submit(self, work: Any, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(work(*arguments))
        except ValueError as error:
            future.set_exception(error)
        return future


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Let work take time by this clock only."""
    now = [0.0]
    monkeypatch.setattr(jobs_module, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(jobs_module.time, "monotonic", lambda: now[0])
    return iter([now]).__next__()


def make(clock: list[float], seconds: list[float], estimate: float = 10.0) -> list[Job]:
    def work(spent: float) -> float:
        if spent < 0:
            raise ValueError("broken")
        clock[0] += spent
        return spent

    return [Job(f"job {place}", estimate, work, (s,)) for place, s in enumerate(seconds)]


def test_all_are_done_and_errors_are_told(clock: list[float]) -> None:
    found = list(run_jobs(make(clock, [1.0, -1.0, 2.0])))
    assert [job.name for job, _ in found] == ["job 0", "job 1", "job 2"]
    assert [found[0][1], found[2][1]] == [1.0, 2.0]
    assert isinstance(found[1][1], ValueError)


@pytest.mark.parametrize(
    ("taken", "budget", "count"),
    [
        (10.0, 35.0, 3),  # the fourth would end after 40 s
        (20.0, 45.0, 2),  # they take twice as long as estimated
        (5.0, 9.0, 0),
        (10.0, None, 5),
    ],
)
def test_what_does_not_fit_is_not_begun(
    clock: list[float], taken: float, budget: float | None, count: int
) -> None:
    # What one process does is known before the next begins.
    assert len(list(run_jobs(make(clock, [taken] * 5), 1, budget))) == count


def test_there_must_be_a_process() -> None:
    with pytest.raises(ValueError, match="`processes` to be at least 1, but got 0"):
        list(run_jobs([], 0))


class Gone:
    """A process that has ended."""

    def join(self) -> None:
        pass


def test_a_process_ends_with_the_one_that_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(jobs_module.multiprocessing, "parent_process", Gone)
    monkeypatch.setattr(jobs_module.os, "_exit", codes.append)
    jobs_module._follow()
    assert codes == [1]


@pytest.mark.slow  # a process has to import torch
def test_another_process_does_the_work() -> None:
    [(_, other), (_, threads)] = run_jobs(
        [Job("process", 0.0, os.getpid, ()), Job("threads", 0.0, torch.get_num_threads, ())]
    )
    assert other != os.getpid()
    assert threads == 1

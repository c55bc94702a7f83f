"""Work in several processes of one thread each, within a budget of time."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.attacks import ENVIRONMENT

__all__ = ["Job", "run_jobs"]


@dataclass(frozen=True)
class Job:
    """One piece of work.

    Attributes:
        name: What to call it in messages.
        seconds: How long it is thought to take.
        work: A function that another process can import.
        arguments: What it is called with.
    """

    name: str
    seconds: float
    work: Callable[..., Any]
    arguments: tuple[Any, ...]


def run_jobs(
    jobs: Sequence[Job], processes: int = 1, budget: float | None = None
) -> Iterator[tuple[Job, Any]]:
    """Do jobs in their order; yield each with its result, or with the error that ended it.

    Args:
        jobs: The work.
        processes: How many at a time, at least 1.
        budget: Seconds in all, None for no limit. A job that would not end in time is not begun,
            nor are those after it. The estimates are corrected by how long finished jobs took.

    Raises:
        ValueError: If ``processes`` is less than 1.
    """
    if processes < 1:
        raise ValueError(f"Expected argument `processes` to be at least 1, but got {processes}.")
    os.environ.update(ENVIRONMENT)  # processes that are started get it
    started = time.monotonic()
    begun: dict[Future[Any], tuple[Job, float]] = {}
    waiting, estimated, spent = list(jobs), 0.0, 0.0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _prepare) as pool:
        while waiting or begun:
            while waiting and len(begun) < processes:
                now = time.monotonic()
                pace = max(spent / estimated, 1.0) if estimated else 1.0
                if budget is not None and now - started + pace * waiting[0].seconds > budget:
                    waiting.clear()
                    break
                job = waiting.pop(0)
                begun[pool.submit(job.work, *job.arguments)] = job, now
            for future in wait(begun, return_when=FIRST_COMPLETED).done:
                job, then = begun.pop(future)
                estimated += job.seconds
                spent += time.monotonic() - then
                error = future.exception()
                yield job, future.result() if error is None else error


def _prepare() -> None:
    """Prepare a process: one thread, and an end with the process that started it."""
    torch.set_num_threads(1)
    threading.Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # it was killed: nobody waits for the result

"""Jobs that depend on each other, done by an executor within a budget of time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from lightning_mnp.benchmark.executors import Executor

__all__ = ["Job", "run_jobs"]


@dataclass(frozen=True)
class Job:
    """One piece of work.

    Attributes:
        name: What to call it in messages; no other job has this name.
        seconds: How long it is thought to take; 0 if nobody knows.
        work: A function that another process can import.
        arguments: What it is called with.
        kind: Jobs of the same kind take about the same time. The part before a slash is a wider
            kind, for the first job of its kind. "" for none.
        needs: Names of jobs that have to be done before, if they are among the jobs.
        failed: Tells whether a result is that of a failure, if a failure need not be an error. How
            long a failure took says nothing about other jobs.
    """

    name: str
    seconds: float
    work: Callable[..., Any]
    arguments: tuple[Any, ...]
    kind: str = ""
    needs: tuple[str, ...] = ()
    failed: Callable[[Any], bool] = lambda result: False


class _Clock:
    """Learns from finished jobs how long others will take."""

    def __init__(self) -> None:
        self.longest: dict[str, float] = {}
        self.estimated = self.spent = 0.0

    def note(self, job: Job, seconds: float) -> None:
        if job.seconds:  # others say nothing about how good estimates are
            self.estimated += job.seconds
            self.spent += seconds
        for kind in filter(None, {job.kind, job.kind.partition("/")[0]}):
            self.longest[kind] = max(self.longest.get(kind, 0.0), seconds)

    def expected(self, job: Job) -> float:
        if job.kind in self.longest:
            return self.longest[job.kind]
        if job.seconds:
            pace = max(self.spent / self.estimated, 1.0) if self.estimated else 1.0
            return pace * job.seconds
        return self.longest.get(job.kind.partition("/")[0], 0.0)


def run_jobs(
    jobs: Sequence[Job], executor: Executor, budget: float | None = None
) -> Iterator[tuple[Job, Any]]:
    """Do jobs in their order; yield each with its result, or with the error that ended it.

    A job that needs another one waits for it. If that one fails, its error is that of the job,
    too, without being begun. If a process is killed, all jobs that have begun are lost: each of
    them is done again, with nothing beside it.

    Args:
        jobs: The work.
        executor: Does it.
        budget: Seconds in all, None for no limit. A job that would not end in time is not begun.
            How long it takes is learned from the jobs before it.

    Example:
        >>> from lightning_mnp.benchmark.executors import HereExecutor
        >>> jobs = [Job("four", 0.0, abs, (-4,)), Job("five", 0.0, abs, (-5,), needs=("four",))]
        >>> [result for _, result in run_jobs(jobs, HereExecutor())]
        [4, 5]
    """
    started, clock = time.monotonic(), _Clock()
    begun: dict[Future[Any], tuple[Job, float]] = {}
    waiting, unfinished = list(jobs), {job.name for job in jobs}
    errors: dict[str, BaseException] = {}
    lost: set[str] = set()  # begun when a process was killed; one of them may be what killed it
    while waiting or begun:
        while len(begun) < executor.slots and not lost & {job.name for job, _ in begun.values()}:
            now = time.monotonic()
            left = math.inf if budget is None else budget - (now - started)
            # What is thought to take too long may turn out to be quicker, so it is asked each time.
            fitting = (each for each in waiting if clock.expected(each) <= left)
            job = next((each for each in fitting if not unfinished & set(each.needs)), None)
            if job is None or (job.name in lost and begun):
                break
            waiting.remove(job)
            broken = next((errors[name] for name in job.needs if name in errors), None)
            if broken is not None:
                errors[job.name] = broken
                unfinished.discard(job.name)
                yield job, broken
                continue
            begun[executor.submit(job.work, *job.arguments)] = job, now
        if not begun:
            break
        for future in wait(begun, return_when=FIRST_COMPLETED).done:
            job, then = begun.pop(future)
            error = future.exception()
            if isinstance(error, BrokenProcessPool):
                if job.name not in lost:
                    lost.add(job.name)
                    waiting.insert(0, job)
                    continue
                error = _killed(job, error)
            unfinished.discard(job.name)
            if error is not None:
                errors[job.name] = error
                yield job, error
                continue
            result = future.result()
            if not job.failed(result):
                clock.note(job, time.monotonic() - then)
            yield job, result


def _killed(job: Job, error: BrokenProcessPool) -> BrokenProcessPool:
    told = BrokenProcessPool(
        f"The process of {job.name} was killed twice, the second time with nothing beside it. The "
        "usual reason is a want of memory: free some, or lower `--jobs`, since processes that wait "
        "hold memory, too."
    )
    told.__cause__ = error
    return told

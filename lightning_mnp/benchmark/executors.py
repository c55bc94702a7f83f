"""Where jobs are done: in this process, in other processes of this machine, or on a Ray cluster."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing.synchronize import Event
from typing import Any, Literal, Protocol

import torch

__all__ = ["ENVIRONMENT", "Executor", "ExecutorName", "HereExecutor", "Processes", "open_executor"]

ExecutorName = Literal["processes", "ray"]

# For processes: one core each. Memory that tensors leave is kept for the next ones: to give it
# back to the system each time, as glibc does by default, costs a thin network's training up to a
# fifth of its time.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
}


class Executor(Protocol):
    """Does work, several pieces at a time.

    Attributes:
        slots: Most pieces at a time.
    """

    slots: int

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Begin a piece of work; its result, or its error, is in the future."""
        ...


class HereExecutor:
    """Does each piece of work at once, in this process.

    Example:
        >>> HereExecutor().submit(max, 3, 5).result()
        5
    """

    slots = 1

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Do a piece of work; an interrupt ends it, and passes."""
        future: Future[Any] = Future()
        try:
            future.set_result(work(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


class Processes:
    """Does work in several processes of one thread each; they end with this one.

    They get :data:`ENVIRONMENT`, for which it stands in this process until :meth:`close`.

    Args:
        count: Number of processes.
    """

    def __init__(self, count: int) -> None:
        self.slots = count
        self._context = multiprocessing.get_context("spawn")
        self._stopped = self._context.Event()
        self._pool = self._open()
        self._before = {name: os.environ.get(name) for name in ENVIRONMENT}
        os.environ.update(ENVIRONMENT)  # a process is started when there is work for it

    def _open(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self.slots, self._context, _prepare, (self._stopped,))

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Begin a piece of work in a process that is free."""
        try:
            return self._pool.submit(work, *arguments)
        except BrokenProcessPool:  # a process was killed, for want of memory, say
            self._pool.shutdown(wait=False)
            self._pool = self._open()
            return self._pool.submit(work, *arguments)

    def stop(self) -> None:
        """End the processes at once; what they have begun is lost."""
        self._stopped.set()

    def close(self) -> None:
        """End the processes, after the work that they have begun; put the environment back."""
        try:
            self._pool.shutdown(cancel_futures=True)
        finally:
            for name, value in self._before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


class _Ray:
    """Does work on a Ray cluster; one GPU for each piece if the cluster has any."""

    def __init__(self, count: int | None, address: str | None) -> None:
        try:
            import ray
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "The executor 'ray' needs Ray, which is not installed. Install it with "
                '`pip install "lightning-mnp[ray]"`.'
            ) from error
        local = {"num_cpus": count or os.cpu_count()} if address is None else {}
        ray.init(address=address, include_dashboard=False, log_to_driver=False, **local)
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        self.slots = count or gpus or max(int(resources.get("CPU", 1)), 1)
        self._ray = ray
        self._remote = ray.remote(_call).options(num_cpus=1, num_gpus=1 if gpus else 0)

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = self._remote.remote(work, arguments).future()
        return future

    def stop(self) -> None:
        """Nothing: closing ends what has begun."""

    def close(self) -> None:
        self._ray.shutdown()


def _call(work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return work(*arguments)


@contextmanager
def open_executor(
    name: ExecutorName = "processes",
    jobs: int | None = 1,
    address: str | None = None,
    apart: bool = False,
) -> Iterator[Executor]:
    """Make an executor, and close it at the end of the context.

    If the context ends by an error or an interrupt, work that has begun is not waited for.

    Args:
        name: ``"processes"`` of this machine, or ``"ray"``.
        jobs: Most pieces of work at a time. None is for Ray only: as many as the cluster has GPUs
            or, without any, cores.
        address: Address of a Ray cluster; None starts one on this machine.
        apart: Whether a single process is another one, too, and not this one.

    Raises:
        ValueError: If an argument is out of range.
        ModuleNotFoundError: If Ray is asked for and not installed.

    Example:
        >>> with open_executor() as executor:
        ...     executor.submit(len, "four").result()
        4
    """
    if jobs is not None and jobs < 1:
        raise ValueError(f"Expected argument `jobs` to be at least 1, but got {jobs}.")
    if name != "ray" and address is not None:
        raise ValueError(
            f"Expected argument `address` for the executor 'ray' only, but got {address!r} for "
            f"{name!r}. Leave it out, or set `executor` to 'ray'."
        )
    if name != "ray" and jobs in (None, 1) and not apart:
        yield HereExecutor()
        return
    executor = _Ray(jobs, address) if name == "ray" else Processes(jobs or 1)
    try:
        yield executor
    except BaseException:
        executor.stop()
        raise
    finally:
        executor.close()


def _prepare(stopped: Event) -> None:
    """Prepare a process: one thread, and an end with the process that started it, or before."""
    torch.set_num_threads(1)
    for follow in (_follow, partial(_obey, stopped)):
        threading.Thread(target=follow, daemon=True).start()


def _obey(stopped: Event) -> None:
    stopped.wait()
    os._exit(1)  # an interrupt: nobody waits for the result


def _follow() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # it was killed: nobody waits for the result

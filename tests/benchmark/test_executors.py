from __future__ import annotations

import os
import sys
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pytest
import torch

from lightning_mnp.benchmark import executors
from lightning_mnp.benchmark.executors import HereExecutor, Processes, open_executor


def test_work_here_is_done_at_once() -> None:
    assert HereExecutor().submit(os.getpid).result() == os.getpid()


def test_an_error_is_in_the_future_and_an_interrupt_passes() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    assert isinstance(HereExecutor().submit(int, "x").exception(), ValueError)
    with pytest.raises(KeyboardInterrupt):
        HereExecutor().submit(interrupted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jobs": 0}, "`jobs` to be at least 1, but got 0"),
        ({"address": "10.0.0.1:6379"}, "`address` for the executor 'ray' only, but got '10.0.0.1"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message), open_executor(**options):
        pass


def test_ray_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    missing = pytest.raises(ModuleNotFoundError, match=r'pip install "lightning-mnp\[ray\]"')
    with missing, open_executor("ray"):
        pass


class Pool:
    """A pool whose first process has been killed."""

    made = 0

    def __init__(self, *arguments: Any) -> None:
        Pool.made += 1
        self.broken = Pool.made == 1

    def submit(self, work: Any, *arguments: Any) -> Future[Any]:
        if self.broken:
            raise BrokenProcessPool
        return HereExecutor().submit(work, *arguments)

    def shutdown(self, **options: Any) -> None:
        self.broken = True


def test_a_killed_process_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(executors, "ENVIRONMENT", {})
    with open_executor(jobs=2) as executor:
        assert executor.slots == 2
        assert executor.submit(len, "four").result() == 4


def test_the_environment_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(Pool, "made", 1)
    monkeypatch.setattr(executors, "ENVIRONMENT", {"MNP_A": "1", "MNP_B": "2"})
    monkeypatch.setenv("MNP_A", "8")
    before = dict(os.environ)
    with open_executor(jobs=2):
        assert (os.environ["MNP_A"], os.environ["MNP_B"]) == ("1", "2")
    assert dict(os.environ) == before

    def broken(self: Pool, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Pool, "shutdown", broken)
    with pytest.raises(KeyboardInterrupt):
        Processes(2).close()
    assert dict(os.environ) == before


class Gone:
    """A process that has ended."""

    def join(self) -> None:
        pass


def test_a_process_ends_with_the_one_that_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(executors.multiprocessing, "parent_process", Gone)
    monkeypatch.setattr(executors.os, "_exit", codes.append)
    executors._follow()
    assert codes == [1]


class Set:
    """An event that is set."""

    def wait(self) -> None:
        pass


def test_a_process_ends_when_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(executors.os, "_exit", codes.append)
    executors._obey(Set())  # type: ignore[arg-type]
    assert codes == [1]


@pytest.mark.parametrize("interrupted", [True, False])
def test_work_that_has_begun_is_not_waited_for_after_an_interrupt(
    interrupted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executors, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(executors, "ENVIRONMENT", {})
    called: list[str] = []
    monkeypatch.setattr(Processes, "stop", lambda self: called.append("stop"))
    monkeypatch.setattr(Processes, "close", lambda self: called.append("close"))
    try:
        with open_executor(jobs=2):
            if interrupted:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert called == (["stop", "close"] if interrupted else ["close"])


@pytest.mark.slow  # a process has to import torch
def test_another_process_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors.os, "environ", dict(os.environ))
    executor = Processes(1)
    try:
        assert executor.submit(os.getpid).result() != os.getpid()
        assert executor.submit(torch.get_num_threads).result() == 1
        endless = executor.submit(time.sleep, 3600)
        while not endless.running():
            time.sleep(0.01)
        executor.stop()
        assert isinstance(endless.exception(timeout=60), BrokenProcessPool)
    finally:
        executor.close()

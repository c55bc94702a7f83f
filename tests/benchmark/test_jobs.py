from __future__ import annotations

from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_mnp.benchmark import jobs as jobs_module
from lightning_mnp.benchmark.executors import HereExecutor
from lightning_mnp.benchmark.jobs import Job, run_jobs


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let work take time by this clock only."""
    now = [0.0]
    monkeypatch.setattr(jobs_module.time, "monotonic", lambda: now[0])
    return now


def make(clock: list[float], seconds: list[float], estimate: float = 10.0) -> list[Job]:
    def work(spent: float) -> float:
        if spent < 0:
            raise ValueError("broken")
        clock[0] += spent
        return spent

    return [Job(f"job {place}", estimate, work, (s,)) for place, s in enumerate(seconds)]


def names(jobs: list[Job], budget: float | None = None) -> list[str]:
    return [job.name for job, _ in run_jobs(jobs, HereExecutor(), budget)]


def test_all_are_done_and_errors_are_told(clock: list[float]) -> None:
    found = list(run_jobs(make(clock, [1.0, -1.0, 2.0]), HereExecutor()))
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
    assert len(names(make(clock, [taken] * 5), budget)) == count


def of_kind(clock: list[float], kind: str, seconds: float, place: int, **more: Any) -> Job:
    def work() -> None:
        clock[0] += seconds

    return Job(f"{kind} {place}", 0.0, work, (), kind, **more)


def test_time_is_learned_from_jobs_of_the_same_kind(clock: list[float]) -> None:
    jobs = [
        of_kind(clock, kind, s, n) for n in range(3) for kind, s in (("x/a", 40.0), ("y/b", 1.0))
    ]
    # After x/a 0 and y/b 0, another x/a would end after 81 s, but the others of y/b fit.
    assert names(jobs, budget=80.0) == ["x/a 0", "y/b 0", "y/b 1", "y/b 2"]


def test_the_first_of_its_kind_is_expected_to_take_as_long_as_its_wider_kind(
    clock: list[float],
) -> None:
    jobs = [of_kind(clock, f"x/{letter}", 30.0, 0) for letter in "abc"]
    assert names(jobs, budget=70.0) == ["x/a 0", "x/b 0"]


def test_a_job_without_an_estimate_says_nothing_about_the_estimates(clock: list[float]) -> None:
    [unknown] = make(clock, [2.0], estimate=0.0)
    [known] = make(clock, [0.1], estimate=0.1)
    jobs = [replace(unknown, name="unknown"), replace(known, name="known")]
    jobs += make(clock, [0.5], estimate=0.5)
    assert names(jobs, budget=8.0) == ["unknown", "known", "job 0"]


def test_what_did_not_seem_to_fit_is_begun_if_others_were_quicker(clock: list[float]) -> None:
    estimates, seconds = {"slow": 1.0, "long": 10.0, "usual": 8.0}, [5.0, 10.0, 8.0]
    jobs = [
        replace(job, name=name, seconds=estimates[name])
        for name, job in zip(estimates, make(clock, seconds), strict=True)
    ]
    # After "slow", five times as long as estimated, "long" is thought to take 50 s of 45.
    assert names(jobs, budget=50.0) == ["slow", "usual", "long"]


def test_a_job_waits_for_what_it_needs(clock: list[float]) -> None:
    first, second = make(clock, [1.0, 1.0])
    waiting = Job("waiting", 0.0, len, ("abc",), needs=("job 1", "not among them"))
    assert names([waiting, first, second]) == ["job 0", "job 1", "waiting"]


def test_what_needs_a_failed_job_fails_as_it_did(clock: list[float]) -> None:
    [broken] = make(clock, [-1.0])
    one = Job("one", 0.0, len, ("abc",), needs=("job 0",))
    two = Job("two", 0.0, len, ("abc",), needs=("one",))
    found = {job.name: result for job, result in run_jobs([one, two, broken], HereExecutor())}
    assert {str(each) for each in found.values()} == {"broken"}
    assert set(found) == {"job 0", "one", "two"}


def test_what_needs_a_job_that_does_not_fit_is_not_begun(clock: list[float]) -> None:
    jobs = [Job("long", 100.0, len, ("a",)), Job("short", 1.0, len, ("a",), needs=("long",))]
    assert names(jobs, budget=50.0) == []


def test_how_long_a_failure_took_is_not_learned(clock: list[float]) -> None:
    def work(spent: float) -> str:
        clock[0] += spent
        if spent == 1.0:
            raise ValueError("broken")
        return "failed" if spent == 2.0 else "done"

    jobs = [
        Job(f"job {spent}", 600.0, work, (spent,), "x/a", failed=lambda each: each == "failed")
        for spent in (1.0, 2.0, 600.0)
    ]
    assert names(jobs, budget=601.0) == ["job 1.0", "job 2.0"]
    assert names(jobs, budget=700.0) == ["job 1.0", "job 2.0", "job 600.0"]


class Pool:
    """Two processes that do their work when they are waited for; one may be killed."""

    slots = 2

    def __init__(self) -> None:
        self.begun: list[tuple[Future[Any], Any, tuple[Any, ...]]] = []
        self.rounds: list[list[str]] = []

    def submit(self, work: Any, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.begun.append((future, work, arguments))
        return future

    def wait(self, futures: Any, **options: Any) -> Any:
        begun, self.begun = self.begun, []
        self.rounds.append([arguments[0] for _, _, arguments in begun])
        broken = any(work is killing for _, work, _ in begun)
        for future, work, arguments in begun:
            if broken:
                future.set_exception(BrokenProcessPool())
            else:
                future.set_result(work(*arguments))
        return SimpleNamespace(done=[future for future, _, _ in begun])


def killing(name: str) -> None:
    """Stands for work that needs more memory than there is."""


def test_a_killed_process_costs_only_the_job_that_needs_too_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = Pool()
    monkeypatch.setattr(jobs_module, "wait", pool.wait)
    jobs = [
        Job("innocent", 0.0, str.upper, ("innocent",)),
        Job("killing", 0.0, killing, ("killing",)),
        *(Job(name, 0.0, str.upper, (name,), needs=("innocent",)) for name in ("next", "last")),
    ]
    found = {job.name: result for job, result in run_jobs(jobs, pool)}
    assert pool.rounds[0] == ["innocent", "killing"]
    assert sorted(pool.rounds[1:3]) == [["innocent"], ["killing"]]  # with nothing beside them
    assert pool.rounds[3:] == [["next", "last"]]
    error = found.pop("killing")
    assert isinstance(error, BrokenProcessPool)
    assert "killing was killed twice" in str(error)
    assert "memory" in str(error)
    assert "`--jobs`" in str(error)
    assert found == {name: name.upper() for name in ("innocent", "next", "last")}

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from lightning_mnp.benchmark import lock as module
from lightning_mnp.benchmark.lock import exclusive

fcntl = pytest.importorskip("fcntl", reason="Windows has other locks")


def test_who_comes_second_waits_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, paused = tmp_path / "lock", []
    with path.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)

        def pause(seconds: float) -> None:
            paused.append(seconds)
            if len(paused) == 2:
                other.close()  # as the end of a process does, even if it is killed

        monkeypatch.setattr(module.time, "sleep", pause)
        with (
            pytest.warns(UserWarning, match=r"Another process holds .*lock for the training: this"),
            exclusive(path, "the training"),
        ):
            assert len(paused) == 2


def test_the_file_of_a_lock_that_ended_blocks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.time, "sleep", None)  # would fail
    for _ in range(2):
        with exclusive(tmp_path / "lock", "the training"):
            assert (tmp_path / "lock").exists()


@pytest.mark.parametrize("has_module", [True, False])
def test_a_place_without_locks_is_no_obstacle(
    has_module: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if has_module:
        monkeypatch.setattr(module.fcntl, "flock", refuse)
    else:
        monkeypatch.setattr(module, "fcntl", None)
    entered = False
    with exclusive(tmp_path / "lock", "the training"):
        entered = True
    assert entered

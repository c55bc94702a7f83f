from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from checkpoint_files import no_more_than

from lightning_mnp.checkpoints import atomic_write as module
from lightning_mnp.checkpoints.atomic_write import (
    OutputError,
    check_new,
    check_writable,
    write_atomically,
)


def write_text(partial: Path) -> None:
    partial.write_text("new" * 1000)


def test_new_name(tmp_path: Path) -> None:
    check_new(tmp_path / "free", "report")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match=r"`report` not to exist, but .*link does\. Nothing is"):
        check_new(tmp_path / "link", "report")


def test_writable_place(tmp_path: Path) -> None:
    check_writable(tmp_path / "not" / "yet" / "report.json", "report")
    assert list(tmp_path.iterdir()) == []


def test_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"`report` to be a file, but .* is a folder"):
        check_writable(tmp_path, "report")


def test_place_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"`report` to be where files can be written.*Not a dir"):
        check_writable(tmp_path / "file" / "report.json", "report")


def test_place_on_a_drive_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "exists", lambda self: False)
    with pytest.raises(OutputError, match=r"`report` to be where .*: no folder of it exists, not"):
        check_writable(tmp_path / "report.json", "report")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder nobody can write to")
def test_unwritable_folder() -> None:
    with pytest.raises(OutputError, match="`state_file` to be where files can be written"):
        check_writable(Path("/proc/self/state.pt"), "state_file")


def test_full_disk_is_told_before_the_work(tmp_path: Path) -> None:
    with (
        no_more_than(100),
        pytest.raises(OutputError, match=r"`output` to be where.*File too large"),
    ):
        check_writable(tmp_path / "out.pt", "output")
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10, 9, 5000))
    with pytest.raises(OutputError, match=r"space for 6,000 bytes, but 5,000 are free"):
        check_writable(tmp_path / "out.pt", "output", 6000)


@pytest.mark.parametrize("replace", [False, True])
def test_written_whole(tmp_path: Path, replace: bool) -> None:
    path = tmp_path / "file"
    if replace:
        path.write_text("old")
    write_atomically(path, write_text, argument="path", replace=replace)
    assert path.read_text() == "new" * 1000
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("replace", [False, True])
def test_full_disk_leaves_what_was_there(tmp_path: Path, replace: bool) -> None:
    path = tmp_path / "file"
    if replace:
        path.write_text("old")
    with (
        no_more_than(1000),
        pytest.raises(OutputError, match=r"Argument `report`: .*File too large\. There is no"),
    ):
        write_atomically(path, write_text, argument="report", replace=replace)
    assert [each.read_text() for each in tmp_path.iterdir()] == ["old"] * replace


def test_full_disk_under_torch(tmp_path: Path) -> None:
    """PyTorch's own writer neither brings the process down nor leaves anything."""
    with no_more_than(10_000), pytest.raises(OutputError, match="could not be written"):
        write_atomically(
            tmp_path / "file.pt",
            lambda partial: torch.save({"weight": torch.ones(100_000)}, partial),
            argument="state_file",
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("replace", [False, True])
def test_a_link_in_the_place_of_a_partial_file_is_not_followed(
    tmp_path: Path, replace: bool
) -> None:
    """Who else writes to the folder cannot guess the name."""
    (tmp_path / "precious").write_text("old")
    for name in ("partial", "tmp", "00000000.tmp"):
        (tmp_path / f".file.{name}").symlink_to(tmp_path / "precious")
    write_atomically(tmp_path / "file", write_text, argument="path", replace=replace)
    assert (tmp_path / "precious").read_text() == "old"
    assert not (tmp_path / "file").is_symlink()
    assert (tmp_path / "file").read_text() == "new" * 1000


def test_two_writers_of_a_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def write(partial: Path) -> None:
        partial.write_text("slow")
        write_atomically(path, write_text, argument="path", replace=True)  # meanwhile

    write_atomically(path, write, argument="path", replace=True)
    assert path.read_text() == "slow"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    here, ended = module._machine(), subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    digits = "0123abcd.tmp"
    killed, working = f".a[1].{here}-{ended.pid}-{digits}", f".a[1].{here}-{os.getpid()}-{digits}"
    elsewhere, stale = f".a[1].ffffff-{ended.pid}-{digits}", f".a[1].eeeeee-1-{digits}"
    others = (".a[1].of-mine.tmp", f".a1.{here}-{ended.pid}-{digits}")
    for name in (killed, working, elsewhere, stale, *others):
        (tmp_path / name).touch()
    for name in (stale, *others):
        os.utime(tmp_path / name, (0, 0))
    write_atomically(tmp_path / "a[1]", write_text, argument="path", replace=True)
    left = {each.name for each in tmp_path.iterdir()}
    assert left == {"a[1]", working, elsewhere, *others}


@pytest.mark.parametrize(
    ("error", "running"),
    [(None, True), (ProcessLookupError(), False), (PermissionError(), True)],
)
def test_a_process_of_somebody_else_is_running(
    error: OSError | None, running: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(process: int, signal: int) -> None:
        assert signal == 0
        if error is not None:
            raise error

    monkeypatch.setattr(os, "kill", kill)
    assert module._is_running(1) is running
    monkeypatch.setattr(os, "kill", None)  # would fail
    monkeypatch.setattr(os, "name", "nt")
    assert module._is_running(1)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file or directory"):
        write_atomically(tmp_path / "none" / "file", write_text, argument="path")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, ValueError])
def test_interrupted_write_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def write(partial: Path) -> None:
        partial.write_text("half")
        raise error

    with pytest.raises((error, OutputError)):
        write_atomically(tmp_path / "file", write, argument="path")
    assert list(tmp_path.iterdir()) == []


def test_name_reserved_without_links_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(1, "not here")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OutputError, match="not here"):
        write_atomically(tmp_path / "file", write_text, argument="path")
    assert list(tmp_path.iterdir()) == []


def test_control_characters_in_paths_are_escaped(tmp_path: Path) -> None:
    with pytest.raises(OutputError) as caught:
        write_atomically(tmp_path / "none\x1b[2J" / "file", write_text, argument="path")
    assert str(caught.value).isprintable()

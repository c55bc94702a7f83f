from __future__ import annotations

import errno
import io
import os
import subprocess
import sys

import pytest
from streams import broken, in_ascii

from lightning_mnp.cli.streams import lasting_streams


def test_letters_that_the_encoding_lacks_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = in_ascii()
    monkeypatch.setattr(sys, "stdout", stream)
    with lasting_streams():
        print("été")
    assert stream.buffer.getvalue() == rb"\xe9t\xe9" + os.linesep.encode()  # type: ignore[attr-defined]


@pytest.mark.parametrize("buffered", [False, True])
def test_a_stream_that_fails_is_given_up_and_that_is_told_once(
    buffered: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = broken(errno.ENOSPC, buffered)
    monkeypatch.setattr(sys, "stdout", stream)
    with lasting_streams():
        print("lost")
        print("lost", flush=True)
        assert sys.stdout.write("lost") == 4
        assert not sys.stdout.isatty()  # as before
    assert sys.stdout is stream
    told = capsys.readouterr().err
    assert told == (
        f"warning: nothing more is printed to standard output: {os.strerror(errno.ENOSPC)}. Files "
        "are written, and the exit code is set, all the same.\n"
    )


def test_nothing_is_told_if_standard_error_fails_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", broken(errno.EPIPE))
    monkeypatch.setattr(sys, "stderr", broken(errno.EPIPE))
    with lasting_streams():
        print("lost")
        print("lost", file=sys.stderr)


def test_other_errors_go_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with pytest.raises(ZeroDivisionError), lasting_streams():
        print(1 // 0)
    assert isinstance(sys.stdout, io.StringIO)


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_closed_pipe_does_not_change_the_exit_code_of_the_process(name: str) -> None:
    """Python would end with 120, since it cannot write what is left in the buffer."""
    ours, theirs = os.pipe()
    os.close(ours)
    word = "--help" if name == "stdout" else "no-command"
    command = [sys.executable, "-m", "lightning_mnp.cli", word]
    other = "stderr" if name == "stdout" else "stdout"
    try:
        done = subprocess.run(command, **{name: theirs, other: subprocess.PIPE}, text=True)  # type: ignore[call-overload]
    finally:
        os.close(theirs)
    assert done.returncode == (0 if name == "stdout" else 2)
    if name == "stdout":
        assert done.stderr.startswith("warning: nothing more is printed to standard output")
        assert len(done.stderr.splitlines()) == 1


def test_a_stream_that_is_closed_from_the_beginning_leads_nowhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with lasting_streams():
        print("nowhere")
        assert not sys.stdout.isatty()
    sys.stdout.close()

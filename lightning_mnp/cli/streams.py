"""Standard output and error that cost no result, whatever happens to what is printed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

__all__ = ["lasting_streams"]


class _LastingStream:
    """A text stream that drops what it cannot write, and says so once on standard error."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream = stream
        self._name = name
        self._failed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if not self._failed:
            try:
                return self._stream.write(text)
            except OSError as error:
                self._give_up(error)
        return len(text)

    def flush(self) -> None:
        if not self._failed:
            try:
                self._stream.flush()
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._failed = True
        with suppress(OSError):  # a stream in memory has no descriptor
            # Python writes what is left in the buffer at its end, and would fail with a code of
            # its own.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            try:
                os.dup2(nowhere, self._stream.fileno())
            finally:
                os.close(nowhere)
        if self._name == "stdout":
            reason = error.strerror or type(error).__name__
            told = f"warning: nothing more is printed to standard output: {reason}. Files are "
            print(f"{told}written, and the exit code is set, all the same.", file=sys.stderr)


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Let printing fail without an error: to a closed pipe, a full disk, or in a poor encoding.

    Letters that the encoding lacks are escaped. A stream that cannot be written to any more is
    given up. A stream that is closed from the beginning leads nowhere.

    Example:
        >>> with lasting_streams():
        ...     print("printed")
        printed
    """
    before = {name: getattr(sys, name) or _nowhere() for name in ("stdout", "stderr")}
    lasting = {name: _LastingStream(stream, name) for name, stream in before.items()}
    for name, stream in before.items():
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, cast(TextIO, lasting[name]))
    try:
        yield
    finally:
        for name, stream in before.items():
            lasting[name].flush()
            setattr(sys, name, stream)


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")

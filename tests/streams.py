"""Streams that cannot be printed to, or not everything."""

from __future__ import annotations

import io
import os

__all__ = ["broken", "in_ascii"]


class _Broken(io.RawIOBase):
    def __init__(self, reason: int) -> None:
        self.reason = reason

    def writable(self) -> bool:
        return True

    def write(self, content: object) -> int:
        raise OSError(self.reason, os.strerror(self.reason))


def broken(reason: int, buffered: bool = False) -> io.TextIOWrapper:
    """A stream to a closed pipe or a full disk, by the number of the error.

    Args:
        reason: Such as ``errno.EPIPE``.
        buffered: Whether it fails only when it is flushed.
    """
    raw = _Broken(reason)
    content = io.BufferedWriter(raw) if buffered else raw
    return io.TextIOWrapper(content, "utf-8", write_through=not buffered)  # type: ignore[arg-type]


def in_ascii() -> io.TextIOWrapper:
    """A stream in memory that has no letter beyond ASCII."""
    return io.TextIOWrapper(io.BytesIO(), "ascii")

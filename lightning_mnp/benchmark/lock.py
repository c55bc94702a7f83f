"""A lock that one process holds at a time, and that ends with it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["exclusive"]

_PAUSE = 1.0  # seconds between two tries


@contextmanager
def exclusive(path: Path, what: str) -> Iterator[None]:
    """Hold a lock until the context ends; wait while another process holds it, and say so.

    The system frees the lock when the process ends, even if it is killed, so the file that stays
    behind blocks nobody. Where there are no such locks, on Windows and on some network file
    systems, nothing is locked.

    Args:
        path: A file in a folder that exists; it is made if it is missing.
        what: What the lock is for, for the warning.

    Example:
        >>> import tempfile
        >>> with exclusive(Path(tempfile.mkdtemp(), "lock"), "the training"):
        ...     pass
    """
    with path.open("a") as file:
        told = False
        while not _try_lock(file):
            if not told:
                warnings.warn(
                    f"Another process holds {path} for {what}: this one waits until it has ended.",
                    stacklevel=3,
                )
            told = True
            time.sleep(_PAUSE)
        yield


def _try_lock(file: IO[str]) -> bool:
    """Return whether a file is locked now, or cannot be at all; closing it frees the lock."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True

"""Files that appear whole or not at all, and checks of their places before the work starts."""

from __future__ import annotations

import glob
import hashlib
import os
import platform
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lightning_mnp.checkpoints.printable import printable

__all__ = ["OutputError", "check_new", "check_writable", "write_atomically"]

# Nobody pauses for so long while writing. It is for writers on other machines, and for Windows.
_STALE_SECONDS = 3600.0
_TEMPORARY = re.compile(r"(?P<machine>[0-9a-f]{6})-(?P<process>\d+)-[0-9a-f]{8}\.tmp")


class OutputError(OSError):
    """A file cannot be written; the message names the argument that the path came from."""


def check_new(path: Path, argument: str) -> None:
    """Check that a file does not exist yet.

    Args:
        path: The file.
        argument: Name of the argument, for the message.

    Raises:
        OutputError: If something has this name, even a link to a file that does not exist.

    Example:
        >>> check_new(Path(tempfile.mkdtemp(), "report.json"), "report")
    """
    if os.path.lexists(path):
        raise OutputError(
            f"Expected argument `{argument}` not to exist, but {printable(str(path))} does. "
            "Nothing is overwritten: choose another name, or move the file away."
        )


def check_writable(path: Path, argument: str, size: int = 4096) -> None:
    """Check that a file can be written, by writing a temporary file to its folder.

    Args:
        path: The file; its folder may not exist yet.
        argument: Name of the argument, for the message.
        size: How many bytes it will have at least.

    Raises:
        OutputError: If the path is a folder, its folder cannot be written to, or there is not
            enough space.

    Example:
        >>> check_writable(Path(tempfile.gettempdir(), "report.json"), "report")
    """
    shown = printable(str(path))
    if path.is_dir():
        raise OutputError(
            f"Expected argument `{argument}` to be a file, but {shown} is a folder. Name a file "
            "in it."
        )
    folder = next((folder for folder in path.absolute().parents if folder.exists()), None)
    if folder is None:  # on Windows, a drive or a share that is not there
        raise OutputError(
            f"Expected argument `{argument}` to be where files can be written, but got {shown}: no "
            "folder of it exists, not even its drive. Choose another folder."
        )
    try:
        with tempfile.TemporaryFile(dir=folder) as trial:
            trial.write(bytes(4096))
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise OutputError(
            f"Expected argument `{argument}` to be where files can be written, but got {shown}: "
            f"{_reason(error)}. Choose another folder."
        ) from error
    if free < size:
        raise OutputError(
            f"Expected argument `{argument}` to be where there is space for {size:,} bytes, but "
            f"{free:,} are free for {shown}. Make space, or choose another folder."
        )


def write_atomically(
    path: Path, write: Callable[[Path], object], *, argument: str, replace: bool = False
) -> None:
    """Write a file so that it appears whole or not at all, even if the process is killed.

    The content is written to a temporary file beside it, which then gets its name.

    Args:
        path: The file, in a folder that exists.
        write: A function that writes the content to the temporary path that it is called with.
        argument: Name of the argument, for messages.
        replace: Whether an existing file is replaced; if not, the name must be free.

    Raises:
        OutputError: If it cannot be written, or the name is taken. An existing file stays as it
            was.

    Example:
        >>> path = Path(tempfile.mkdtemp(), "note.txt")
        >>> write_atomically(path, lambda partial: partial.write_text("whole"), argument="path")
        >>> path.read_text()
        'whole'
    """
    shown = printable(str(path))
    # Random digits keep two writers apart; the others tell which are left by killed ones.
    unique = f"{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"
    partial = path.with_name(f".{path.name}.{unique}.tmp")
    _remove_stale(path)
    try:
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        if replace:
            partial.replace(path)
        else:
            _publish(partial, path)
    except FileExistsError as error:
        raise OutputError(
            f"Expected argument `{argument}` not to exist, but {shown} has appeared meanwhile. "
            "Nothing is overwritten: choose another name, or move the file away."
        ) from error
    except (OSError, RuntimeError) as error:  # PyTorch raises RuntimeError if the disk is full
        raise OutputError(
            f"Argument `{argument}`: {shown} could not be written: {_reason(error)}. There is no "
            "partial file. Make space, or choose another folder."
        ) from error
    finally:
        with suppress(OSError):  # there is no such file, or not even its folder
            partial.unlink()


def _remove_stale(path: Path) -> None:
    """Remove temporary files of a file whose writers were killed, and none of those at work."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        made = _TEMPORARY.fullmatch(left.name.removeprefix(f".{path.name}."))
        if made is None:  # a file of the user
            continue
        is_over = made["machine"] == _machine() and not _is_running(int(made["process"]))
        with suppress(OSError):  # another writer was faster
            if is_over or time.time() - left.lstat().st_mtime > _STALE_SECONDS:
                left.unlink()


def _machine() -> str:
    """Return digits of the machine's name: numbers of processes are its own."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:6]


def _is_running(process: int) -> bool:
    """Return whether a process of this machine may be running."""
    if os.name == "nt":  # where asking would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # somebody else's, or no number of a process
        return True
    return True


def _publish(partial: Path, path: Path) -> None:
    """Rename a finished file to its final name, which must be free."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        path.open("xb").close()
        try:
            partial.replace(path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def _reason(error: Exception) -> str:
    """Return what went wrong, in one line; PyTorch hides the reason in the error's cause."""
    for cause in (error, error.__cause__, error.__context__):
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
    return printable(str(error).splitlines()[0] if str(error) else type(error).__name__, 300)

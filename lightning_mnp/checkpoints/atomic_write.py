"""Files that appear whole or not at all, in places that are tried before the work starts."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lightning_mnp.checkpoints.printable import printable

__all__ = ["OutputError", "check_new", "check_writable", "write_whole"]


class OutputError(OSError):
    """A file that cannot be written; the message names the argument it was given as."""


def check_new(path: Path, argument: str) -> None:
    """Check that a file does not exist yet.

    Args:
        path: The file.
        argument: Name of the argument, for the message.

    Raises:
        OutputError: If there is something of that name, be it a link that leads nowhere.

    Example:
        >>> check_new(Path(tempfile.mkdtemp(), "report.json"), "report")
    """
    if os.path.lexists(path):
        raise OutputError(
            f"Expected argument `{argument}` not to exist, but {printable(str(path))} does. "
            "Nothing is overwritten: choose another name, or move the file away."
        )


def check_writable(path: Path, argument: str, size: int = 4096) -> None:
    """Check that a file could be written, by writing a nameless one in its place.

    Args:
        path: The file; the folders above it may be missing.
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
    folder = next(folder for folder in path.absolute().parents if folder.exists())
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


def write_whole(
    path: Path, write: Callable[[Path], None], *, argument: str, replace: bool = False
) -> None:
    """Write a file that appears whole or not at all, whatever happens meanwhile.

    Args:
        path: The file, in an existing folder.
        write: Writes to the path that it is called with, which is in the same folder.
        argument: Name of the argument, for messages.
        replace: Whether what was there is replaced; if not, the name has to be free.

    Raises:
        OutputError: If it cannot be written, or the name is taken. What was there is unharmed.

    Example:
        >>> path = Path(tempfile.mkdtemp(), "note.txt")
        >>> write_whole(path, lambda partial: partial.write_text("whole") and None, argument="path")
        >>> path.read_text()
        'whole'
    """
    shown = printable(str(path))
    # A name of its own keeps two writers apart; what is replaced has one writer.
    unique = "partial" if replace else f"{secrets.token_hex(4)}.tmp"
    partial = path.with_name(f".{path.name}.{unique}")
    with suppress(OSError):  # of a killed writer, or a link that would lead elsewhere
        partial.unlink()
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
            f"Expected argument `{argument}` not to exist, but {shown} has appeared meanwhile."
        ) from error
    except (OSError, RuntimeError) as error:  # PyTorch tells of a full disk by a RuntimeError
        raise OutputError(
            f"Argument `{argument}`: {shown} could not be written: {_reason(error)}. There is no "
            "partial file. Make space, or choose another folder."
        ) from error
    finally:
        with suppress(OSError):  # there is none, or not even a folder
            partial.unlink()


def _publish(partial: Path, path: Path) -> None:
    """Give a finished file its name, which must be free."""
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
    """Say what went wrong, in one line; PyTorch's own text hides the reason in its cause."""
    for cause in (error, error.__cause__, error.__context__):
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
    return printable(str(error).splitlines()[0] if str(error) else type(error).__name__, 300)

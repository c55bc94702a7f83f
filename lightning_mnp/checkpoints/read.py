"""Reading checkpoint files from sources that nobody vouches for."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lightning_mnp.checkpoints.inspection import CheckpointError, inspect_checkpoint
from lightning_mnp.checkpoints.printable import printable
from lightning_mnp.checkpoints.state_dict import all_tensors, find_state_dict, strip_wrappers

__all__ = ["read_checkpoint", "read_state_dict"]

MAX_BYTES = 8 * 2**30


def read_state_dict(
    path: str | os.PathLike[str],
    *,
    key: str | None = None,
    max_bytes: int = MAX_BYTES,
    argument: str = "path",
) -> dict[str, Tensor]:
    """Read the weights, and nothing else, from a checkpoint that nobody vouches for.

    Files that end in ``.safetensors`` are read by safetensors. All others are read as files written
    by ``torch.save``: first they are checked without unpickling anything, then they are read with
    ``weights_only=True``. Hyperparameters, optimizer states and class paths in the file are
    ignored. The prefixes that ``DataParallel`` (``module.``) and ``torch.compile``
    (``_orig_mod.``) add to names are removed.

    Args:
        path: The file.
        key: Where in the file the state dict is, for example ``"ema"`` or ``"nets.student"``; if
            None, it is looked for at the top and under ``state_dict``, ``model_state_dict``,
            ``model``, ``net`` and ``sd``.
        max_bytes: Largest accepted size in bytes, of the file and of its tensors.
        argument: Name of the argument, for messages.

    Returns:
        Contiguous tensors on the CPU by name, independent of the file and of each other.

    Raises:
        CheckpointError: If there is no such file, it is too large, damaged, no checkpoint, would
            run code, holds no tensors, or it is not clear which of several dicts is meant.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "model.pt")
        >>> torch.save(torch.nn.Linear(2, 1).state_dict(), path)
        >>> {name: tuple(tensor.shape) for name, tensor in read_state_dict(path).items()}
        {'weight': (1, 2), 'bias': (1,)}
    """
    shown = printable(os.fspath(path))
    content = _read_mapped(Path(path), max_bytes, argument)
    named = strip_wrappers(find_state_dict(content, key, shown), shown)
    return _detach_from_file(named, shown, max_bytes)


def read_checkpoint(
    path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES, argument: str = "path"
) -> Any:
    """Read a whole file written by ``torch.save``, with the checks of :func:`read_state_dict`.

    For files whose optimizer states and counters are needed as well. The content consists of
    tensors and primitives; the caller has to check whether it makes sense.

    Args:
        path: The file.
        max_bytes: Largest accepted size in bytes, of the file and of all tensors in it.
        argument: Name of the argument, for messages.

    Returns:
        What was saved, on the CPU and independent of the file.

    Raises:
        CheckpointError: If there is no such file, it is too large, damaged, no checkpoint, or
            would run code.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "progress.pt")
        >>> torch.save({"step": 3, "optimizer": {"momentum": torch.zeros(2)}}, path)
        >>> read_checkpoint(path)["step"]
        3
    """
    shown = printable(os.fspath(path))
    content = _read_mapped(Path(path), max_bytes, argument, by_suffix=False)
    _check_declared(list(all_tensors(content)), shown, max_bytes)
    try:
        return copy.deepcopy(content)
    except Exception as error:  # for example, it is nested deeper than Python can go
        raise CheckpointError(
            f"{shown} is refused: its content cannot be copied ({printable(str(error))})."
        ) from error


def _read_mapped(
    path: Path, max_bytes: int, argument: str = "path", by_suffix: bool = True
) -> object:
    """Check a file and read it; its tensors may still be mapped from the file."""
    shown = printable(str(path))
    if not path.is_file():
        raise CheckpointError(
            f"Expected argument `{argument}` to be an existing file, but got {shown}. Check the "
            f"name and the folder; this is {printable(str(Path.cwd()))}."
        )
    size = path.stat().st_size
    if size > max_bytes:
        raise CheckpointError(
            f"{shown} is refused: it has {size:,} bytes, but `max_bytes` is {max_bytes:,}."
        )
    try:
        if by_suffix and path.suffix == ".safetensors":
            return safetensors.torch.load_file(path, device="cpu")
        is_zip = inspect_checkpoint(path, max_bytes)
        # Storages that are mapped from a file cannot be larger than the file.
        return torch.load(path, weights_only=True, map_location="cpu", mmap=is_zip)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file can break its reader at any point
        raise CheckpointError(f"{shown} is damaged or no checkpoint: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return why a file could not be read, without PyTorch's advice to read it with less care."""
    text = str(error)
    if "weights_only" in text:
        _, found, text = text.partition("WeightsUnpickler error: ")
        text = text.splitlines()[0] if found else "PyTorch refused it"
    return printable(text, 300)


def _detach_from_file(tensors: dict[str, Tensor], shown: str, max_bytes: int) -> dict[str, Tensor]:
    """Copy tensors out of the file, after a check that their declared shapes fit in memory."""
    _check_declared(list(tensors.values()), shown, max_bytes)
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise CheckpointError(
                f"{shown} is refused: expected dense tensors with values, but {printable(name)} "
                f"has the layout {tensor.layout} on {tensor.device}."
            )
    return {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def _check_declared(tensors: list[Tensor], shown: str, max_bytes: int) -> None:
    """Check the total size of the declared shapes: a few numbers can be declared as very many."""
    declared = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if declared > max_bytes:
        raise CheckpointError(
            f"{shown} is refused: its tensors declare {declared:,} bytes, but `max_bytes` is "
            f"{max_bytes:,}."
        )

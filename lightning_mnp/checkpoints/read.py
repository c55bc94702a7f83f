"""Reading weights from checkpoint files that nobody vouches for, and writing new ones."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lightning_mnp.checkpoints.inspection import CheckpointError, check_archive
from lightning_mnp.checkpoints.printable import printable
from lightning_mnp.checkpoints.state_dict import (
    PrefixMatch,
    all_tensors,
    check_finite,
    first_names,
    load_into,
)

__all__ = [
    "CheckpointError",
    "PrefixMatch",
    "check_finite",
    "load_into",
    "read_checkpoint",
    "read_state_dict",
]

MAX_BYTES = 8 * 2**30
NESTING_KEYS = ("state_dict", "model_state_dict", "model", "net", "sd")


def read_state_dict(
    path: str | os.PathLike[str],
    *,
    key: str | None = None,
    max_bytes: int = MAX_BYTES,
    argument: str = "path",
) -> dict[str, Tensor]:
    """Read the weights, and nothing else, from a checkpoint that nobody vouches for.

    Files ending in ``.safetensors`` are read by safetensors, all others as files written by
    ``torch.save``: only with ``weights_only=True``, after a check of their own that unpickles
    nothing. Hyperparameters, optimizer states and class paths in the file are ignored. The
    prefixes that ``DataParallel`` (``module.``) and ``torch.compile`` (``_orig_mod.``) put before
    names are taken off.

    Args:
        path: The file.
        key: Where in the file the state dict is, for example ``"ema"`` or ``"nets.student"``;
            ``None`` finds it at the top or under ``state_dict``, ``model_state_dict``, ``model``,
            ``net`` or ``sd``.
        max_bytes: Largest accepted size in bytes, of the file and of its tensors.
        argument: Name of the argument, for messages.

    Returns:
        Contiguous tensors on the CPU by name, independent of the file and of each other.

    Raises:
        CheckpointError: If there is no such file, it is too large, damaged, no checkpoint, would
            run code, holds no tensors, or does not say clearly which of several dicts is meant.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "model.pt")
        >>> write_state_dict(path, torch.nn.Linear(2, 1).state_dict())
        >>> {name: tuple(tensor.shape) for name, tensor in read_state_dict(path).items()}
        {'weight': (1, 2), 'bias': (1,)}
    """
    shown = printable(os.fspath(path))
    content = _read_mapped(Path(path), max_bytes, argument)
    named = _strip_wrappers(_find_state_dict(content, key, shown), shown)
    return _detach_from_file(named, shown, max_bytes)


def read_checkpoint(
    path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES, argument: str = "path"
) -> Any:
    """Read a whole file written by ``torch.save``, under the checks of :func:`read_state_dict`.

    For files whose optimizer states and counters are wanted as well. What is in them is tensors
    and primitives; whether these make sense is for the caller to tell.

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
    except Exception as error:  # nested deeper than Python goes, say
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
        is_zip = check_archive(path, max_bytes)
        # A mapped file cannot make storages larger than itself.
        return torch.load(path, weights_only=True, map_location="cpu", mmap=is_zip)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file can break its reader at any point
        raise CheckpointError(f"{shown} is damaged or no checkpoint: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Say what a reader met, without PyTorch's advice to read the file with less care."""
    text = str(error)
    if "weights_only" in text:
        _, found, text = text.partition("WeightsUnpickler error: ")
        text = text.splitlines()[0] if found else "PyTorch refused it"
    return printable(text, 300)


def _find_state_dict(content: object, key: str | None, shown: str) -> dict[str, Tensor]:
    """Find the dict of tensors that is meant and drop what is no tensor."""
    if key is not None:
        found: object = content
        for part in [key] if isinstance(content, dict) and key in content else key.split("."):
            if not isinstance(found, dict) or part not in found:
                names = list(found) if isinstance(found, dict) else []
                raise CheckpointError(
                    f"Expected argument `key` to lead to a state dict in {shown}, but {key!r} does "
                    f"not. There is: {first_names(names)}."
                )
            found = found[part]
        content = found
    for _ in NESTING_KEYS:
        if not isinstance(content, dict):
            break
        nested = [name for name in NESTING_KEYS if isinstance(content.get(name), dict)]
        if len(nested) > 1:
            raise CheckpointError(
                f"{shown} holds several state dicts. Choose one with the option `key`: "
                f"{first_names(nested)}."
            )
        if not nested:
            break
        content = content[nested[0]]
    tensors = _tensors(content)
    if tensors:
        return tensors
    if isinstance(content, dict):
        candidates = [name for name, value in content.items() if _tensors(value)]
        if candidates:
            raise CheckpointError(
                f"{shown} holds no state dict under a usual key. Choose one with the option `key`: "
                f"{first_names(candidates)}."
            )
    raise CheckpointError(
        f"{shown} holds no weights by name. Expected a state dict, also under one of "
        f"{NESTING_KEYS}; save `model.state_dict()`."
    )


def _tensors(content: object) -> dict[str, Tensor]:
    """Keep the named tensors of a dict; empty for anything else."""
    if not isinstance(content, dict):
        return {}
    return {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }


def _strip_wrappers(tensors: dict[str, Tensor], shown: str) -> dict[str, Tensor]:
    """Take off what torch.compile, DataParallel and AveragedModel put around names."""
    names = list(tensors)
    plain = [
        ".".join(part for part in name.split(".") if part != "_orig_mod") or name for name in names
    ]
    if all(name.startswith("module.") or name == "n_averaged" for name in plain):
        plain = [name.removeprefix("module.") for name in plain]
    if len(set(plain)) < len(plain):
        raise CheckpointError(
            f"{shown} is refused: without the prefixes `module.` and `_orig_mod.`, names occur "
            "twice."
        )
    return {new: tensors[old] for new, old in zip(plain, names, strict=True) if new != "n_averaged"}


def _detach_from_file(tensors: dict[str, Tensor], shown: str, max_bytes: int) -> dict[str, Tensor]:
    """Copy tensors out of the file, once their declared shapes are known to fit in memory."""
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
    """Add up declared shapes: a few numbers in a file can claim to be any number of weights."""
    declared = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if declared > max_bytes:
        raise CheckpointError(
            f"{shown} is refused: its tensors declare {declared:,} bytes, but `max_bytes` is "
            f"{max_bytes:,}."
        )

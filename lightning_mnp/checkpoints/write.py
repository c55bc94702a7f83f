"""Writing weights to new checkpoint files, whole or not at all."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lightning_mnp.checkpoints.atomic_write import (
    OutputError,
    check_new,
    check_writable,
    write_atomically,
)
from lightning_mnp.checkpoints.inspection import CheckpointError
from lightning_mnp.checkpoints.printable import printable
from lightning_mnp.checkpoints.state_dict import all_tensors

__all__ = ["check_output", "write_state_dict"]

WRITTEN_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth")
# What an extra state may consist of beside tensors: every reader takes it, also the safe ones.
_PRIMITIVES = (type(None), bool, int, float, str)
_CONTAINERS = (dict, OrderedDict, list, tuple)
_MAX_DEPTH = 50


def check_output(
    path: str | os.PathLike[str], state_dict: Mapping[str, Any], argument: str = "path"
) -> None:
    """Check that :func:`write_state_dict` can write a file, before the work starts.

    Args:
        path: The file.
        state_dict: Tensors as large as those that will be written, and extra states of the kind.
        argument: Name of the argument, for messages.

    Raises:
        CheckpointError: If the file exists, its ending is unknown, its folder cannot be written
            to or has too little space, or the format cannot hold an extra state.

    Example:
        >>> check_output("weights.onnx", {})
        Traceback (most recent call last):
        ...
        lightning_mnp.checkpoints.inspection.CheckpointError: Expected argument `path` to end
        in one of
        ('.safetensors', '.ckpt', '.pt', '.pth'), but got weights.onnx.
    """
    path = Path(path)
    shown = printable(str(path))
    if path.suffix not in WRITTEN_SUFFIXES:
        raise CheckpointError(
            f"Expected argument `{argument}` to end in one of {WRITTEN_SUFFIXES}, but got {shown}."
        )
    for name, value in state_dict.items():
        _check_entry(name, value, path.suffix)
    size = sum(tensor.numel() * tensor.element_size() for tensor in all_tensors(dict(state_dict)))
    try:
        check_new(path, argument)
        check_writable(path, argument, size)
    except OutputError as error:
        raise CheckpointError(str(error)) from error


def write_state_dict(
    path: str | os.PathLike[str],
    state_dict: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    *,
    argument: str = "path",
) -> None:
    """Write weights to a new file that appears whole or not at all.

    Args:
        path: The file; its folder is made if it does not exist. The ending chooses the format:
            ``.safetensors``, ``.ckpt`` (weights under ``state_dict``, as Lightning reads them for
            validating, testing and predicting) or ``.pt`` and ``.pth`` (the plain state dict).
        state_dict: Tensors by name, written as contiguous copies. Tied weights are written once for
            each name; they load strictly into the class that ties them. Extra states
            (``get_extra_state``) are written too, except to ``.safetensors``, if they consist of
            tensors, numbers, texts, None, lists, tuples and dicts.
        metadata: Strings to keep beside the weights; ``.pt`` and ``.pth`` files do not hold them.
        argument: Name of the argument, for messages.

    Raises:
        CheckpointError: If the file exists, its ending is unknown, its folder cannot be made or
            written to, there is too little space, there is nothing to write, or the format cannot
            hold an extra state.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "model.safetensors")
        >>> write_state_dict(path, {"weight": torch.ones(2)}, {"verdict": "clean"})
        >>> safetensors.torch.load_file(path)
        {'weight': tensor([1., 1.])}
    """
    path = Path(path)
    check_output(path, state_dict, argument)
    if not state_dict:
        raise CheckpointError("Expected argument `state_dict` to hold tensors, but it is empty.")
    for key, value in (metadata or {}).items():
        if not isinstance(value, str):
            raise CheckpointError(
                f"Expected argument `metadata` to map to strings, but {printable(key)!r} is "
                f"{type(value).__name__}."
            )
    content = {name: _copied(value) for name, value in state_dict.items()}

    def write(partial: Path) -> None:
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            _write(partial, path.suffix, content, dict(metadata or {}))
        except safetensors.SafetensorError as error:
            raise OSError(str(error)) from error

    try:
        write_atomically(path, write, argument=argument)
    except OutputError as error:
        raise CheckpointError(str(error)) from error


def _check_entry(name: str, value: object, suffix: str) -> None:
    """Check that an entry of a state dict can be written so that safe readers take the file."""
    if isinstance(value, Tensor):
        return
    found = printable(f"{type(value).__module__}.{type(value).__qualname__}")
    shown = printable(name)
    if suffix == ".safetensors":
        raise CheckpointError(
            f"Expected argument `state_dict` to hold tensors only, as .safetensors does, but "
            f"{shown} is an extra state: {found}. Choose a name that ends in .ckpt or .pt."
        )
    if not _is_plain(value):
        raise CheckpointError(
            f"Expected argument `state_dict` to hold tensors, and extra states of numbers, texts, "
            f"None, lists, tuples and dicts by names or whole numbers, at most {_MAX_DEPTH} levels "
            f"deep, but {shown} holds something else or is deeper: {found}. Let `get_extra_state` "
            "return the former only."
        )


def _is_plain(value: object, depth: int = 0) -> bool:
    """Return whether a value consists of what every reader takes, also those that run nothing."""
    if isinstance(value, Tensor) or type(value) in _PRIMITIVES:
        return True
    if depth == _MAX_DEPTH or type(value) not in _CONTAINERS:  # a class of one's own: not plain
        return False
    if isinstance(value, dict):
        items = list(value.values())
        return all(type(key) in (str, int) for key in value) and _is_plain(items, depth + 1)
    assert isinstance(value, (list, tuple))
    return all(_is_plain(each, depth + 1) for each in value)


def _copied(value: Any) -> Any:
    """Return an entry of a state dict as a contiguous copy on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    if isinstance(value, dict):
        return type(value)((key, _copied(each)) for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return type(value)(map(_copied, value))
    return value


def _write(path: Path, suffix: str, content: dict[str, Any], metadata: dict[str, str]) -> None:
    """Write the format that the suffix stands for."""
    if suffix == ".safetensors":
        safetensors.torch.save_file(content, path, metadata or None)
    elif suffix == ".ckpt":
        checkpoint = {
            "epoch": 0,
            "global_step": 0,
            "pytorch-lightning_version": _lightning_version(),
            "state_dict": content,
            "lightning_mnp": metadata,
        }
        torch.save(checkpoint, path)
    else:
        torch.save(content, path)


def _lightning_version() -> str:
    """Return the version by which Lightning decides how to migrate a checkpoint."""
    for package in ("lightning", "pytorch-lightning"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "2.6.0"  # the oldest that this package supports

"""Writing weights to new checkpoint files, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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

__all__ = ["check_output", "write_state_dict"]

WRITTEN_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth")


def check_output(
    path: str | os.PathLike[str], state_dict: Mapping[str, Tensor], argument: str = "path"
) -> None:
    """Check that :func:`write_state_dict` can write a file, before the work starts.

    Args:
        path: The file.
        state_dict: Tensors as large as those that will be written.
        argument: Name of the argument, for messages.

    Raises:
        CheckpointError: If the file exists, its ending is unknown, or its folder cannot be written
            to or has too little space.

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
    size = sum(tensor.numel() * tensor.element_size() for tensor in state_dict.values())
    try:
        check_new(path, argument)
        check_writable(path, argument, size)
    except OutputError as error:
        raise CheckpointError(str(error)) from error


def write_state_dict(
    path: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor],
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
            each name; they load strictly into the class that ties them.
        metadata: Strings to keep beside the weights; ``.pt`` and ``.pth`` files do not hold them.
        argument: Name of the argument, for messages.

    Raises:
        CheckpointError: If the file exists, its ending is unknown, its folder cannot be made or
            written to, there is too little space, or there is nothing to write.

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
    tensors = {
        name: value.detach().to("cpu", copy=True).contiguous() for name, value in state_dict.items()
    }

    def write(partial: Path) -> None:
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            _write(partial, path.suffix, tensors, dict(metadata or {}))
        except safetensors.SafetensorError as error:
            raise OSError(str(error)) from error

    try:
        write_atomically(path, write, argument=argument)
    except OutputError as error:
        raise CheckpointError(str(error)) from error


def _write(path: Path, suffix: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write the format that the suffix stands for."""
    if suffix == ".safetensors":
        safetensors.torch.save_file(tensors, path, metadata or None)
    elif suffix == ".ckpt":
        content = {
            "epoch": 0,
            "global_step": 0,
            "pytorch-lightning_version": _lightning_version(),
            "state_dict": tensors,
            "lightning_mnp": metadata,
        }
        torch.save(content, path)
    else:
        torch.save(tensors, path)


def _lightning_version() -> str:
    """Return the version by which Lightning decides how to migrate a checkpoint."""
    for package in ("lightning", "pytorch-lightning"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "2.6.0"  # the oldest that this package supports

"""Reading checkpoint files from sources that nobody vouches for."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lightning_mnp.checkpoints.inert import Foreign, StoredTensor
from lightning_mnp.checkpoints.inspection import (
    CheckpointError,
    belongs_to_weights,
    inspect_checkpoint,
)
from lightning_mnp.checkpoints.printable import first_names, printable
from lightning_mnp.checkpoints.state_dict import all_tensors, find_state_dict, strip_wrappers
from lightning_mnp.checkpoints.stored import StoredFile

__all__ = ["Weights", "read_checkpoint", "read_state_dict", "read_weights"]

MAX_BYTES = 8 * 2**30
# Where training scripts keep their arguments.
_ARGUMENTS = ("args", "config", "hyper_parameters", "hparams")
_LONGEST_LIST = 16
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class Weights:
    """What was read of a file.

    Attributes:
        tensors: Contiguous tensors on the CPU by name, independent of the file and of each other.
        skipped: Full names of the classes and functions in the file that weights do not need.
            Objects of theirs were not made, and nothing was called.
        facts: Numbers, texts and short lists that stand beside the weights, such as ``arch``, and
            in the training's arguments if those were kept. Nobody vouches for them.
    """

    tensors: dict[str, Tensor]
    skipped: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    def warnings(self) -> list[str]:
        """Return what a report should say of the file, in words.

        Example:
            >>> Weights({}, skipped=("argparse.Namespace",)).warnings()[0][:60]
            'besides weights, the file holds objects of argparse.Namespac'
        """
        if not self.skipped:
            return []
        return [
            f"besides weights, the file holds objects of {first_names(self.skipped)}. They were "
            "skipped, and nothing of them was run; `torch.load(weights_only=False)` would run them"
        ]


def read_weights(
    path: str | os.PathLike[str],
    *,
    key: str | None = None,
    max_bytes: int = MAX_BYTES,
    argument: str = "path",
) -> Weights:
    """Read weights as :func:`read_state_dict` does, and what was found beside them.

    Args:
        path: See :func:`read_state_dict`.
        key: See :func:`read_state_dict`.
        max_bytes: See :func:`read_state_dict`.
        argument: See :func:`read_state_dict`.

    Raises:
        CheckpointError: See :func:`read_state_dict`.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "model.pt")
        >>> torch.save({"state_dict": {"weight": torch.ones(1)}, "arch": "resnet18"}, path)
        >>> read_weights(path).facts
        {'arch': 'resnet18'}
    """
    path = Path(path)
    shown = printable(str(path))
    _check_file(path, max_bytes, argument)
    if path.suffix == ".safetensors":
        try:
            content = safetensors.torch.load_file(path, device="cpu")
        except Exception as error:  # a damaged file can break its reader at any point
            raise _damaged(shown, error) from error
        found = strip_wrappers(find_state_dict(content, key, shown), shown)
        real = {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
        return Weights(_detach_from_file(real, shown, max_bytes))
    is_zip = inspect_checkpoint(path, max_bytes, foreign=True)
    try:
        stored = StoredFile(path, is_zip)
    except Exception as error:
        raise _damaged(shown, error) from error
    described = strip_wrappers(find_state_dict(stored.content, key, shown), shown)
    _check_declared(list(described.values()), shown, max_bytes)
    try:
        tensors = stored.tensors(described)
    except Exception as error:
        raise _damaged(shown, error) from error
    skipped = tuple(name for name in stored.names if not belongs_to_weights(name))
    return Weights(tensors, skipped, _facts(stored.content))


def read_state_dict(
    path: str | os.PathLike[str],
    *,
    key: str | None = None,
    max_bytes: int = MAX_BYTES,
    argument: str = "path",
) -> dict[str, Tensor]:
    """Read the weights, and nothing else, from a checkpoint that nobody vouches for.

    Files that end in ``.safetensors`` are read by safetensors. All others are read as files written
    by ``torch.save``, by a reader of our own that imports nothing and calls nothing that the file
    names. Hyperparameters, optimizer states, class paths and objects of any other kind are skipped.
    The prefixes that ``DataParallel`` (``module.``) and ``torch.compile`` (``_orig_mod.``) add to
    names are removed.

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
        CheckpointError: If there is no such file, it is too large, damaged, no checkpoint, names
            what runs commands or code, holds no tensors, its weights hang on an object of another
            class, or it is not clear which of several dicts is meant.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "model.pt")
        >>> torch.save(torch.nn.Linear(2, 1).state_dict(), path)
        >>> {name: tuple(tensor.shape) for name, tensor in read_state_dict(path).items()}
        {'weight': (1, 2), 'bias': (1,)}
    """
    return read_weights(path, key=key, max_bytes=max_bytes, argument=argument).tensors


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
    _check_file(Path(path), max_bytes, argument)
    is_zip = inspect_checkpoint(Path(path), max_bytes)
    try:
        # Storages that are mapped from a file cannot be larger than the file.
        content = torch.load(path, weights_only=True, map_location="cpu", mmap=is_zip)
    except Exception as error:  # a damaged file can break its reader at any point
        raise _damaged(shown, error) from error
    _check_declared(list(all_tensors(content)), shown, max_bytes)
    try:
        return copy.deepcopy(content)
    except Exception as error:  # for example, it is nested deeper than Python can go
        raise CheckpointError(
            f"{shown} is refused: its content cannot be copied ({printable(str(error))})."
        ) from error


def _check_file(path: Path, max_bytes: int, argument: str) -> None:
    """Check that a file exists, is not too large and not a mere pointer to one."""
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
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise CheckpointError(
                f"Expected {shown} to hold weights, but it is a pointer of Git LFS, and the file "
                "itself was not fetched. Run `git lfs pull`."
            )


def _facts(content: object) -> dict[str, Any]:
    """Return the plain values beside the weights, and those of the training's arguments."""
    facts: dict[str, Any] = {}
    if isinstance(content, dict):
        for place in (content, *(content.get(name) for name in _ARGUMENTS)):
            values = place.state if isinstance(place, Foreign) else place
            for name, value in values.items() if isinstance(values, dict) else ():
                if _is_plain(value):
                    facts.setdefault(name, value)
    return facts


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return 0 < len(value) <= _LONGEST_LIST and not any(
            isinstance(each, (list, tuple)) or not _is_plain(each) for each in value
        )
    return isinstance(value, (str, int, float))


def _damaged(shown: str, error: Exception) -> CheckpointError:
    return CheckpointError(f"{shown} is damaged or no checkpoint: {_reason(error)}")


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


def _check_declared(tensors: Sequence[Tensor | StoredTensor], shown: str, max_bytes: int) -> None:
    """Check the total size of the declared shapes: a few numbers can be declared as very many."""
    declared = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if declared > max_bytes:
        raise CheckpointError(
            f"{shown} is refused: its tensors declare {declared:,} bytes, but `max_bytes` is "
            f"{max_bytes:,}."
        )

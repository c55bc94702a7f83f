"""The processes of a distributed run: who there is, what each has, and whether all go on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

__all__ = [
    "do_in_first",
    "gather_objects",
    "process_count",
    "process_rank",
    "read_together",
    "whole_loader",
]

Parts = tuple[list[Tensor], list[Tensor]]


def process_count() -> int:
    """Number of processes in PyTorch's process group; 1 where there is none.

    Example:
        >>> process_count()
        1
    """
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    """Number of this process among them, from 0.

    Example:
        >>> process_rank()
        0
    """
    return dist.get_rank() if process_count() > 1 else 0


def gather_objects(value: Any) -> list[Any]:
    """Give every process what each of them has. All of them have to call this.

    Args:
        value: Anything that can be pickled, tensors on the CPU.

    Returns:
        The values in the order of the processes.

    Example:
        >>> gather_objects("only one")
        ['only one']
    """
    if process_count() == 1:
        return [value]
    values: list[Any] = [None] * process_count()
    dist.all_gather_object(values, value)
    return values


def do_in_first(work: Callable[[], None]) -> None:
    """Do something in the first process only; where it fails, all fail. All have to call this.

    Args:
        work: What is done; an exception in it is raised in the first process.

    Raises:
        RuntimeError: In the other processes, if it failed in the first.

    Example:
        >>> do_in_first(lambda: print("done once"))
        done once
    """
    error: Exception | None = None
    if process_rank() == 0:
        try:
            work()
        except Exception as raised:
            error = raised
    _raise_together(error, "failed")


def _raise_together(error: Exception | None, what: str) -> None:
    """Raise in all processes if there is an error in one of them."""
    told = gather_objects(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, text in enumerate(told):
        if text is not None:
            raise RuntimeError(f"Process {rank} of {len(told)} {what}: {text}")


def read_together(read: Callable[[], Parts]) -> Parts:
    """Read images and labels in every process, and give each of them all. All have to call this.

    Args:
        read: Gives lists of tensors, images and labels, as this process has them; both may be
            empty.

    Returns:
        The lists of all processes, one behind the other; where all have read the same, only once.

    Raises:
        RuntimeError: If reading failed in another process.

    Example:
        >>> read_together(lambda: ([torch.ones(1, 1, 1)], [torch.tensor([4])]))[1]
        [tensor([4])]
    """
    own: Parts = [], []
    error: Exception | None = None
    try:
        own = read()
    except Exception as raised:
        error = raised
    _raise_together(error, "could not read its part of the defense set")
    # Most often every process has the same images: then there is no need to send them around.
    if len(set(gather_objects(_digest(own)))) == 1:
        return own
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for part in gather_objects(own):
        images += part[0]
        labels += part[1]
    return images, labels


def whole_loader(loader: Iterable[Any]) -> Iterable[Any]:
    """Give a loader of the whole data set where one has a ``DistributedSampler``.

    Args:
        loader: Any loader; it is returned as it is if there is no such sampler.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.arange(6))
        >>> sampler = DistributedSampler(data, num_replicas=2, rank=0)
        >>> loader = DataLoader(data, batch_size=3, sampler=sampler)
        >>> len(loader), len(whole_loader(loader))
        (1, 2)
    """
    if not isinstance(loader, DataLoader):
        return loader
    batch_sampler = loader.batch_sampler
    samplers = (loader.sampler, getattr(batch_sampler, "sampler", None))
    # Not its subclasses: which part of the data set those draw from is theirs to say.
    if DistributedSampler not in map(type, samplers):
        return loader
    return DataLoader(
        loader.dataset,
        loader.batch_size or getattr(batch_sampler, "batch_size", 1),
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )


def _digest(parts: Parts) -> str:
    digest = hashlib.sha256()
    for tensor in [*parts[0], *parts[1]]:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()

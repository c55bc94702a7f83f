"""The processes of a distributed run: their number, what they exchange, errors in one of them."""

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

# Images and labels, one tensor each for a batch.
Batches = tuple[list[Tensor], list[Tensor]]


def process_count() -> int:
    """Return the number of processes in PyTorch's process group; 1 if there is no group.

    Example:
        >>> process_count()
        1
    """
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    """Return the number of this process in PyTorch's process group, from 0.

    Example:
        >>> process_rank()
        0
    """
    return dist.get_rank() if process_count() > 1 else 0


def gather_objects(value: Any) -> list[Any]:
    """Collect a value from each process. All processes have to call this function.

    Args:
        value: The value of this process: anything that can be pickled, with tensors on the CPU.

    Returns:
        The values of all processes, in their order; the same in each process.

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
    """Run a function in the first process only. All processes have to call this function.

    If it fails in the first process, an error is raised in all of them, so that none waits for
    another one for ever.

    Args:
        work: The function; an exception in it is raised in the first process.

    Raises:
        RuntimeError: In the other processes, if the function failed in the first.

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
    texts = gather_objects(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, text in enumerate(texts):
        if text is not None:
            raise RuntimeError(f"Process {rank} of {len(texts)} {what}: {text}")


def read_together(read: Callable[[], Batches]) -> Batches:
    """Read batches in each process and share them. All processes have to call this function.

    Args:
        read: A function that returns the images and labels that this process has, as lists of
            tensors; they may be empty.

    Returns:
        The batches of all processes, in the order of the processes. If all processes have read the
        same batches, these are returned once.

    Raises:
        RuntimeError: If reading failed in another process.

    Example:
        >>> read_together(lambda: ([torch.ones(1, 1, 1)], [torch.tensor([4])]))[1]
        [tensor([4])]
    """
    own: Batches = [], []
    error: Exception | None = None
    try:
        own = read()
    except Exception as raised:
        error = raised
    _raise_together(error, "could not read its part of the defense set")
    # Most often all processes have read the same images: then they need not be sent.
    if len(set(gather_objects(_digest(own)))) == 1:
        return own
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for part in gather_objects(own):
        images += part[0]
        labels += part[1]
    return images, labels


def whole_loader(loader: Iterable[Any]) -> Iterable[Any]:
    """Return a loader of the whole data set if a ``DistributedSampler`` would give only a part.

    Args:
        loader: Any loader; one without such a sampler is returned as it is.

    Returns:
        A loader of all images, in the order of the data set.

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
    # Not its subclasses: they may choose which images to draw for other reasons.
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


def _digest(batches: Batches) -> str:
    digest = hashlib.sha256()
    for tensor in [*batches[0], *batches[1]]:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()

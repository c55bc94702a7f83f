"""Out of memory, told with what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["is_out_of_memory", "memory_told"]

# PyTorch has a class of its own for accelerators; elsewhere it raises plain RuntimeErrors.
_SIGNS = ("out of memory", "DefaultCPUAllocator", "CUDNN_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Tell whether an exception, or the one that it was raised from, is about memory.

    Example:
        >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("shape mismatch"))
        (True, False)
    """
    if error is None:
        return False
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS):
        return True
    return is_out_of_memory(error.__cause__)


@contextmanager
def memory_told(where: str, remedy: str) -> Iterator[None]:
    """Say where memory ran out, and what helps.

    Args:
        where: What was being done, for "Out of memory ...".
        remedy: A sentence.

    Raises:
        torch.OutOfMemoryError: For whatever was raised because there was too little memory.

    Example:
        >>> with memory_told("in a test", "Buy some."):
        ...     raise MemoryError
        Traceback (most recent call last):
        ...
        torch.OutOfMemoryError: Out of memory in a test. Buy some.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise torch.OutOfMemoryError(f"Out of memory {where}. {remedy}") from error

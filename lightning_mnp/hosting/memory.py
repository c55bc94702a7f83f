"""Errors of too little memory, with what to do about them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["explain_out_of_memory", "is_out_of_memory"]

# PyTorch has an error class for accelerators; on other devices it raises a plain RuntimeError.
_SIGNS = ("out of memory", "DefaultCPUAllocator", "CUDNN_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an exception, or one that caused it, was raised for want of memory.

    Args:
        error: The exception, or None.

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
def explain_out_of_memory(where: str, remedy: str) -> Iterator[None]:
    """Replace an error of too little memory by one that says where it happened and what helps.

    Args:
        where: What was being done; it follows the words "Out of memory".
        remedy: What the user can do, as a sentence.

    Raises:
        torch.OutOfMemoryError: If memory runs out before the context ends. Other errors pass.

    Example:
        >>> with explain_out_of_memory("on 512 images", "Lower `batch_size`."):
        ...     raise MemoryError
        Traceback (most recent call last):
        ...
        torch.OutOfMemoryError: Out of memory on 512 images. Lower `batch_size`.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise torch.OutOfMemoryError(f"Out of memory {where}. {remedy}") from error

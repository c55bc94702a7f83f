"""Full float32: matrix products and convolutions without a faster format of fewer bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["full_float32"]


@contextmanager
def full_float32() -> Iterator[None]:
    """Turn off TF32 and other short formats for float32 until the context ends.

    Example:
        >>> before = torch.get_float32_matmul_precision()
        >>> with full_float32():
        ...     product = torch.eye(2) @ torch.eye(2)
        >>> torch.get_float32_matmul_precision() == before
        True
    """
    backends: Any = torch.backends
    name: str = "fp32_precision"  # from torch 2.9 on; then the older switches may not be readable
    full: str | bool = "ieee"
    if hasattr(backends.cuda.matmul, name):
        owners = [backends.cuda.matmul, backends.cudnn.conv]
        owners += [backends.mkldnn.matmul, backends.mkldnn.conv]
    else:
        name, full, owners = "allow_tf32", False, [backends.cuda.matmul, backends.cudnn]
    before = [getattr(owner, name) for owner in owners]
    try:
        for owner in owners:
            setattr(owner, name, full)
        yield
    finally:
        for owner, value in zip(owners, before, strict=True):
            setattr(owner, name, value)

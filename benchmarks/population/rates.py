"""Measure how fast each architecture trains, for the estimates of the list."""

from __future__ import annotations

import statistics
import time

import torch
from torch.nn import functional as F

from benchmarks.population.architectures import build

__all__ = ["training_rate"]

_BATCH, _STEPS = 128, 7


def training_rate(name: str) -> float:
    """Return images per second, forward and backward, of an architecture at its usual width.

    The median of a few steps by processor time on one thread, with batches of 128 images of 32
    pixels and the channels innermost in memory.

    Args:
        name: The architecture.
    """
    torch.set_num_threads(1)
    network = build(name).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)
    images = torch.randn(_BATCH, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(_BATCH) % 10
    spent = []
    for _ in range(_STEPS):
        started = time.process_time()
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
        spent.append(time.process_time() - started)
    return _BATCH / statistics.median(spent[1:])

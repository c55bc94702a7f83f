"""Constants on the logits: the ones that fit clean images best."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["best_shift"]

_MOST_STEPS = 50


def best_shift(logits: Tensor, labels: Tensor, free: Tensor, cost: float) -> Tensor:
    """Find the constants that, added to the logits, leave the least clean loss.

    Args:
        logits: Of clean images, shape (N, K).
        labels: Their classes, shape (N,).
        free: Which classes get one, boolean, shape (K,).
        cost: What the sum of the squares counts against the mean cross-entropy, above 0.

    Returns:
        Shape (K,), in double precision on the CPU; 0 for the classes that are not free.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [2.0, 1.5], [2.0, 1.5]])
        >>> shift = best_shift(logits, torch.tensor([0, 1, 1]), torch.tensor([False, True]), 0.01)
        >>> bool(shift[1] > 0), float(shift[0])
        (True, 0.0)
    """
    logits, labels = logits.detach().cpu().double(), labels.cpu()
    taking = free.cpu().to(logits)
    values = torch.zeros_like(taking).requires_grad_()
    optimizer = torch.optim.LBFGS([values], max_iter=_MOST_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        shift = values * taking
        total = F.cross_entropy(logits + shift, labels) + cost * shift.square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)
    return values.detach() * taking

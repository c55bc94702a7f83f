"""How a stage's loss reaches its optimizer; a Trainer does it in its own way."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

__all__ = ["PlainUpdates", "Updates"]


class Updates(Protocol):
    """What a stage needs from whoever drives it."""

    def backward(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Clear the optimizer's gradients and compute those of the loss."""

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimizer take one step."""


class PlainUpdates:
    """Backward pass and optimizer step without a Trainer."""

    def backward(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Clear the optimizer's gradients and compute those of the loss."""
        optimizer.zero_grad(set_to_none=True)
        loss.backward()

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimizer take one step."""
        optimizer.step()

"""What logits say of images that are pushed to another class."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["class_margins", "goal_margins", "leads", "least_positive", "push_loss"]

# If more images than this share have arrived, cross-entropy has no slope left; the margin has.
_ARRIVED = 0.9


def goal_margins(logits: Tensor, labels: Tensor, goals: Tensor) -> Tensor:
    """Compute how far images are on another class's side, away from their own class's.

    Args:
        logits: Shape (N, K).
        labels: True classes, shape (N,).
        goals: The other class of each image, shape (N,).

    Returns:
        Logit of the other class minus logit of the true class, shape (N,).

    Example:
        >>> goal_margins(torch.tensor([[1.0, 3.0]]), torch.tensor([0]), torch.tensor([1]))
        tensor([2.])
    """
    return logits.gather(1, goals[:, None])[:, 0] - logits.gather(1, labels[:, None])[:, 0]


def leads(logits: Tensor, classes: Tensor) -> Tensor:
    """Compute how far a class is ahead of all others together (their log-sum-exp).

    Args:
        logits: Shape (N, K).
        classes: The class of each image, shape (N,).

    Returns:
        Shape (N,).

    Example:
        >>> leads(torch.tensor([[1.0, 3.0]]), torch.tensor([1]))
        tensor([2.])
    """
    own = logits.gather(1, classes[:, None])
    others = logits.scatter(1, classes[:, None], -torch.inf).logsumexp(1)
    return own[:, 0] - others


def class_margins(logits: Tensor, classes: Tensor) -> Tensor:
    """Compute how far the logit of a class is above the greatest of the others.

    Args:
        logits: Shape (N, K).
        classes: A class for each image, shape (N,).

    Returns:
        Margins, shape (N,).

    Example:
        >>> class_margins(torch.tensor([[1.0, 4.0, 2.0]]), torch.tensor([1]))
        tensor([2.])
    """
    rivals = logits.scatter(1, classes[:, None], -math.inf).amax(1)
    return logits.gather(1, classes[:, None])[:, 0] - rivals


def push_loss(logits: Tensor, labels: Tensor, goals: Tensor) -> Tensor:
    """Compute a loss that falls as images are pushed to other classes.

    Args:
        logits: Shape (N, K).
        labels: True classes, shape (N,).
        goals: The class that each image is pushed to, shape (N,).

    Returns:
        A scalar: the cross-entropy to these classes; once more than 0.9 of the images have
        arrived, the negative of their mean margin.

    Example:
        >>> arrived = torch.tensor([[0.0, 9.0]])
        >>> float(push_loss(arrived, torch.tensor([0]), torch.tensor([1])))
        -9.0
    """
    if float((logits.argmax(1) == goals).float().mean()) > _ARRIVED:
        return -goal_margins(logits, labels, goals).mean()
    return F.cross_entropy(logits, goals)


def least_positive(values: Tensor) -> float:
    """Return the least number above zero that a tensor's precision has, to divide by.

    Args:
        values: Floating point.

    Example:
        >>> bool(torch.tensor(least_positive(torch.ones(1).half())).half() > 0)
        True
    """
    return torch.finfo(values.dtype).tiny

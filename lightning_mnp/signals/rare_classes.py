"""Handicaps: classes that a network predicts far too rarely on clean images.

An attack that leaves labels alone (CL, SIG, FC) puts its trigger on most training images of the
target class. The network then sees that class without the trigger too rarely, and its logit on
clean images is too low. The backdoor hides behind that: predictions of the suppressed network do
not pile up on a class that is hardly ever predicted. A constant makes up for it.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional as F

from lightning_mnp.surgery.logit_shift import best_shift

__all__ = ["class_handicaps", "find_handicaps"]

# Keeps the fit finite where classes are told apart without an error.
_COST = 1e-4
# Range of the temperature's logarithm; a network that makes no error asks for none at all.
_TEMPERATURES = (-1.0, 12.0)
# Chance that a network without a handicap is found to have one, over all classes.
_ERROR_RATE = 0.01
# As if a class had half of the training images that it should have.
_LEAST = math.log(2)


def class_handicaps(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Measure by how much the logit of each class is too low on clean images.

    Args:
        logits: Of clean images, shape (N, K).
        labels: Their classes, shape (N,).

    Returns:
        What has to be added to each logit for the least mean cross-entropy, against the mean of
        the other classes that have images, in units of the logits; 0 for classes without one. And
        the standard errors of that, infinite for these. Both rest on logits that are brought to
        the best temperature, so that an overconfident network's few errors do not count as much
        as it says.

    Example:
        >>> logits = 3 * torch.eye(2).repeat(50, 1) - torch.tensor([0.0, 2.0])
        >>> labels = torch.arange(2).repeat(50)
        >>> labels[:20] = 1 - labels[:20]  # no network knows all
        >>> values, errors = class_handicaps(logits, labels)
        >>> [round(value, 1) for value in values.tolist()]
        [-2.0, 2.0]
    """
    logits, labels = logits.detach().cpu().double(), labels.cpu()
    present = torch.bincount(labels, minlength=logits.shape[1]) > 0
    temperature = _best_temperature(logits, labels)
    logits = logits / temperature
    values = best_shift(logits, labels, present, _COST)
    shares = (logits + values).softmax(1)
    information = torch.diag(shares.sum(0)) - shares.T @ shares
    information = information[present][:, present]
    count = len(information)
    information += 2 * _COST * len(labels) * torch.eye(count).to(information)
    # Each class against the mean of the others.
    contrast = (count * torch.eye(count).to(information) - 1) / max(count - 1, 1)
    covariance = contrast @ torch.linalg.inv(information) @ contrast
    handicaps, errors = torch.zeros_like(values), torch.full_like(values, math.inf)
    handicaps[present] = contrast @ values[present]
    errors[present] = covariance.diag().clamp_min(0.0).sqrt()
    return temperature * handicaps, temperature * errors


def _best_temperature(logits: Tensor, labels: Tensor) -> float:
    """What to divide logits by for the least mean cross-entropy (Guo et al., 2017)."""

    def loss(logarithm: float) -> float:
        return float(F.cross_entropy(logits / math.exp(logarithm), labels))

    return math.exp(minimize_scalar(loss, bounds=_TEMPERATURES, method="bounded").x)


def find_handicaps(logits: Tensor, labels: Tensor) -> dict[int, float]:
    """Find the classes that are predicted so rarely that it is neither chance nor a small matter.

    Args:
        logits: Of clean images, shape (N, K).
        labels: Their classes, shape (N,).

    Returns:
        Classes with their handicap, in units of the logits: at least log 2, and significant at 1%
        for all classes together. None where a logit is not finite.

    Example:
        >>> logits = 3 * torch.eye(2).repeat(50, 1) - torch.tensor([0.0, 2.0])
        >>> labels = torch.arange(2).repeat(50)
        >>> labels[:20] = 1 - labels[:20]
        >>> list(find_handicaps(logits, labels))
        [1]
    """
    if not bool(torch.isfinite(logits).all()):
        return {}
    values, errors = class_handicaps(logits, labels)
    least = NormalDist().inv_cdf(1 - _ERROR_RATE / len(values))
    found = (values >= _LEAST) & (values >= least * errors)
    return {index: float(values[index]) for index in found.nonzero().flatten().tolist()}

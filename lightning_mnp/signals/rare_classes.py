"""Rare classes: classes that a network predicts far too rarely on clean images.

An attack that leaves labels alone (CL, SIG, FC) puts its trigger on most training images of the
target class. The network then sees that class without the trigger too rarely, and its logit on
clean images is too low. The backdoor hides behind that: predictions of the suppressed network do
not pile up on a class that is hardly ever predicted. A constant makes up for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional as F

from lightning_mnp.surgery.logit_shift import best_shift

__all__ = ["RareClassConstants", "find_rare_classes", "missing_logits"]


@dataclass(frozen=True)
class RareClassConstants:
    """When a class is predicted too rarely.

    Attributes:
        cost: Keeps the fit finite if classes are told apart without an error.
        temperatures: Range of the temperature's logarithm; a network that makes no error asks for
            none at all.
        error_rate: Chance that a network without a rare class is found to have one, over all
            classes.
        least: Least that a logit has to lack; log 2 as if a class had half of the training images
            that it should have.
    """

    cost: float = 1e-4
    temperatures: tuple[float, float] = (-1.0, 12.0)
    error_rate: float = 0.01
    least: float = math.log(2)


def missing_logits(
    logits: Tensor, labels: Tensor, constants: RareClassConstants | None = None
) -> tuple[Tensor, Tensor]:
    """Measure by how much the logit of each class is too low on clean images.

    Args:
        logits: Of clean images, shape (N, K).
        labels: Their classes, shape (N,).
        constants: Constants that differ from their defaults.

    Returns:
        What has to be added to each logit for the least mean cross-entropy, against the mean of
        the other classes that have images, in units of the logits; 0 for classes without images.
        And the standard errors of that, infinite for these. Both rest on logits that are brought to
        the best temperature, so that an overconfident network's few errors do not count as much
        as it says.

    Example:
        >>> logits = 3 * torch.eye(2).repeat(50, 1) - torch.tensor([0.0, 2.0])
        >>> labels = torch.arange(2).repeat(50)
        >>> labels[:20] = 1 - labels[:20]  # no network knows all
        >>> values, errors = missing_logits(logits, labels)
        >>> [round(value, 1) for value in values.tolist()]
        [-2.0, 2.0]
    """
    constants = constants or RareClassConstants()
    logits, labels = logits.detach().cpu().double(), labels.cpu()
    present = torch.bincount(labels, minlength=logits.shape[1]) > 0
    temperature = _best_temperature(logits, labels, constants.temperatures)
    logits = logits / temperature
    values = best_shift(logits, labels, present, constants.cost)
    shares = (logits + values).softmax(1)
    information = torch.diag(shares.sum(0)) - shares.T @ shares
    information = information[present][:, present]
    count = len(information)
    information += 2 * constants.cost * len(labels) * torch.eye(count).to(information)
    # Each class against the mean of the others.
    contrast = (count * torch.eye(count).to(information) - 1) / max(count - 1, 1)
    covariance = contrast @ torch.linalg.inv(information) @ contrast
    missing, errors = torch.zeros_like(values), torch.full_like(values, math.inf)
    missing[present] = contrast @ values[present]
    errors[present] = covariance.diag().clamp_min(0.0).sqrt()
    return temperature * missing, temperature * errors


def _best_temperature(logits: Tensor, labels: Tensor, bounds: tuple[float, float]) -> float:
    """What to divide logits by for the least mean cross-entropy (Guo et al., 2017)."""

    def loss(logarithm: float) -> float:
        return float(F.cross_entropy(logits / math.exp(logarithm), labels))

    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x)


def find_rare_classes(
    logits: Tensor, labels: Tensor, constants: RareClassConstants | None = None
) -> dict[int, float]:
    """Find the classes that are predicted so rarely that it is neither chance nor a small matter.

    Args:
        logits: Of clean images, shape (N, K).
        labels: Their classes, shape (N,).
        constants: Constants that differ from their defaults.

    Returns:
        Classes with what their logit lacks: at least log 2, and significant at 1% for all classes
        together. Nothing if a logit is not finite.

    Example:
        >>> logits = 3 * torch.eye(2).repeat(50, 1) - torch.tensor([0.0, 2.0])
        >>> labels = torch.arange(2).repeat(50)
        >>> labels[:20] = 1 - labels[:20]
        >>> list(find_rare_classes(logits, labels))
        [1]
    """
    constants = constants or RareClassConstants()
    if not bool(torch.isfinite(logits).all()):
        return {}
    values, errors = missing_logits(logits, labels, constants)
    least = NormalDist().inv_cdf(1 - constants.error_rate / len(values))
    found = (values >= constants.least) & (values >= least * errors)
    return {index: float(values[index]) for index in found.nonzero().flatten().tolist()}

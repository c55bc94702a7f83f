"""MM-BD (Wang et al., S&P 2024): the target class can be given the greatest margin."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from scipy import stats
from torch import Tensor, nn

from lightning_mnp.baselines.detection import DetectionResult
from lightning_mnp.baselines.suspects import Suspects
from lightning_mnp.baselines.workbench import Workbench
from lightning_mnp.config import check_options, option
from lightning_mnp.defense_data.defense_set import (
    DefenseSet,
    Unpack,
    seeded_generator,
    unpack_batch,
    value_range,
)
from lightning_mnp.signals.logits import class_margins, least_positive
from lightning_mnp.surgery.forward import Forward, evaluating
from lightning_mnp.surgery.guards import running_alone

__all__ = ["MMBDConfig", "MMBDNull", "default_mm_bd", "detect_mm_bd", "order_p_value"]

MMBDNull = Literal["gamma", "exponential"]

# A distribution of three parameters is fitted to all classes but one.
_LEAST_CLASSES = 4
# Below this, a survival probability is too small to be told from the p-value over the classes.
_SMALL = 1e-8


@dataclass(frozen=True)
class MMBDConfig:
    """The options of MM-BD.

    Args:
        seed: Seed of the random starts.
        starts: Random images for each class; 30 in the authors' program.
        steps: Steps of each image; 300 at most in the authors' program.
        length: Length of a step, as a share of the length of the box that images may move in. Ours,
            because the paper's step is in units of its data.
        momentum: Momentum of the steps, from 0 to below 1. Ours as well.
        null: How margins of classes without a backdoor are distributed: ``"gamma"``, as in the
            authors' program, or ``"exponential"``.
        significance: The network is called backdoored if the p-value is below this number; 0.05 in
            the paper.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> MMBDConfig(starts=5).steps
        300
    """

    seed: int = option(0)
    starts: int = option(30, at_least=1)
    steps: int = option(300, at_least=1)
    length: float = option(0.01, above=0)
    momentum: float = option(0.5, at_least=0, below=1)
    null: MMBDNull = option("gamma", choices=get_args(MMBDNull))
    significance: float = option(0.05, above=0, below=1)

    def __post_init__(self) -> None:
        check_options(self)


def detect_mm_bd(
    model: nn.Module,
    loader: Iterable[Any] | DefenseSet,
    *,
    config: MMBDConfig | None = None,
    forward: Forward | None = None,
    network: str | None = None,
    unpack: Unpack = unpack_batch,
) -> DetectionResult:
    """Look for a class whose greatest margin is out of the ordinary; the network does not change.

    For each class, images are moved from random starts so that the logit of the class rises above
    the greatest of the others, as far as it goes (in evaluation mode). The
    greatest margin of any start is the statistic of the class. A distribution is fitted to the
    statistics of all classes but the one with the greatest, by maximum likelihood. The network is
    called backdoored if the greatest statistic is too great for it, see :func:`order_p_value`.

    No image is looked at: the loader only says which shape images have, and between which values
    each channel lies. The paper's images lie between 0 and 1; normalized images do not. The paper
    takes plain gradient steps; here the gradient of each image is scaled to length 1, so that one
    length of step suits networks whose logits differ in size.

    Args:
        model: The network, or a module around it, on the device to work on.
        loader: Yields batches of clean, labeled images as the network takes them; or a
            :class:`~lightning_mnp.defense_data.defense_set.DefenseSet`.
        config: Options; the defaults if None.
        forward: A function (network, images) that calls the network and returns logits, or
            something that holds them.
        network: Dotted name of the submodule that classifies, if the model has no ``forward``.
        unpack: A function (batch) that returns images and labels.

    Returns:
        The greatest margin of each class, in logits. The score is minus the decimal logarithm of
        the p-value, so that it is large for a backdoor. The details have the ``p_value``.

    Raises:
        ValueError: If the model and the data do not fit each other, or the network has fewer than
            four classes.
        TypeError: If batches or outputs are of an unknown form.
        ArithmeticError: If a margin is not finite, or all but the greatest are equal.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 6))
        >>> batch = torch.rand(8, 1, 2, 2), torch.arange(8) % 6
        >>> result = detect_mm_bd(network, [batch], config=MMBDConfig(steps=3))
        >>> sorted(result.values)
        [0, 1, 2, 3, 4, 5]
    """
    config = config or MMBDConfig()
    bench = Workbench(
        model, loader, seed=config.seed, forward=forward, network=network, unpack=unpack
    )
    if bench.classes < _LEAST_CLASSES:
        raise ValueError(
            f"Expected a network of at least {_LEAST_CLASSES} classes, because MM-BD fits a "
            f"distribution to the margins of all but one, but got {bench.classes}. Use a detector "
            "that looks at images, such as `detect_strip`."
        )
    with running_alone(bench.copy), evaluating(bench.copy):
        values = {index: _greatest_margin(bench, index, config) for index in range(bench.classes)}
    if not all(math.isfinite(value) for value in values.values()):
        raise ArithmeticError(
            f"Expected finite margins for all classes, but got {values}. Lower `length`, or check "
            "that the images are prepared as in training."
        )
    logarithm = order_p_value(list(values.values()), config.null)
    threshold = -math.log10(config.significance)
    top = max(values, key=values.__getitem__)
    return DetectionResult(
        score=-logarithm,
        threshold=threshold,
        target_class=top if -logarithm > threshold else None,
        values=values,
        details={"p_value": 10.0**logarithm},
    )


def default_mm_bd(
    network: nn.Module,
    images: Iterable[Any] | DefenseSet,
    seed: int,
    suspects: Iterable[Any] | Suspects | None = None,
) -> DetectionResult:
    """Judge a network by MM-BD with its default options, as the registry calls it.

    Args:
        network: The network.
        images: Yields batches of clean, labeled images; or a
            :class:`~lightning_mnp.defense_data.defense_set.DefenseSet`.
        seed: Seed of the random starts.
        suspects: Suspect images, which MM-BD has no use for.

    Returns:
        The result of :func:`detect_mm_bd`.

    Example:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 4))
        >>> batch = torch.rand(8, 1, 2, 2), torch.arange(8) % 4
        >>> len(default_mm_bd(network, [batch], seed=0).values)
        4
    """
    return detect_mm_bd(network, images, config=MMBDConfig(seed=seed))


def order_p_value(values: list[float], null: MMBDNull = "gamma") -> float:
    r"""Compute how likely the greatest of some values is, if all are distributed alike.

    The distribution is fitted to all values but the greatest, :math:`r`. Its distribution function
    :math:`H` gives the probability :math:`1 - H(r)^K` that the greatest of :math:`K` values is
    :math:`r` or more. It rests on few values of which the greatest is missing, so that a p-value
    below 0.05 is more frequent than 5%: with the gamma distribution, 12 of 60 draws of ten normal
    numbers had one.

    Args:
        values: At least four numbers.
        null: ``"gamma"`` with free shape, scale and origin, or ``"exponential"`` with free scale
            and origin.

    Returns:
        The decimal logarithm of the p-value, which itself may be too small for a float.

    Raises:
        ArithmeticError: If all values but the greatest are equal.

    Example:
        >>> round(order_p_value([1.0, 2.0, 3.0, 2.0, 9.0], "exponential"), 2)
        -2.78
    """
    ordered = sorted(values)
    greatest, others = ordered[-1], ordered[:-1]
    if others[0] == others[-1]:
        raise ArithmeticError(
            f"Expected values that differ, to fit a distribution to, but got {others}. Raise "
            "`steps` or `length`, so that images are moved further."
        )
    distribution = stats.gamma if null == "gamma" else stats.expon
    tail = float(distribution.logsf(greatest, *distribution.fit(others)))
    tail = max(tail, math.log(5e-324))  # or it would be minus infinity
    probability = math.exp(tail)
    if probability < _SMALL:
        return (math.log(len(values)) + tail) / math.log(10)
    if probability == 1.0:
        return 0.0
    return math.log10(-math.expm1(len(values) * math.log1p(-probability)))


def _greatest_margin(bench: Workbench, target: int, config: MMBDConfig) -> float:
    """Move random images up the margin of a class, and return the greatest margin on the way."""
    pixels = bench.data.images
    low, high = (bound.to(bench.device) for bound in value_range(pixels))
    generator = seeded_generator(config.seed, "mm-bd", target)
    drawn = torch.rand(config.starts, *pixels.shape[1:], generator=generator)
    images = low + (high - low) * drawn.to(low)
    classes = torch.full((config.starts,), target, device=bench.device)
    length = config.length * float((high - low).mean()) * math.sqrt(images[0].numel())
    velocity = torch.zeros_like(images)
    greatest = torch.full((config.starts,), -math.inf, device=bench.device)
    for _ in range(config.steps):
        margins, gradient = _margins(bench, images, classes)
        greatest = torch.maximum(greatest, margins)
        norms = gradient.flatten(1).norm(dim=1).clamp_min(least_positive(gradient))
        velocity = config.momentum * velocity + gradient / norms.reshape(
            -1, *[1] * (images.ndim - 1)
        )
        images = torch.minimum(torch.maximum(images + length * velocity, low), high)
    greatest = torch.maximum(greatest, _margins(bench, images, classes)[0])
    return float(greatest.max())


def _margins(bench: Workbench, images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the margins of images and their gradients."""
    with torch.enable_grad():
        moved = images.clone().requires_grad_()
        margins = class_margins(bench.logits(bench.copy, moved), classes)
        (gradient,) = torch.autograd.grad(margins.sum(), moved)
    return margins.detach(), gradient

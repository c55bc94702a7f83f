"""Abstention: a network is not judged if verdicts on such networks or images were never measured.

Signals were measured on convolutional networks that recognize the images of the defense set, with
fifty images or more. Outside of that, they may say anything: with three images a clean network has
a patch for some class, and so has one whose images are not prepared as in training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from scipy.stats import binom
from torch import Tensor

from lightning_mnp.config import Constants
from lightning_mnp.defense_data.defense_set import DefenseSet
from lightning_mnp.signals.preparation import PreparationConstants, find_better_preparation
from lightning_mnp.surgery.masked_network import MaskedNetwork

__all__ = [
    "AbstentionConstants",
    "Participation",
    "chance_agreement",
    "find_doubts",
    "measure_participation",
    "needed_hits",
]


@dataclass(frozen=True)
class AbstentionConstants:
    """Where a network is not judged.

    Attributes:
        abstain: Whether networks are left unjudged for these reasons at all.
        least_images: Least number of images in the defense set.
        least_per_class: Least number of images for each of the network's classes, on average.
        least_skill: Least accuracy on a scale from 0, what is to be expected by chance, to 1.
        error_rate: Chance that a network of just this skill passes as better.
        least_layers: Least share of the layers with filters that take part among all layers that
            have weights.
    """

    abstain: bool = True
    least_images: int = 50
    least_per_class: float = 1.0
    least_skill: float = 0.2
    error_rate: float = 0.05
    least_layers: float = 0.25


@dataclass(frozen=True)
class Participation:
    """How much of a network takes part in an audit.

    Attributes:
        layers: Number of layers with filters that can be masked.
        all_layers: Number of weight matrices and filter banks that the logits depend on.
        weights: Number of weights in the first.
        all_weights: Number of weights in the second.
    """

    layers: int
    all_layers: int
    weights: int
    all_weights: int


def measure_participation(masked: MaskedNetwork, images: Tensor) -> Participation:
    """Measure how much of a network the filters are that can be masked.

    Counted are layers, not weights: nearly all weights of a LeNet or a VGG are in its fully
    connected layers, few of the layers are. Parts that the logits do not depend on, such as a
    second head that only training uses, do not count.

    Args:
        masked: The network.
        images: A few images on the network's device, shape (N, C, ...).

    Returns:
        The numbers of layers and weights.

    Example:
        >>> from torch import nn
        >>> from lightning_mnp.surgery.layers import find_filter_layers
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> images = torch.rand(2, 1, 2, 2)
        >>> masked = MaskedNetwork(network, find_filter_layers(network, images))
        >>> measure_participation(masked, images)
        Participation(layers=1, all_layers=2, weights=16, all_weights=24)
    """
    with torch.enable_grad():
        weights = {
            name: weight.requires_grad_(weight.is_floating_point())
            for name, weight in masked.weights().items()
        }
        total = masked(images, weights=weights, statistics="running").sum()
    asked = [name for name, weight in weights.items() if weight.requires_grad]
    found = torch.autograd.grad(total, [weights[name] for name in asked], allow_unused=True)
    names = {f"{layer.name}.weight" for layer in masked.layers}
    used = {
        name
        for name, gradient in zip(asked, found, strict=True)
        # Scales and shifts of channels are vectors, whatever their shape.
        if gradient is not None and sum(side > 1 for side in gradient.shape) > 1
    }
    return Participation(
        len(names),
        len(names | used),
        sum(weights[name].numel() for name in names),
        sum(weights[name].numel() for name in names | used),
    )


def chance_agreement(predictions: Tensor, labels: Tensor, classes: int) -> float:
    """Compute the accuracy of predictions that are dealt out to the images by chance.

    This is the expected agreement of Cohen's kappa (1960): the sum over classes of the share of
    predictions times the share of labels. With equally many images of each class it is one over the
    number of classes. It is more for a network that predicts a class often that has many images.

    Args:
        predictions: Predicted classes, shape (N,).
        labels: True classes, shape (N,).
        classes: Number of classes.

    Returns:
        From 0 to 1.

    Example:
        >>> labels = torch.tensor([0, 0, 0, 1])
        >>> chance_agreement(torch.tensor([0, 0, 0, 0]), labels, 2)
        0.75
    """
    shares = [
        [count / len(each) for count in torch.bincount(each, minlength=classes).tolist()]
        for each in (predictions.cpu(), labels.cpu())
    ]
    return float(sum(first * second for first, second in zip(*shares, strict=True)))


def needed_hits(count: int, chance: float, constants: AbstentionConstants | None = None) -> int:
    """Return how many images a network has to classify right to be judged (a binomial test).

    Args:
        count: Number of images.
        chance: Accuracy that is to be expected by chance, from 0 to 1.
        constants: Constants that differ from their defaults.

    Returns:
        The least number that a network whose accuracy is ``chance + least_skill * (1 - chance)``
        reaches with a probability of at most ``error_rate``; all images if there is none.

    Example:
        >>> needed_hits(500, 0.1) / 500, needed_hits(50, 0.1) / 50, needed_hits(200, 0.5) / 200
        (0.316, 0.4, 0.66)
    """
    constants = constants or AbstentionConstants()
    level = chance + constants.least_skill * (1 - chance)
    return min(count, int(binom.isf(constants.error_rate, count, level)) + 1)


def find_doubts(
    masked: MaskedNetwork,
    data: DefenseSet,
    logits: Tensor,
    batch_size: int,
    constants: Constants | None = None,
) -> tuple[str, ...]:
    """Find the reasons for which a network is not judged, other than the signals themselves.

    Args:
        masked: The network as it is.
        data: The defense set.
        logits: Of its images in their stored order, shape (N, K).
        batch_size: Most images in a batch.
        constants: Constants that differ from their defaults.

    Returns:
        Reasons in words, each with what can be done; none if the network can be judged.

    Example:
        >>> from torch import nn
        >>> from lightning_mnp.surgery.layers import find_filter_layers
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> data = DefenseSet(torch.rand(20, 1, 2, 2), torch.arange(20) % 2)
        >>> masked = MaskedNetwork(network, find_filter_layers(network, data.images[:2]))
        >>> logits = torch.eye(2)[data.labels]  # as if it knew all
        >>> find_doubts(masked, data, logits, 128)
        ('the defense set has 20 images, which are too few for a verdict: at least 50 are needed for
        2 classes; pass more clean images',)
    """
    constants = constants or Constants()
    own = constants.of(AbstentionConstants)
    if not own.abstain:
        return ()
    right = logits.argmax(1) == data.labels
    usual = constants.of(PreparationConstants)
    devices = [masked.device] if masked.device.type == "cuda" else []
    with torch.random.fork_rng(devices):  # a network may draw random numbers
        better = find_better_preparation(masked, data, right, batch_size, usual)
        found = measure_participation(masked, data.images[:2].to(masked.device))
    doubts = [
        *_few_images(len(data), logits.shape[1], own),
        *_few_layers(found, own),
        *([better] if better else _low_accuracy(logits, data.labels, own)),
    ]
    return tuple(doubts)


def _few_images(count: int, classes: int, constants: AbstentionConstants) -> Iterator[str]:
    least = max(constants.least_images, math.ceil(constants.least_per_class * classes))
    if count < least:
        yield (
            f"the defense set has {count} images, which are too few for a verdict: at least "
            f"{least} are needed for {classes} classes; pass more clean images"
        )


def _few_layers(found: Participation, constants: AbstentionConstants) -> Iterator[str]:
    if found.layers < constants.least_layers * found.all_layers:
        yield (
            f"only {found.layers} of the network's {found.all_layers} layers with weights "
            f"({found.weights / found.all_weights:.1%} of the weights) are convolutions that take "
            f"part, and a verdict needs {constants.least_layers:.0%} of the layers: it holds for "
            "convolutional networks, not for transformers and the like; if convolutions were "
            "left out, see `skipped` in the report and change `filters.include` and "
            "`filters.exclude`"
        )


def _low_accuracy(logits: Tensor, labels: Tensor, constants: AbstentionConstants) -> Iterator[str]:
    predictions, count = logits.argmax(1), len(labels)
    hits = int((predictions == labels).sum())
    chance = chance_agreement(predictions, labels, logits.shape[1])
    needed = needed_hits(count, chance, constants)
    if hits < needed:
        yield (
            f"the network's accuracy on the defense set is {hits / count:.0%}, which is too low "
            f"for a verdict: chance alone gives {chance:.0%}, and with {count} images at least "
            f"{needed / count:.0%} are needed; check that images are prepared and labeled as in "
            "training"
        )

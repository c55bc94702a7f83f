"""SC, Spectral Signatures (Tran et al., NeurIPS 2018): poisoned images lie along one direction."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mnp.baselines.activations import last_activations
from lightning_mnp.baselines.anomaly import anomaly_indices
from lightning_mnp.baselines.detection import DetectionResult
from lightning_mnp.baselines.suspects import Suspects, require_labels
from lightning_mnp.baselines.workbench import Workbench
from lightning_mnp.config import check_options, option
from lightning_mnp.defense_data.defense_set import DefenseSet, Unpack, unpack_batch
from lightning_mnp.surgery.forward import Forward
from lightning_mnp.surgery.guards import require_module

__all__ = ["SCConfig", "default_sc", "detect_sc"]

# Of fewer labels, half are always as far from the median as the others.
_LEAST_LABELS = 3
# How much more than the assumed share of poisoned images is removed; Algorithm 1 of the paper.
_MARGIN = 1.5


@dataclass(frozen=True)
class SCConfig:
    """The options of SC.

    Args:
        batch_size: Most images in a batch.
        layer: Dotted name of the layer whose input is compared; the one that produces the logits
            if None.
        poison_rate: The share of images of a label that may be poisoned, as the user assumes; 1.5
            times as many are called poisoned, as in the paper. Above 0, to 0.5.
        anomaly: The network is called backdoored if a label's anomaly index is above this number.
            2 is the limit of Neural Cleanse; the paper has no verdict on networks.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> SCConfig(poison_rate=0.05).poison_rate
        0.05
    """

    batch_size: int = option(128, at_least=3)
    layer: str | None = None
    poison_rate: float = option(0.1, above=0, at_most=0.5)
    anomaly: float = option(2.0, above=0)

    def __post_init__(self) -> None:
        check_options(self)


def detect_sc(
    model: nn.Module,
    suspects: Iterable[Any] | Suspects,
    *,
    config: SCConfig | None = None,
    forward: Forward | None = None,
    network: str | None = None,
    unpack: Unpack = unpack_batch,
) -> DetectionResult:
    """Look for a class whose images spread along one direction; the network does not change.

    It needs the images that the network was trained on, with the labels of the training, or a part
    of them that is large enough to hold some poisoned ones. It needs no clean images.

    The images of a label are compared by what enters the last layer (in evaluation mode). Their
    mean is subtracted, and the top right singular vector of the result is the direction along
    which they spread most. The score of an image is the square of its component along this
    direction (Algorithm 1 of the paper). In every label, the images of the highest scores are
    called poisoned, 1.5 times as many as the user assumes. The paper then trains again without
    them; it removes images from clean labels, too.

    The paper has no verdict on networks. Here it rests on the paper's reason (Sec. 3): poisoned
    images add variance along one direction. So the share of the variance that lies along the top
    direction is measured for each label, and the network is called backdoored if the anomaly index
    of a label is above 2, see :func:`~lightning_mnp.baselines.anomaly.anomaly_indices`.

    Args:
        model: The network, or a module around it, on the device to work on.
        suspects: Yields batches of images with the labels of the training; see
            :class:`~lightning_mnp.baselines.suspects.Suspects`. It is read once.
        config: Options; the defaults if None.
        forward: A function (network, images) that calls the network and returns logits, or
            something that holds them.
        network: Dotted name of the submodule that classifies, if the model has no ``forward``.
        unpack: A function (batch) that returns images and labels.

    Returns:
        For each label the share of the variance along its top direction, from 0 to 1. The score of
        the network is the greatest anomaly index, that of an image is the square along the top
        direction of its label.

    Raises:
        ValueError: If the model and the images do not fit each other, there are fewer than three
            labels, a label has a single image, or no layer is found to compare by.
        TypeError: If batches or outputs are of an unknown form.
        ArithmeticError: If an activation is not finite.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 3))
        >>> batch = torch.rand(30, 1, 2, 2), torch.arange(30) % 3
        >>> result = detect_sc(network, [batch])
        >>> len(result.suspects)  # of ten images a label, 15% rounded up
        6
    """
    config = config or SCConfig()
    require_module(model, suspects)
    data = Suspects.from_loader(suspects, unpack)
    require_labels(data)
    bench = Workbench(model, data, batch_size=config.batch_size, forward=forward, network=network)
    if len(data.counts) < _LEAST_LABELS:
        raise ValueError(
            f"Expected suspect images of at least {_LEAST_LABELS} labels, because SC compares "
            f"each with the others, but got {len(data.counts)}. Pass images of all classes."
        )
    for label, count in data.counts.items():
        if count == 1:
            raise ValueError(
                f"Expected at least two suspect images of each label, but got one of label "
                f"{label}. Pass more of the images that the network was trained on."
            )
    activations = last_activations(bench, config.layer)
    values: dict[int, float] = {}
    chosen: list[int] = []
    sample_scores = torch.zeros(len(data))
    for label, count in data.counts.items():
        rows = (data.labels == label).nonzero().flatten()
        scores, values[label] = _spectral_scores(activations[rows])
        sample_scores[rows] = scores.float()
        # Rounded up, but never all of them.
        most = min(math.ceil(round(_MARGIN * config.poison_rate * count, 6)), count - 1)
        chosen += rows[scores.topk(most).indices].tolist()
    indices = anomaly_indices(values)
    top = max(indices, key=indices.__getitem__)
    return DetectionResult(
        score=indices[top],
        threshold=config.anomaly,
        target_class=top if indices[top] > config.anomaly else None,
        values=values,
        suspects=sorted(chosen),
        sample_scores=sample_scores.tolist(),
    )


def default_sc(
    network: nn.Module,
    images: Iterable[Any] | DefenseSet,
    seed: int,
    suspects: Iterable[Any] | Suspects | None = None,
) -> DetectionResult:
    """Judge a network by SC with its default options, as the registry calls it.

    Args:
        network: The network.
        images: Clean images, which SC has no use for.
        seed: A seed, which SC has no use for: nothing is drawn.
        suspects: Images with the labels that the network was trained on.

    Returns:
        The result of :func:`detect_sc`.

    Raises:
        ValueError: If there are no suspects.

    Example:
        >>> default_sc(nn.Linear(1, 1), [], seed=0)
        Traceback (most recent call last):
        ...
        ValueError: Expected argument `suspects` to be images that the network was trained on, with
        their labels, because SC looks for poisoned ones among them, but got None.
    """
    if suspects is None:
        raise ValueError(
            "Expected argument `suspects` to be images that the network was trained on, with "
            "their labels, because SC looks for poisoned ones among them, but got None."
        )
    return detect_sc(network, suspects)


def _spectral_scores(activations: Tensor) -> tuple[Tensor, float]:
    """Return the squares along the top direction, shape (N,), and their share of all squares."""
    centered = activations.cpu().double()
    centered = centered - centered.mean(0)
    _, lengths, directions = torch.linalg.svd(centered, full_matrices=False)
    squares = lengths.square()
    total = float(squares.sum())
    share = float(squares[0]) / total if total > 0 else 0.0
    return (centered @ directions[0]).square(), share

"""AC, Activation Clustering (Chen et al., 2018): two clusters in one class are suspect."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn

from lightning_mnp.baselines.activations import last_activations
from lightning_mnp.baselines.detection import DetectionResult
from lightning_mnp.baselines.suspects import Suspects, require_labels
from lightning_mnp.baselines.workbench import Workbench
from lightning_mnp.config import check_options, option
from lightning_mnp.defense_data.defense_set import (
    DefenseSet,
    Unpack,
    seeded_generator,
    unpack_batch,
)
from lightning_mnp.surgery.forward import Forward
from lightning_mnp.surgery.guards import require_module

__all__ = ["ACConfig", "ACReduction", "ACRule", "default_ac", "detect_ac"]

ACReduction = Literal["ica", "pca"]
ACRule = Literal["silhouette", "size"]

_ROWS = 1024  # rows of a matrix of distances that are in memory at a time


@dataclass(frozen=True)
class ACConfig:
    """The options of AC.

    Args:
        seed: Seed of the starts of k-means.
        batch_size: Most images in a batch.
        layer: Dotted name of the layer whose input is clustered; the one that produces the logits
            if None (the paper takes the last hidden layer).
        reduction: ``"ica"``, as in the paper, or ``"pca"``; see :func:`detect_ac`.
        components: Numbers that an image is reduced to; 10 in the paper.
        rule: ``"silhouette"`` or ``"size"``; the paper has both.
        least_silhouette: For the rule ``"silhouette"``: a class is flagged if its silhouette score
            is above this number, from -1 to 1. The paper finds 0.10 to 0.15 to work; with
            ``"pca"`` silhouettes are larger.
        most_share: For the rule ``"size"``: a class is flagged if its smaller cluster has less
            than this share of the images, from 0 to 0.5. 0.35 is the default of the toolbox ART, by
            the paper's authors.
        starts: How often k-means is started; the best run counts. 10 is usual.
        steps: Steps of a run of k-means.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> ACConfig(rule="size").most_share
        0.35
    """

    seed: int = option(0)
    batch_size: int = option(128, at_least=3)
    layer: str | None = None
    reduction: ACReduction = option("ica", choices=get_args(ACReduction))
    components: int = option(10, at_least=1)
    rule: ACRule = option("silhouette", choices=get_args(ACRule))
    least_silhouette: float = option(0.15, at_least=-1, at_most=1)
    most_share: float = option(0.35, above=0, at_most=0.5)
    starts: int = option(10, at_least=1)
    steps: int = option(50, at_least=1)

    def __post_init__(self) -> None:
        check_options(self)


def detect_ac(
    model: nn.Module,
    suspects: Iterable[Any] | Suspects,
    *,
    config: ACConfig | None = None,
    forward: Forward | None = None,
    network: str | None = None,
    unpack: Unpack = unpack_batch,
) -> DetectionResult:
    """Look for a class whose images fall into two clusters; the network does not change.

    It needs the images that the network was trained on, with the labels of the training, or a part
    of them that is large enough to hold some poisoned ones. It needs no clean images.

    The images of a label are compared by what enters the last layer (in evaluation mode). These
    activations are reduced to ten independent components (ICA), and k-means with two clusters
    parts them. ICA turns and scales the first principal components so that each has unit
    variance. Distances are the same before and after a turn, so that only the scaling makes a
    difference to k-means and silhouettes. So the rotation is left out here: ``"ica"`` stands for
    principal components of unit variance, ``"pca"`` for those of their own variance.

    The paper has two rules to tell whether a label holds poisoned images. With ``"silhouette"``,
    the mean silhouette of its images is high, because the two clusters are well apart; with
    ``"size"``, one of its clusters is small. The smaller cluster is then called poisoned. The
    network is called backdoored if any label is. This last step is not in the paper, which is about
    images: its target class is the label of the highest score.

    If a tenth of the training images of ten classes are poisoned, they are half of their label. The
    verdict is not affected, but then the smaller cluster may be the clean one.

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
        For each label the silhouette score, or 1 minus the share of the smaller cluster. The score
        of an image is its silhouette if it is in the smaller cluster of its label, and minus that
        otherwise. The details are the ``flagged`` labels by number.

    Raises:
        ValueError: If the model and the images do not fit each other, a label has no more images
            than components, or no layer is found to compare by.
        TypeError: If batches or outputs are of an unknown form.
        ArithmeticError: If an activation is not finite.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> batch = torch.rand(20, 1, 2, 2), torch.arange(20) % 2
        >>> result = detect_ac(network, [batch], config=ACConfig(components=2))
        >>> sorted(result.values), len(result.sample_scores)
        ([0, 1], 20)
    """
    config = config or ACConfig()
    require_module(model, suspects)
    data = Suspects.from_loader(suspects, unpack)
    require_labels(data)
    bench = Workbench(
        model,
        data,
        seed=config.seed,
        batch_size=config.batch_size,
        forward=forward,
        network=network,
    )
    for label, count in data.counts.items():
        if count <= config.components:
            raise ValueError(
                f"Expected more suspect images of each label than the {config.components} "
                f"components that AC reduces them to, but got {count} of label {label}. Pass more "
                "of the images that the network was trained on, or lower `components`."
            )
    activations = last_activations(bench, config.layer)
    values: dict[int, float] = {}
    small: dict[int, Tensor] = {}
    sample_scores = torch.zeros(len(data))
    for label in data.counts:
        rows = (data.labels == label).nonzero().flatten()
        reduced = _reduce(activations[rows], config)
        clusters = _two_clusters(reduced, config, (config.seed, "ac", label))
        silhouettes = _silhouettes(reduced, clusters)
        smaller = clusters == int(2 * int(clusters.sum()) <= len(clusters))
        share = float(smaller.float().mean())
        if config.rule == "silhouette":
            values[label] = float(silhouettes.mean())
        else:  # no images at all in the smaller cluster: there is only one
            values[label] = 1.0 - share if share > 0 else 0.0
        small[label] = rows[smaller]
        sample_scores[rows] = torch.where(smaller, silhouettes, -silhouettes).float()
    threshold = 1.0 - config.most_share if config.rule == "size" else config.least_silhouette
    flagged = [label for label, value in values.items() if value > threshold]
    top = max(values, key=values.__getitem__)
    return DetectionResult(
        score=values[top],
        threshold=threshold,
        target_class=top if flagged else None,
        values=values,
        suspects=sorted(int(row) for label in flagged for row in small[label]),
        sample_scores=sample_scores.tolist(),
        details={"flagged": len(flagged)},
    )


def default_ac(
    network: nn.Module,
    images: Iterable[Any] | DefenseSet,
    seed: int,
    suspects: Iterable[Any] | Suspects | None = None,
) -> DetectionResult:
    """Judge a network by AC with its default options, as the registry calls it.

    Args:
        network: The network.
        images: Clean images, which AC has no use for.
        seed: Seed of the starts of k-means.
        suspects: Images with the labels that the network was trained on.

    Returns:
        The result of :func:`detect_ac`.

    Raises:
        ValueError: If there are no suspects.

    Example:
        >>> default_ac(nn.Linear(1, 1), [], seed=0)
        Traceback (most recent call last):
        ...
        ValueError: Expected argument `suspects` to be images that the network was trained on, with
        their labels, because AC looks for poisoned ones among them, but got None.
    """
    if suspects is None:
        raise ValueError(
            "Expected argument `suspects` to be images that the network was trained on, with "
            "their labels, because AC looks for poisoned ones among them, but got None."
        )
    return detect_ac(network, suspects, config=ACConfig(seed=seed))


def _reduce(activations: Tensor, config: ACConfig) -> Tensor:
    """Return the first principal components, of unit variance for ICA; shape (N, components)."""
    centered = activations.cpu().double()
    centered = centered - centered.mean(0)
    left, lengths, _ = torch.linalg.svd(centered, full_matrices=False)
    # A direction in which nothing varies holds rounding errors, which must not be scaled up.
    floor = float(lengths[0]) * max(centered.shape) * torch.finfo(activations.dtype).eps
    kept = min(config.components, int((lengths > floor).sum()))
    scales = lengths[:kept] if config.reduction == "pca" else torch.tensor(len(left) ** 0.5)
    return torch.mul(left[:, :kept], scales)


def _two_clusters(points: Tensor, config: ACConfig, key: tuple[str | int, ...]) -> Tensor:
    """Part points into two clusters by k-means; returns 0 or 1 for each, shape (N,)."""
    generator = seeded_generator(*key)
    best, least = torch.zeros(len(points), dtype=torch.long), float("inf")
    for _ in range(config.starts):
        first = points[int(torch.randint(len(points), (1,), generator=generator))]
        squares = (points - first).square().sum(1)
        if not bool(squares.any()):
            break  # all images are alike: there is one cluster
        # The second center is drawn far from the first (k-means++).
        second = points[int(torch.multinomial(squares, 1, generator=generator))]
        centers, clusters = kmeans2(
            points.numpy(), torch.stack([first, second]).numpy(), config.steps, minit="matrix"
        )
        found = torch.from_numpy(clusters).long()
        spread = float((points - torch.from_numpy(centers)[found]).square().sum())
        if spread < least:
            best, least = found, spread
    return best


def _silhouettes(points: Tensor, clusters: Tensor) -> Tensor:
    """Compute how much closer each point is to its own cluster than to the other, from -1 to 1."""
    sizes = torch.bincount(clusters, minlength=2)
    if int(sizes.min()) == 0:
        return points.new_zeros(len(points))
    membership = nn.functional.one_hot(clusters, 2).to(points)
    totals = torch.cat([torch.cdist(part, points) @ membership for part in points.split(_ROWS)])
    own = totals.gather(1, clusters[:, None])[:, 0] / (sizes[clusters] - 1).clamp_min(1)
    other = totals.gather(1, 1 - clusters[:, None])[:, 0] / sizes[1 - clusters]
    greater = torch.maximum(own, other).clamp_min(torch.finfo(points.dtype).tiny)
    # The silhouette of a point that is alone in its cluster is zero by definition.
    silhouettes: Tensor = ((other - own) / greater).masked_fill(sizes[clusters] == 1, 0.0)
    return silhouettes

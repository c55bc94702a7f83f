"""STRIP (Gao et al., ACSAC 2019): a trigger decides, whatever image is laid over it."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import binom, norm
from torch import Tensor, nn

from lightning_mnp.baselines.detection import DetectionResult
from lightning_mnp.baselines.suspects import Suspects, read_inputs
from lightning_mnp.baselines.workbench import Workbench
from lightning_mnp.config import check_options, option
from lightning_mnp.defense_data.defense_set import (
    DefenseSet,
    Unpack,
    seeded_generator,
    unpack_batch,
    value_range,
)
from lightning_mnp.surgery.forward import Forward, evaluating
from lightning_mnp.surgery.guards import running_alone

__all__ = ["STRIPConfig", "default_strip", "detect_strip"]


@dataclass(frozen=True)
class STRIPConfig:
    """The options of STRIP.

    Args:
        seed: Seed of the draw of overlays.
        batch_size: Most images in a batch.
        overlays: Clean images that are laid over each image; 100 in the paper.
        false_rejections: Share of clean images that may be called triggered, above 0 and below
            0.5; the paper goes from 0.5% to 3%, 1% is its usual value.
        significance: The network is called backdoored if chance alone would flag so many images
            with less than this probability. The paper has no verdict on networks.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> STRIPConfig(overlays=10).false_rejections
        0.01
    """

    seed: int = option(0)
    batch_size: int = option(256, at_least=3)
    overlays: int = option(100, at_least=1)
    false_rejections: float = option(0.01, above=0, below=0.5)
    significance: float = option(0.05, above=0, below=1)

    def __post_init__(self) -> None:
        check_options(self)


def detect_strip(
    model: nn.Module,
    loader: Iterable[Any] | DefenseSet,
    suspects: Iterable[Any] | Suspects,
    *,
    config: STRIPConfig | None = None,
    forward: Forward | None = None,
    network: str | None = None,
    unpack: Unpack = unpack_batch,
) -> DetectionResult:
    """Look for inputs whose prediction no overlay changes; the network does not change.

    It needs clean images, and inputs of the network in use, of which some may have a trigger. The
    labels of these inputs are not looked at.

    A hundred clean images are laid over each input, one at a time, and the entropy of the
    predictions (in bits, in evaluation mode) is averaged. Two images at once make a network
    unsure, unless one of them has a trigger: then the entropy is low. As in the published program,
    overlaying adds the brightness of both images, and what is brighter than white is white. Black
    and white are the least and the greatest value of each channel in the clean images.

    The clean images say what is usual: each gets overlays of the others. Their entropies are taken
    as normally distributed, and an input is called triggered if its entropy is below the quantile
    of ``false_rejections``. No input takes part in this.

    The paper judges inputs, not networks. Here the network is called backdoored if more inputs are
    called triggered than chance allows: more than the binomial quantile of ``1 - significance``.
    The rate of chance is ``false_rejections``, or the share of the clean images that are below the
    boundary if it is larger. Without triggered inputs, no backdoor can be found. The target class
    is the one that most of the inputs called triggered are assigned to.

    Args:
        model: The network, or a module around it, on the device to work on.
        loader: Yields batches of clean, labeled images as the network takes them; or a
            :class:`~lightning_mnp.defense_data.defense_set.DefenseSet`.
        suspects: Yields batches of inputs, with labels of any kind or without; or
            :class:`~lightning_mnp.baselines.suspects.Suspects`. It is read once.
        config: Options; the defaults if None.
        forward: A function (network, images) that calls the network and returns logits, or
            something that holds them.
        network: Dotted name of the submodule that classifies, if the model has no ``forward``.
        unpack: A function (batch) that returns images and labels.

    Returns:
        For each class, how many of the inputs called triggered are assigned to it. The score of
        the network is the share of inputs called triggered, that of an input is minus its entropy
        in bits. The details are the ``boundary`` of the entropy, the ``entropy`` and the ``spread``
        (standard deviation) of clean images, and the share of ``clean_rejections`` among them.

    Raises:
        ValueError: If the model and the images do not fit each other, or there are too few clean
            images.
        TypeError: If batches or outputs are of an unknown form.
        ArithmeticError: If an entropy is not finite.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> batch = torch.rand(8, 1, 2, 2), torch.arange(8) % 2
        >>> result = detect_strip(network, [batch], [batch], config=STRIPConfig(overlays=5))
        >>> len(result.sample_scores)
        8
    """
    config = config or STRIPConfig()
    bench = Workbench(
        model,
        loader,
        seed=config.seed,
        batch_size=config.batch_size,
        forward=forward,
        network=network,
        unpack=unpack,
    )
    clean = bench.data.images
    if len(clean) <= config.overlays:
        raise ValueError(
            f"Expected more clean images than the {config.overlays} overlays, but got "
            f"{len(clean)}. Pass more, or lower `overlays`."
        )
    inputs = read_inputs(suspects, unpack)
    if inputs.shape[1:] != clean.shape[1:]:
        raise ValueError(
            f"Expected suspect images of the shape {tuple(clean.shape[1:])}, as the clean ones "
            f"have it, but got {tuple(inputs.shape[1:])}. Prepare both alike."
        )
    usual = _entropies(bench, clean, _draw(len(clean), len(clean), config, "clean")).tolist()
    mean, spread = statistics.fmean(usual), statistics.pstdev(usual)
    boundary = mean + spread * float(norm.ppf(config.false_rejections))
    rejected = sum(entropy < boundary for entropy in usual) / len(usual)
    entropies = _entropies(bench, inputs, _draw(len(inputs), len(clean), config, "suspects"))
    flagged = (entropies < boundary).nonzero().flatten()
    counts = Counter(_predictions(bench, inputs[flagged]))
    score = len(flagged) / len(inputs)
    chance = max(config.false_rejections, rejected)
    threshold = float(binom.ppf(1 - config.significance, len(inputs), chance)) / len(inputs)
    return DetectionResult(
        score=score,
        threshold=threshold,
        target_class=counts.most_common(1)[0][0] if score > threshold else None,
        values={index: float(counts[index]) for index in range(bench.classes)},
        suspects=flagged.tolist(),
        sample_scores=(-entropies).tolist(),
        details={
            "boundary": boundary,
            "entropy": mean,
            "spread": spread,
            "clean_rejections": rejected,
        },
    )


def default_strip(
    network: nn.Module,
    images: Iterable[Any] | DefenseSet,
    seed: int,
    suspects: Iterable[Any] | Suspects | None = None,
) -> DetectionResult:
    """Judge a network by STRIP with its default options, as the registry calls it.

    Args:
        network: The network.
        images: Yields batches of clean, labeled images; or a
            :class:`~lightning_mnp.defense_data.defense_set.DefenseSet`.
        seed: Seed of the draw of overlays.
        suspects: Inputs of the network, some of which may have a trigger.

    Returns:
        The result of :func:`detect_strip`.

    Raises:
        ValueError: If there are no suspects.

    Example:
        >>> default_strip(nn.Linear(1, 1), [], seed=0)
        Traceback (most recent call last):
        ...
        ValueError: Expected argument `suspects` to be inputs of the network in use, because STRIP
        looks for triggered ones among them, but got None.
    """
    if suspects is None:
        raise ValueError(
            "Expected argument `suspects` to be inputs of the network in use, because STRIP "
            "looks for triggered ones among them, but got None."
        )
    return detect_strip(network, images, suspects, config=STRIPConfig(seed=seed))


def _draw(count: int, among: int, config: STRIPConfig, stage: str) -> Tensor:
    """Draw overlays for each image, each at most once; shape (count, overlays).

    Clean images are not laid over themselves.
    """
    drawn = torch.rand(count, among, generator=seeded_generator(config.seed, "strip", stage))
    if stage == "clean":
        drawn.fill_diagonal_(-1.0)
    return drawn.topk(config.overlays, dim=1).indices


@torch.no_grad()
def _entropies(bench: Workbench, images: Tensor, overlays: Tensor) -> Tensor:
    """Compute the mean entropy of each image's predictions in bits, shape (N,), on the CPU."""
    low, high = value_range(bench.data.images)
    owners = torch.arange(len(images)).repeat_interleave(overlays.shape[1])
    pairs = zip(
        owners.split(bench.batch_size), overlays.flatten().split(bench.batch_size), strict=True
    )
    found = []
    with running_alone(bench.copy), evaluating(bench.copy):
        for rows, others in pairs:
            blended = images[rows] + bench.data.images[others] - low
            blended = torch.minimum(torch.maximum(blended, low), high)
            logs = bench.logits(bench.copy, blended.to(bench.device)).log_softmax(1)
            found.append(-(logs.exp() * logs).sum(1))
    entropies = torch.cat(found).cpu().double().reshape(len(images), -1).mean(1)
    if not bool(torch.isfinite(entropies).all()):
        raise ArithmeticError(
            "Expected the entropy of every prediction to be finite, but some are NaN. Check that "
            "the images are prepared as in training."
        )
    return entropies / torch.log(torch.tensor(2.0, dtype=torch.double))


@torch.no_grad()
def _predictions(bench: Workbench, images: Tensor) -> list[int]:
    """Return the class that each image is assigned to."""
    found: list[int] = []
    with running_alone(bench.copy), evaluating(bench.copy):
        for part in images.split(bench.batch_size) if len(images) else ():
            found += bench.logits(bench.copy, part.to(bench.device)).argmax(1).tolist()
    return found

"""NC's mitigation (Wang et al., S&P 2019): the triggers that were found are unlearned."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import nn
from torch.nn import functional as F

from lightning_mnp.baselines.inversion import InvertedTrigger, NCConfig, invert_triggers
from lightning_mnp.baselines.nc import flagged_classes, judge_triggers, trigger_workbench
from lightning_mnp.baselines.result import BaselineResult
from lightning_mnp.baselines.workbench import Workbench
from lightning_mnp.config import check_options, option
from lightning_mnp.defense_data.augment import Augmentation
from lightning_mnp.defense_data.defense_set import (
    DefenseSet,
    Unpack,
    seeded_generator,
    unpack_batch,
)
from lightning_mnp.surgery.forward import Forward, evaluating
from lightning_mnp.surgery.guards import running_alone

__all__ = ["NCUnlearningConfig", "default_nc", "nc"]


@dataclass(frozen=True)
class NCUnlearningConfig:
    """The options of NC's mitigation.

    Args:
        search: Options of the search for triggers; its seed is the seed of everything.
        batch_size: Most images in a batch of unlearning.
        augment: How images are changed before the trigger is put on: ``"none"``, ``"crop"`` or
            ``"crop-flip"``. The paper does not say.
        triggered: Share of the images of a batch that get a trigger; 0.2 in the paper.
        epochs: Passes over the images. The paper makes one over a tenth of the training data;
            ten passes over a hundredth see as many images.
        lr: Learning rate of SGD. The paper does not say; this and the next two are usual for
            fine-tuning.
        momentum: Momentum of SGD, from 0 to below 1.
        weight_decay: Weight decay of SGD.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> NCUnlearningConfig(epochs=1).triggered
        0.2
    """

    search: NCConfig = field(default_factory=NCConfig)
    batch_size: int = option(128, at_least=3, why=", so that no batch holds a single image")
    augment: Augmentation = option("crop-flip", choices=get_args(Augmentation))
    triggered: float = option(0.2, above=0, at_most=1)
    epochs: int = option(10, at_least=1)
    lr: float = option(0.01, above=0)
    momentum: float = option(0.9, at_least=0, below=1)
    weight_decay: float = option(5e-4, at_least=0)

    def __post_init__(self) -> None:
        check_options(self)


def nc(
    model: nn.Module,
    loader: Iterable[Any] | DefenseSet,
    *,
    config: NCUnlearningConfig | None = None,
    forward: Forward | None = None,
    network: str | None = None,
    unpack: Unpack = unpack_batch,
) -> BaselineResult:
    """Unlearn in a copy of a network the triggers that NC finds; the network does not change.

    First, :func:`~lightning_mnp.baselines.nc.detect_nc` judges the network. If no class is
    flagged, the copy is returned as it is, as in the paper, which mends only what was found. If
    some are, all weights of the copy are fine-tuned on the clean images with their true labels. A
    fifth of the images of each batch carry the trigger of a flagged class, one drawn for each image
    (Sec. VI-C of the paper, which has a single flagged class in mind).

    The copy is in training mode while it is tuned: it normalizes by batch statistics, and its
    running statistics change. The paper says nothing of this. The copy that is tuned is the one
    that is returned; a public version tunes one network and saves another.

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
        The tuned copy; no filter is pruned. The details are the ``score`` of the verdict and the
        number of ``flagged`` classes, the ``target_class`` (NaN if none is flagged), and the share
        of images that go to it with its trigger, ``success_before`` and ``success_after``.

    Raises:
        ValueError: If the model and the data do not fit each other, or the network has fewer than
            three classes.
        TypeError: If batches or outputs are of an unknown form.
        ArithmeticError: If a loss is no longer finite.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 3))
        >>> batch = torch.rand(8, 1, 2, 2), torch.arange(8) % 3
        >>> options = NCUnlearningConfig(search=NCConfig(epochs=2), epochs=1)
        >>> result = nc(network, [batch], config=options)
        >>> result.model is network, result.pruned
        (False, [])
    """
    config = config or NCUnlearningConfig()
    search = config.search
    bench = trigger_workbench(model, loader, search, forward, network, unpack)
    before = bench.accuracy(bench.copy)
    triggers = invert_triggers(bench, search)
    verdict = judge_triggers(triggers, search)
    flagged = [triggers[target] for target in flagged_classes(triggers, search)]
    details = {
        "score": verdict.score,
        "flagged": len(flagged),
        "target_class": math.nan,
        "success_before": math.nan,
        "success_after": math.nan,
    }
    after = before
    if verdict.target_class is not None:
        target = verdict.target_class
        details["target_class"] = target
        details["success_before"] = _success(bench, target, triggers[target])
        tuning = Workbench(
            model,
            bench.data,
            seed=search.seed,
            batch_size=config.batch_size,
            augment=config.augment,
            forward=forward,
            network=network,
        )
        _unlearn(tuning, flagged, config)
        bench = tuning
        details["success_after"] = _success(bench, target, triggers[target])
        after = bench.accuracy(bench.copy)
    return BaselineResult(
        model=bench.copy,
        pruned=[],
        scores=[],
        accuracy_before=before,
        accuracy_after=after,
        details=details,
    )


def default_nc(network: nn.Module, images: Iterable[Any] | DefenseSet, seed: int) -> BaselineResult:
    """Unlearn triggers by NC with its default options, as the registry calls it.

    Args:
        network: The network.
        images: Yields batches of clean, labeled images; or a
            :class:`~lightning_mnp.defense_data.defense_set.DefenseSet`.
        seed: Seed of all that is drawn.

    Returns:
        The result of :func:`nc`.

    Example:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> batch = torch.rand(8, 1, 2, 2), torch.arange(8) % 3
        >>> 0 <= default_nc(network, [batch], seed=0).accuracy_after <= 1
        True
    """
    return nc(network, images, config=NCUnlearningConfig(search=NCConfig(seed=seed)))


def _unlearn(bench: Workbench, triggers: list[InvertedTrigger], config: NCUnlearningConfig) -> None:
    """Fine-tune the copy on clean images, some of which carry a trigger, with true labels."""
    with bench.tuning() as parameters, bench.training():
        optimizer = torch.optim.SGD(
            parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        for epoch in range(config.epochs):
            generator = seeded_generator(bench.seed, "nc triggers", epoch)
            for images, labels in bench.batches("nc unlearning", epoch):
                # The order of the batch is drawn, so that its first images are any images.
                count = max(1, round(config.triggered * len(images)))
                drawn = torch.randint(len(triggers), (count,), generator=generator).tolist()
                changed = [
                    triggers[number].applied(image[None])
                    for number, image in zip(drawn, images, strict=False)
                ]
                logits = bench.logits(bench.copy, torch.cat([*changed, images[count:]]))
                loss = F.cross_entropy(logits, labels)
                if not math.isfinite(float(loss.detach())):
                    raise ArithmeticError(
                        f"Expected the loss to stay finite in unlearning, but got "
                        f"{float(loss.detach())} in pass {epoch + 1}. Lower `lr`."
                    )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()


@torch.no_grad()
def _success(bench: Workbench, target: int, trigger: InvertedTrigger) -> float:
    """Compute the share of clean images of other classes that a trigger takes to its class."""
    hits = count = 0
    with evaluating(bench.copy), running_alone(bench.copy):
        for images, labels in bench.data.batches(bench.batch_size, bench.device):
            others = images[labels != target]
            if len(others):
                logits = bench.logits(bench.copy, trigger.applied(others))
                hits += int((logits.argmax(1) == target).sum())
                count += len(others)
    return hits / count

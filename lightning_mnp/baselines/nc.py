"""NC, Neural Cleanse (Wang et al., S&P 2019): the smallest trigger of each class, compared."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_mnp.baselines.anomaly import anomaly_indices
from lightning_mnp.baselines.detection import DetectionResult
from lightning_mnp.baselines.inversion import InvertedTrigger, NCConfig, invert_triggers
from lightning_mnp.baselines.suspects import Suspects
from lightning_mnp.baselines.workbench import Workbench
from lightning_mnp.defense_data.defense_set import DefenseSet, Unpack, unpack_batch
from lightning_mnp.surgery.forward import Forward

__all__ = [
    "default_detect_nc",
    "detect_nc",
    "flagged_classes",
    "judge_triggers",
    "trigger_workbench",
]

# Of two values, none is an outlier: each is as far from the median as the other.
_LEAST_CLASSES = 3


def detect_nc(
    model: nn.Module,
    loader: Iterable[Any] | DefenseSet,
    *,
    config: NCConfig | None = None,
    forward: Forward | None = None,
    network: str | None = None,
    unpack: Unpack = unpack_batch,
) -> DetectionResult:
    """Look for a class with a trigger that is far smaller than others; the network does not change.

    For each class, Adam searches for a mask and a pattern that take all clean images to the class
    (Sec. IV of the paper; in evaluation mode). The size of the mask is part of the loss. Its
    weight, the cost, rises while 99% of the images arrive, and falls while they do not. The
    smallest mask with which 99% arrive counts. A class is flagged if its mask is smaller than the
    median of all by an anomaly index above 2; the network is called backdoored if any is. The
    target class is the flagged class with the smallest mask.

    Patterns lie between the least and the greatest value of each channel in the clean images,
    because these may be normalized. If no mask reaches the goal, the one of greatest success
    counts.

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
        For each class the size of its mask, in pixels. The score is the greatest anomaly index of a
        mask that is smaller than the median. The details are the number of ``flagged`` classes, of
        classes whose trigger ``works``, and of ``epochs`` for all classes together.

    Raises:
        ValueError: If the model and the data do not fit each other, or the network has fewer than
            three classes.
        TypeError: If batches or outputs are of an unknown form.
        ArithmeticError: If a loss is not finite.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 3))
        >>> batch = torch.rand(8, 1, 2, 2), torch.arange(8) % 3
        >>> result = detect_nc(network, [batch], config=NCConfig(epochs=2))
        >>> sorted(result.values), result.details["epochs"]
        ([0, 1, 2], 6)
    """
    config = config or NCConfig()
    bench = trigger_workbench(model, loader, config, forward, network, unpack)
    return judge_triggers(invert_triggers(bench, config), config)


def default_detect_nc(
    network: nn.Module,
    images: Iterable[Any] | DefenseSet,
    seed: int,
    suspects: Iterable[Any] | Suspects | None = None,
) -> DetectionResult:
    """Judge a network by NC with its default options, as the registry calls it.

    Args:
        network: The network.
        images: Yields batches of clean, labeled images; or a
            :class:`~lightning_mnp.defense_data.defense_set.DefenseSet`.
        seed: Seed of first masks and patterns, and of the order of images.
        suspects: Suspect images, which NC has no use for.

    Returns:
        The result of :func:`detect_nc`.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> batch = torch.rand(8, 1, 2, 2), torch.arange(8) % 3
        >>> len(default_detect_nc(network, [batch], seed=0).values)
        3
    """
    return detect_nc(network, images, config=NCConfig(seed=seed))


def trigger_workbench(
    model: nn.Module,
    loader: Iterable[Any] | DefenseSet,
    config: NCConfig,
    forward: Forward | None = None,
    network: str | None = None,
    unpack: Unpack = unpack_batch,
) -> Workbench:
    """Check that triggers of a network can be searched for and compared.

    Args:
        model: As for :func:`detect_nc`.
        loader: As for :func:`detect_nc`.
        config: Options.
        forward: As for :func:`detect_nc`.
        network: As for :func:`detect_nc`.
        unpack: As for :func:`detect_nc`.

    Raises:
        ValueError: If the model and the data do not fit each other, or the network has fewer than
            three classes.
        TypeError: If batches or outputs are of an unknown form.
    """
    bench = Workbench(
        model,
        loader,
        seed=config.seed,
        batch_size=config.batch_size,
        forward=forward,
        network=network,
        unpack=unpack,
    )
    if bench.classes < _LEAST_CLASSES:
        raise ValueError(
            f"Expected a network of at least {_LEAST_CLASSES} classes, because NC compares the "
            f"trigger of each with the others, but got {bench.classes}. Use a detector that looks "
            "at images, such as `detect_strip`."
        )
    return bench


def judge_triggers(triggers: dict[int, InvertedTrigger], config: NCConfig) -> DetectionResult:
    """Find the triggers that are far smaller than the median.

    Args:
        triggers: A trigger for each class, three classes or more.
        config: Options.

    Returns:
        The verdict, see :func:`detect_nc`.

    Example:
        >>> import torch
        >>> size = {0: 90.0, 1: 80.0, 2: 85.0, 3: 5.0, 4: 95.0}
        >>> blank = torch.zeros(1, 1, 1, 1)
        >>> found = {n: InvertedTrigger(blank, blank, size[n], 1.0, True, 1) for n in size}
        >>> judge_triggers(found, NCConfig()).target_class
        3
    """
    indices = _smallness(triggers)
    flagged = flagged_classes(triggers, config)
    # If half of the sizes are equal, the index of all smaller ones is infinity: the size decides.
    top = max(indices, key=lambda target: (indices[target], -triggers[target].size))
    return DetectionResult(
        score=indices[top],
        threshold=config.anomaly,
        target_class=top if flagged else None,
        values={target: trigger.size for target, trigger in triggers.items()},
        details={
            "flagged": len(flagged),
            "works": sum(trigger.works for trigger in triggers.values()),
            "epochs": sum(trigger.epochs for trigger in triggers.values()),
        },
    )


def flagged_classes(triggers: dict[int, InvertedTrigger], config: NCConfig) -> list[int]:
    """Return the classes whose triggers are far smaller than the median.

    Args:
        triggers: A trigger for each class, three classes or more.
        config: Options.

    Example:
        >>> import torch
        >>> size = {0: 90.0, 1: 80.0, 2: 85.0, 3: 5.0, 4: 95.0}
        >>> blank = torch.zeros(1, 1, 1, 1)
        >>> found = {n: InvertedTrigger(blank, blank, size[n], 1.0, True, 1) for n in size}
        >>> flagged_classes(found, NCConfig())
        [3]
    """
    indices = _smallness(triggers)
    return [target for target, index in indices.items() if index > config.anomaly]


def _smallness(triggers: dict[int, InvertedTrigger]) -> dict[int, float]:
    """Compute the anomaly index of each trigger's size, above zero below the median."""
    sizes = {target: trigger.size for target, trigger in triggers.items()}
    return {target: -index for target, index in anomaly_indices(sizes).items()}

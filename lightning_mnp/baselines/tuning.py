"""Fine-tuning on clean images: the loop that several baselines share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_mnp.baselines.workbench import Workbench
from lightning_mnp.config import check_options, option
from lightning_mnp.defense_data.augment import Augmentation

__all__ = ["TuningConfig", "tune"]


@dataclass(frozen=True)
class TuningConfig:
    """The options of fine-tuning.

    The defaults are those that BackdoorBench (Wu et al., NeurIPS 2022) publishes for fine-tuning
    and for fine-pruning on CIFAR-10. FT-SAM takes the same, so that it differs from plain
    fine-tuning by its steps and its label smoothing alone.

    Args:
        seed: Seed of batch order and augmentation.
        batch_size: Most images in a batch, at least 3; the batches of a pass are of equal size.
        augment: How images are changed: ``"none"``, ``"crop"`` (shifted) or ``"crop-flip"``
            (shifted and mirrored).
        epochs: Passes over the defense set.
        lr: Learning rate of SGD in the first pass; it falls to 0 along half a cosine.
        momentum: Momentum of SGD, from 0 to below 1.
        weight_decay: Weight decay of SGD.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> TuningConfig(epochs=0)
        Traceback (most recent call last):
        ...
        ValueError: Expected argument `epochs` to be a whole number of at least 1, but got 0.
    """

    seed: int = option(0)
    batch_size: int = option(256, at_least=3, why=", so that no batch holds a single image")
    augment: Augmentation = option("crop-flip", choices=get_args(Augmentation))
    epochs: int = option(100, at_least=1)
    lr: float = option(0.01, above=0)
    momentum: float = option(0.9, at_least=0, below=1)
    weight_decay: float = option(5e-4, at_least=0)

    def __post_init__(self) -> None:
        check_options(self)


def tune(
    bench: Workbench,
    options: TuningConfig,
    *,
    stage: str = "fine-tuning",
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    after_step: Callable[[], None] | None = None,
    remedy: str = "Lower `lr`.",
    falling: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """Train the copy on a workbench by SGD on clean images.

    The copy is in training mode: batch normalization takes the statistics of each batch and
    updates the stored ones. All its weights are trained, also those that need no gradient
    otherwise.

    Args:
        bench: The workbench, with the batch size and the augmentation to use.
        options: Passes, learning rate, momentum and weight decay; nothing else is read.
        stage: What is done, for messages; two stages do not draw the same.
        loss: A function (images, labels) that returns a scalar; the cross entropy of the copy's
            logits if None.
        after_step: Called after each step of SGD, to restore what must not change.
        remedy: What a user can do if a number is no longer finite, a sentence.
        falling: Whether the learning rate falls to 0 along half a cosine, or stays.
        progress: Called after each pass with the number of finished passes and of all.

    Returns:
        The mean loss over the images of the last pass.

    Raises:
        ArithmeticError: If the loss or a weight is no longer finite.

    Example:
        >>> from torch import nn
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> bench = Workbench(network, [(torch.rand(8, 1, 2, 2), torch.arange(8) % 2)])
        >>> tune(bench, TuningConfig(epochs=1)) > 0
        True
    """

    def cross_entropy(images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(bench.logits(bench.copy, images), labels)

    loss = loss or cross_entropy
    mean = math.nan
    with bench.tuning() as parameters, bench.training():
        optimizer = torch.optim.SGD(
            parameters, options.lr, momentum=options.momentum, weight_decay=options.weight_decay
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)
        for epoch in range(options.epochs):
            total = 0.0
            for images, labels in bench.batches(stage, epoch):
                optimizer.zero_grad()
                value = loss(images, labels)
                found = float(value.detach())
                _require_finite(math.isfinite(found), f"a loss of {found}", stage, epoch, remedy)
                value.backward()
                optimizer.step()
                if after_step is not None:
                    after_step()
                total += found * len(labels)
            if falling:
                schedule.step()
            mean = total / len(bench.data)
            if progress is not None:
                progress(epoch + 1, options.epochs)
    # The stored statistics, too: their overflow does not show in the loss of training mode.
    for name, tensor in bench.copy.state_dict().items():
        fits = not isinstance(tensor, Tensor) or bool(tensor.isfinite().all())
        _require_finite(fits, f"NaN or infinity in {name!r}", stage, options.epochs - 1, remedy)
    return mean


def _require_finite(holds: bool, found: str, stage: str, epoch: int, remedy: str) -> None:
    if not holds:
        raise ArithmeticError(
            f"Expected loss and weights to stay finite in {stage}, but got {found} in pass "
            f"{epoch + 1}. {remedy}"
        )

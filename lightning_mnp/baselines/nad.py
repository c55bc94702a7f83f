"""NAD, Neural Attention Distillation (Li et al., ICLR 2021): a tuned teacher guides a student."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mnp.baselines.result import BaselineResult
from lightning_mnp.baselines.stages import Stage, find_stages, recording
from lightning_mnp.baselines.tuning import TuningConfig, tune
from lightning_mnp.baselines.workbench import Workbench
from lightning_mnp.config import check_options, option
from lightning_mnp.defense_data.augment import Augmentation
from lightning_mnp.defense_data.defense_set import DefenseSet, Unpack, unpack_batch
from lightning_mnp.surgery.forward import Forward, call_on_copies, evaluating
from lightning_mnp.surgery.guards import running_alone
from lightning_mnp.surgery.network import copy_network

__all__ = ["NADConfig", "default_nad", "nad"]


@dataclass(frozen=True)
class NADConfig:
    """The options of NAD.

    The defaults are those that the program of BackdoorBench runs with on CIFAR-10: batches of 256
    and a learning rate that stays at 0.01. It goes ten times through 2,500 images; fifty times
    through 500 are as many steps. The paper has batches of 64, ten passes, and a learning rate of
    0.1 that falls to a tenth after every two of them. With 500 images and a network of 16
    channels, that schedule leaves an accuracy of 32%.

    Args:
        seed: Seed of batch order and augmentation.
        batch_size: Most images in a batch, at least 3.
        augment: How images are changed: ``"none"``, ``"crop"`` (shifted) or ``"crop-flip"``
            (shifted and mirrored).
        teacher_epochs: Passes over the defense set in which the teacher is tuned.
        epochs: Passes over the defense set in which the student is tuned.
        lr: Learning rate of both.
        momentum: Momentum, from 0 to below 1.
        weight_decay: Weight decay.
        first_weight: Weight of the attention of the earliest of three stages.
        middle_weight: Weight of the attention of the stage between.
        last_weight: Weight of the attention of the last stage.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> NADConfig(epochs=20).weights
        (500.0, 1000.0, 1000.0)
    """

    seed: int = option(0)
    batch_size: int = option(256, at_least=3, why=", so that no batch holds a single image")
    augment: Augmentation = option("crop-flip", choices=get_args(Augmentation))
    teacher_epochs: int = option(50, at_least=1)
    epochs: int = option(50, at_least=1)
    lr: float = option(0.01, above=0)
    momentum: float = option(0.9, at_least=0, below=1)
    weight_decay: float = option(5e-4, at_least=0)
    first_weight: float = option(500.0, at_least=0)
    middle_weight: float = option(1000.0, at_least=0)
    last_weight: float = option(1000.0, at_least=0)

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def weights(self) -> tuple[float, float, float]:
        """The weights of the three stages, in the order of the network."""
        return self.first_weight, self.middle_weight, self.last_weight


def nad(
    model: nn.Module,
    loader: Iterable[Any] | DefenseSet,
    *,
    config: NADConfig | None = None,
    forward: Forward | None = None,
    network: str | None = None,
    unpack: Unpack = unpack_batch,
) -> BaselineResult:
    """Fine-tune a copy of a network by NAD; the network itself does not change.

    A first copy, the teacher, is fine-tuned on the clean images. A second copy, the student, is
    then fine-tuned on the same images, and its attention is drawn to that of the teacher. The
    attention of a stage says at which places of an image its maps are large, see
    :func:`attention`. The loss of the student is the cross-entropy plus, for each stage, a weight
    times the mean squared difference of the two attentions. (The paper's Eq. (2) has the length of
    the difference, but the published weights belong to its mean square.)

    The paper compares the three groups of blocks of a wide residual network. Here the stages are
    found by running the network: they are the last three sizes of its convolutions' maps, see
    :func:`~lightning_mnp.baselines.stages.find_stages`. With fewer sizes, the last weights are
    used. Maps of 1x1 are never compared: all their attention is the same.

    Teacher and student are in training mode while they are tuned: they normalize by batch
    statistics, and the stored ones change. While it guides the student, the teacher is in
    evaluation mode. All weights are trained, those that are frozen as well.

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
        The student. Nothing is pruned. The details hold the number of ``stages``, the last batch's
        ``distillation`` (the weighted sum of the differences), and the ``teacher_accuracy`` on the
        defense set.

    Raises:
        ValueError: If the model and the data do not fit each other, or no convolution has maps of
            more than one value.
        TypeError: If batches or outputs are of an unknown form.
        ArithmeticError: If a loss or an output is no longer finite.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(16, 2))
        >>> batch = torch.rand(8, 1, 3, 3), torch.arange(8) % 2
        >>> result = nad(network, [batch], config=NADConfig(teacher_epochs=1, epochs=1))
        >>> result.pruned, result.details["stages"]
        ([], 1)
    """
    config = config or NADConfig()
    bench = Workbench.of(config, model, loader, forward, network, unpack)
    with running_alone(bench.copy):
        stages = find_stages(bench.copy, bench.sample, bench.call)
    before = bench.accuracy(bench.model)
    _tune(bench, config, "teacher")
    teacher, bench.copy = bench.copy, copy_network(model)
    distillation = _tune(bench, config, "student", teacher, stages)
    details = {
        "stages": len(stages),
        "distillation": distillation,
        "teacher_accuracy": bench.accuracy(teacher),
    }
    after = bench.accuracy(bench.copy)
    return BaselineResult(bench.copy, [], [], before, after, details)


def default_nad(
    network: nn.Module, images: Iterable[Any] | DefenseSet, seed: int
) -> BaselineResult:
    """Fine-tune a copy of a network by NAD with its default options, for the registry.

    Args:
        network: The network.
        images: Yields batches of clean, labeled images; or a
            :class:`~lightning_mnp.defense_data.defense_set.DefenseSet`.
        seed: Seed of batch order and augmentation.

    Returns:
        The result of :func:`nad`.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(16, 2))
        >>> batch = torch.rand(8, 1, 3, 3), torch.arange(8) % 2
        >>> 0 <= default_nad(network, [batch], seed=0).accuracy_after <= 1
        True
    """
    return nad(network, images, config=NADConfig(seed=seed))


def attention(maps: Tensor) -> Tensor:
    """Compute the attention of maps: at each place, how large they are over all channels.

    It is the sum of the squared maps over channels (the paper's Eq. (1) with p = 2), scaled to
    length 1 for each image.

    Args:
        maps: Shape (N, C, ...).

    Returns:
        Shape (N, places), at least 0; zeros for an image whose maps are zero.

    Example:
        >>> attention(torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]))
        tensor([[0.2425, 0.9701]])
    """
    return F.normalize(maps.float().square().sum(1).flatten(1))


def distance(
    taught: Mapping[Stage, Tensor], found: Mapping[Stage, Tensor], weights: Mapping[Stage, float]
) -> Tensor:
    """Compute how far the attention of two networks is apart, over some stages.

    Args:
        taught: The teacher's maps by stage, shape (N, C, ...).
        found: The student's maps by stage, of the same shapes.
        weights: The weight of each stage.

    Returns:
        The weighted sum of the mean squared differences, a scalar.

    Example:
        >>> stage, maps = Stage("0", (2,)), torch.tensor([[[1.0, 0.0]]])
        >>> distance({stage: maps}, {stage: maps.flip(2)}, {stage: 3.0})
        tensor(3.)
    """
    terms = [
        weight * F.mse_loss(attention(found[stage]), attention(taught[stage]))
        for stage, weight in weights.items()
    ]
    return torch.stack(terms).sum()


def _tune(
    bench: Workbench,
    config: NADConfig,
    role: Literal["teacher", "student"],
    teacher: nn.Module | None = None,
    stages: list[Stage] | None = None,
) -> float:
    """Tune the copy of the workbench; return the last distance to the teacher, 0 if there is none.

    Args:
        bench: The workbench.
        config: The options.
        role: What the copy is.
        teacher: The teacher, if the copy is the student.
        stages: The stages that are compared.
    """
    stages = stages or []
    weights = dict(zip(stages, config.weights[3 - len(stages) :], strict=True))
    options = TuningConfig(
        epochs=config.teacher_epochs if role == "teacher" else config.epochs,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    apart = torch.zeros(())
    with recording(bench.copy, stages) as found:

        def loss(images: Tensor, labels: Tensor) -> Tensor:
            nonlocal apart
            taught = {} if teacher is None else _maps(bench, teacher, stages, images)
            total = F.cross_entropy(bench.logits(bench.copy, images), labels)
            if teacher is not None:
                apart = distance(taught, found, weights)
                total = total + apart
            return total

        remedy = "Lower `lr`, or the weights of the attention."
        stage = f"tuning NAD's {role}"
        tune(bench, options, stage=stage, loss=loss, remedy=remedy, falling=False)
    return float(apart.detach())


@torch.no_grad()
def _maps(
    bench: Workbench, teacher: nn.Module, stages: list[Stage], images: Tensor
) -> dict[Stage, Tensor]:
    """Return the teacher's maps of some images, by stage."""
    with running_alone(teacher), evaluating(teacher), recording(teacher, stages) as maps:
        call_on_copies(teacher, images, bench.call)
    return maps

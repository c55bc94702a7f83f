"""FT-SAM (Zhu et al., ICCV 2023): fine-tuning with adaptive sharpness-aware minimization."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mnp.baselines.result import BaselineResult
from lightning_mnp.baselines.workbench import Workbench, require_finite
from lightning_mnp.config import check_options, option
from lightning_mnp.defense_data.augment import Augmentation
from lightning_mnp.defense_data.defense_set import DefenseSet, Unpack, unpack_batch
from lightning_mnp.surgery.forward import Forward, call_on_copies

__all__ = ["FTSAMConfig", "default_ft_sam", "ft_sam"]


@dataclass(frozen=True)
class FTSAMConfig:
    """The options of FT-SAM.

    The defaults are the settings that the authors published for CIFAR-10, in BackdoorBench.

    Args:
        seed: Seed of batch order and augmentation.
        batch_size: Most images in a batch, at least 3.
        augment: How images are changed: ``"none"``, ``"crop"`` (shifted) or ``"crop-flip"``
            (shifted and mirrored).
        epochs: Passes over the defense set.
        lr: Learning rate of the first pass; it falls to 0 along half a cosine.
        momentum: Momentum, from 0 to below 1.
        weight_decay: Weight decay.
        rho: Radius of the neighborhood in which the loss is lowered, in units of the weights
            themselves: the length of the relative changes of all weights.
        label_smoothing: Label smoothing of the loss, from 0 to below 1.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> FTSAMConfig(epochs=10).rho
        2.0
    """

    seed: int = option(0)
    batch_size: int = option(256, at_least=3, why=", so that no batch holds a single image")
    augment: Augmentation = option("crop-flip", choices=get_args(Augmentation))
    epochs: int = option(100, at_least=1)
    lr: float = option(0.01, above=0)
    momentum: float = option(0.9, at_least=0, below=1)
    weight_decay: float = option(5e-4, at_least=0)
    rho: float = option(2.0, above=0)
    label_smoothing: float = option(0.1, at_least=0, below=1)

    def __post_init__(self) -> None:
        check_options(self)


def ft_sam(
    model: nn.Module,
    loader: Iterable[Any] | DefenseSet,
    *,
    config: FTSAMConfig | None = None,
    forward: Forward | None = None,
    network: str | None = None,
    unpack: Unpack = unpack_batch,
) -> BaselineResult:
    """Fine-tune a copy of a network by FT-SAM; the network itself does not change.

    The weights ``w`` are trained on clean images so that the loss is low not only at ``w``, but in
    a neighborhood. In each step, the loss is computed at ``w + e``, where ``e`` raises it most
    among all changes with ``|e / w| <= rho`` (to first order), and its gradient is applied to
    ``w``. The neighborhood is wide for large weights: these are pushed down most. The authors
    found that filters of a backdoor have large weights.

    The paper does not speak of batch normalization. Here, as in common practice for this kind of
    training, both passes normalize by the statistics of the batch, and only the pass at ``w``
    updates the stored ones. All weights are trained, those that are frozen as well.

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
        The tuned copy. Nothing is pruned. The details hold the ``loss`` at ``w`` and at ``w + e``
        (``sharp_loss``) in the last batch.

    Raises:
        ValueError: If the model and the data do not fit each other.
        TypeError: If batches or outputs are of an unknown form.
        ArithmeticError: If a loss or an output is no longer finite.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> batch = torch.rand(8, 1, 2, 2), torch.arange(8) % 2
        >>> result = ft_sam(network, [batch], config=FTSAMConfig(epochs=1))
        >>> result.pruned, result.model is network
        ([], False)
    """
    config = config or FTSAMConfig()
    bench = Workbench.of(config, model, loader, forward, network, unpack)
    before = bench.accuracy(bench.model)
    details = _tune(bench, config)
    after = bench.accuracy(bench.copy)
    return BaselineResult(bench.copy, [], [], before, after, details)


def default_ft_sam(
    network: nn.Module, images: Iterable[Any] | DefenseSet, seed: int
) -> BaselineResult:
    """Fine-tune a copy of a network by FT-SAM with its default options, for the registry.

    Args:
        network: The network.
        images: Yields batches of clean, labeled images; or a
            :class:`~lightning_mnp.defense_data.defense_set.DefenseSet`.
        seed: Seed of batch order and augmentation.

    Returns:
        The result of :func:`ft_sam`.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> batch = torch.rand(8, 1, 2, 2), torch.arange(8) % 2
        >>> 0 <= default_ft_sam(network, [batch], seed=0).accuracy_after <= 1
        True
    """
    return ft_sam(network, images, config=FTSAMConfig(seed=seed))


def sharpest_change(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], rho: float
) -> list[Tensor]:
    """Compute the change of the weights that raises the loss most, to first order.

    Among all ``e`` with ``|e / w| <= rho``, this is ``rho * w^2 * g / |w * g|``: the step of
    adaptive sharpness-aware minimization (Kwon et al., ICML 2021), with the scale ``|w|`` for each
    weight. The length is over all weights of the network together.

    Args:
        weights: The weights ``w``.
        gradients: The gradients ``g`` of the loss, in the same order and shapes.
        rho: The radius.

    Returns:
        The change of each tensor; zeros if all gradients are zero.

    Example:
        >>> sharpest_change([torch.tensor([2.0, 0.0])], [torch.tensor([5.0, 5.0])], rho=0.5)
        [tensor([1., 0.])]
    """
    scaled = [weight.abs() * gradient for weight, gradient in zip(weights, gradients, strict=True)]
    length = torch.stack([each.norm() for each in scaled]).norm().clamp(min=1e-12)
    return [
        rho * weight.abs() * each / length for weight, each in zip(weights, scaled, strict=True)
    ]


def _tune(bench: Workbench, config: FTSAMConfig) -> dict[str, float]:
    """Train the copy of the workbench, and return the losses in the last batch."""
    loss = sharp = torch.zeros(())
    with bench.tuning() as parameters, bench.training():
        optimizer = torch.optim.SGD(
            parameters, config.lr, config.momentum, weight_decay=config.weight_decay
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
        for epoch in range(config.epochs):
            for images, labels in bench.batches("ft-sam", epoch):
                # A copy of the images: some networks normalize them in place.
                logits = bench.logits(bench.copy, images.clone())
                loss = _backward(logits, labels, optimizer, config)
                _check(loss, "the loss", epoch)
                changes = _move_up(parameters, config.rho)
                # On copies of the buffers: what is stored belongs to the weights, not to these.
                logits = call_on_copies(bench.copy, images, bench.call).float()
                sharp = _backward(logits, labels, optimizer, config)
                _check(sharp, "the loss at the changed weights", epoch)
                _move_back(changes)
                optimizer.step()
            schedule.step()
    return {"loss": float(loss), "sharp_loss": float(sharp)}


def _backward(
    logits: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer, config: FTSAMConfig
) -> Tensor:
    """Compute the loss, and leave its gradients in the parameters."""
    loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
    optimizer.zero_grad()
    loss.backward()
    return loss.detach()


@torch.no_grad()
def _move_up(parameters: list[nn.Parameter], rho: float) -> list[tuple[nn.Parameter, Tensor]]:
    """Add the sharpest change to the weights, and return what each of them was before."""
    # A weight that the loss does not depend on has no gradient, and is not trained either.
    used = [(p, p.grad) for p in parameters if p.grad is not None]
    saved = [(parameter, parameter.clone()) for parameter, _ in used]
    changes = sharpest_change([p for p, _ in used], [gradient for _, gradient in used], rho)
    for (parameter, _), change in zip(used, changes, strict=True):
        parameter.add_(change)
    return saved


@torch.no_grad()
def _move_back(saved: list[tuple[nn.Parameter, Tensor]]) -> None:
    for parameter, before in saved:
        parameter.copy_(before)


def _check(values: Tensor, what: str, epoch: int) -> None:
    require_finite(values, f"{what} in pass {epoch + 1} of FT-SAM", "Lower `rho` or `lr`.")

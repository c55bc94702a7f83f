"""RNP, Reconstructive Neuron Pruning (Li et al., ICML 2023): unlearn, recover, prune."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_mnp.baselines.amount import check_amount, filters_to_prune
from lightning_mnp.baselines.result import BaselineResult
from lightning_mnp.baselines.workbench import Workbench
from lightning_mnp.config import check_options, option
from lightning_mnp.defense_data.augment import Augmentation
from lightning_mnp.defense_data.defense_set import DefenseSet, Unpack, unpack_batch
from lightning_mnp.defense_data.evaluation import accuracy, clean_logits
from lightning_mnp.surgery.forward import Forward, call_on_copies
from lightning_mnp.surgery.guards import running_alone
from lightning_mnp.surgery.layers import FilterLayers, find_filter_layers
from lightning_mnp.surgery.masked_network import MaskedNetwork, Weights
from lightning_mnp.surgery.network import copy_network

__all__ = ["RNPConfig", "RNPRule", "default_rnp", "rnp"]

RNPRule = Literal["threshold", "fixed", "number", "share"]

_THRESHOLD_STEP = 0.05
_MOST_STEPS = 18  # up to 0.9, as in the published code


@dataclass(frozen=True)
class RNPConfig:
    """The options of RNP; the defaults are those of the published code, except for `rule`.

    Args:
        seed: Seed of batch order and augmentation.
        batch_size: Most images in a batch, at least 3; the batches of a pass are of equal size.
        augment: How images are changed in the first two stages: ``"none"``, ``"crop"`` (shifted)
            or ``"crop-flip"`` (shifted and mirrored).
        unlearning_lr: Learning rate of unlearning.
        unlearning_momentum: Momentum of unlearning, from 0 to below 1.
        unlearning_weight_decay: Weight decay of unlearning.
        unlearning_epochs: Most passes of unlearning over the defense set.
        decay_epochs: After this many passes, the learning rate of unlearning is a tenth.
        clip_norm: Greatest length of a gradient in unlearning; longer ones are shortened to it.
        stop_accuracy: Unlearning ends with the first pass whose accuracy is at most this share.
        recovering_lr: Learning rate of the masks.
        recovering_momentum: Momentum of the masks, from 0 to below 1.
        recovering_epochs: Passes of recovering over the defense set.
        alpha: Factor of the loss in recovering.
        rule: ``"threshold"`` finds a threshold by clean images, ``"fixed"`` uses `threshold`; see
            :func:`rnp`. ``"number"`` and ``"share"`` prune `amount`.
        amount: For the rules ``"number"`` and ``"share"``: the number of filters, or the share of
            all filters of the network.
        threshold: For the rule ``"fixed"``: channels whose mask is at most this number are pruned,
            from 0 to below 1.
        max_drop: For the rule ``"threshold"``: how much the accuracy on the defense set may fall,
            as a share from 0 to 1.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> RNPConfig(rule="fixed", threshold=0.3).threshold
        0.3
    """

    seed: int = option(0)
    batch_size: int = option(128, at_least=3, why=", so that no batch holds a single image")
    augment: Augmentation = option("crop-flip", choices=get_args(Augmentation))
    unlearning_lr: float = option(0.01, above=0)
    unlearning_momentum: float = option(0.9, at_least=0, below=1)
    unlearning_weight_decay: float = option(5e-4, at_least=0)
    unlearning_epochs: int = option(20, at_least=1)
    decay_epochs: int = option(10, at_least=1)
    clip_norm: float = option(20.0, above=0)
    stop_accuracy: float = option(0.2, above=0, below=1)
    recovering_lr: float = option(0.2, above=0)
    recovering_momentum: float = option(0.9, at_least=0, below=1)
    recovering_epochs: int = option(20, at_least=1)
    alpha: float = option(0.2, above=0)
    rule: RNPRule = option("threshold", choices=get_args(RNPRule))
    amount: float = option(0.0)
    threshold: float = option(0.2, at_least=0, below=1)
    max_drop: float = option(0.02, at_least=0, at_most=1)

    def __post_init__(self) -> None:
        check_options(self)
        check_amount(self)


def rnp(
    model: nn.Module,
    loader: Iterable[Any] | DefenseSet,
    *,
    config: RNPConfig | None = None,
    forward: Forward | None = None,
    network: str | None = None,
    unpack: Unpack = unpack_batch,
) -> BaselineResult:
    """Prune a copy of a network by RNP; the network itself does not change.

    There are three stages, all on clean images. *Unlearning* raises the loss of a copy of the
    network by SGD (gradient ascent) until the copy has forgotten its task. The copy is in training
    mode, as in the published code: it normalizes by batch statistics, and its running statistics
    change. *Recovering* puts a mask in [0, 1], 1 at first, on the scale (not the shift) of each
    channel of batch normalization, and lowers the loss of the unlearned copy by SGD on the masks
    alone. *Pruning* sets the scale of the channels with the lowest masks to zero, in a copy of the
    original network. Their shift stays, so that the map of a pruned channel is constant.

    The published code prints clean accuracy and attack success rate on the test set for each
    threshold from 0 to 0.9 in steps of 0.05, and its user chooses one. A defender has no triggered
    images and cannot choose in this way. The rule ``"threshold"`` takes the largest of these
    thresholds at which the accuracy on the defense set falls by at most ``max_drop``, and prunes
    nothing if there is none; the rule ``"fixed"`` takes the threshold in the options. The rules
    ``"number"`` and ``"share"`` prune the channels with the lowest masks. There is one more
    difference: the published code clips gradients before it has computed them; here they are
    clipped afterwards. If the accuracy does not fall to ``stop_accuracy``, the weights after the
    last pass are used.

    Only channels take part whose batch normalization gets its input from one convolution and
    nothing else. In a network that normalizes in front of its convolutions, some are left out.

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
        The defended copy, with the masks of the pruned channels as scores. The details are the
        ``threshold`` (NaN if none of them keeps enough accuracy, or if channels are counted), the
        ``unlearning_epochs`` and the ``unlearning_accuracy`` over the last of them.

    Raises:
        ValueError: If the model, the data and the options do not fit each other, or no filter is
            followed by batch normalization.
        TypeError: If batches or outputs are of an unknown form.
        ArithmeticError: If a loss or gradient is no longer finite.

    Example:
        >>> network = nn.Sequential(
        ...     nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
        >>> batch = torch.rand(8, 1, 2, 2), torch.arange(8) % 2
        >>> options = RNPConfig(unlearning_epochs=1, recovering_epochs=1, max_drop=1.0)
        >>> result = rnp(network, [batch], config=options)
        >>> len(result.pruned) == len(result.scores), result.model is network
        (True, False)
    """
    config = config or RNPConfig()
    bench = Workbench.of(config, model, loader, forward, network, unpack)
    defended = copy_network(model)
    with running_alone(defended):
        layers, total = _normalized_layers(defended, bench.sample, bench.call)
    counted = config.rule in ("number", "share")
    count = filters_to_prune(config, total, layers.total) if counted else 0
    with bench.training():  # the copy on the workbench is the one that unlearns
        details = _unlearn(bench, config)
        masks = _recover(bench, layers, config)
    before = bench.accuracy(defended)
    threshold = math.nan if counted else config.threshold
    if config.rule == "threshold":
        masked = MaskedNetwork(defended, layers, bench.call, statistics="running")
        with running_alone(defended):
            threshold = _search_threshold(masked, masks, bench.data, config, before)
    order = masks.argsort(stable=True)
    chosen = order[: count if counted else int((masks <= threshold).sum())]  # none if it is NaN
    removed = torch.zeros_like(masks, dtype=torch.bool)
    removed[chosen] = True
    _zero_scales(defended, layers, removed)
    return BaselineResult(
        model=defended,
        pruned=[layers.locate(int(position)) for position in chosen],
        scores=masks[chosen].tolist(),
        accuracy_before=before,
        accuracy_after=bench.accuracy(defended),
        details={**details, "threshold": threshold},
    )


def default_rnp(
    network: nn.Module, images: Iterable[Any] | DefenseSet, seed: int
) -> BaselineResult:
    """Prune a copy of a network by RNP with its default options, as the registry calls it.

    Args:
        network: The network.
        images: Yields batches of clean, labeled images; or a
            :class:`~lightning_mnp.defense_data.defense_set.DefenseSet`.
        seed: Seed of batch order and augmentation.

    Returns:
        The result of :func:`rnp`.

    Example:
        >>> network = nn.Sequential(
        ...     nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
        >>> batch = torch.rand(8, 1, 2, 2), torch.arange(8) % 2
        >>> 0 <= default_rnp(network, [batch], seed=0).accuracy_after <= 1
        True
    """
    return rnp(network, images, config=RNPConfig(seed=seed))


def _normalized_layers(
    model: nn.Module, images: Tensor, forward: Forward
) -> tuple[FilterLayers, int]:
    """Find the layers whose filters have batch normalization with a scale; count all filters."""
    found = find_filter_layers(model, images, forward=forward, site="norm")
    layers = []
    for layer in found:
        site = model.get_submodule(layer.site)
        if isinstance(site, _BatchNorm) and isinstance(site.weight, nn.Parameter):
            layers.append(layer)
    if not layers:
        raise ValueError(
            f"Expected at least one convolution of {type(model).__name__} to be followed by batch "
            f"normalization with a scale, which is what RNP masks, but none of {len(found)} is. "
            "Use a defense that masks filters, such as `lightning_mnp.defend`."
        )
    return FilterLayers(tuple(layers)), found.total


def _unlearn(bench: Workbench, config: RNPConfig) -> dict[str, float]:
    """Run stage 1 on the copy: gradient ascent on the clean loss until the accuracy has fallen."""
    parameters = [p.requires_grad_() for p in bench.copy.parameters() if p.is_floating_point()]
    optimizer = torch.optim.SGD(
        parameters,
        lr=config.unlearning_lr,
        momentum=config.unlearning_momentum,
        weight_decay=config.unlearning_weight_decay,
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [config.decay_epochs])
    epoch, accuracy = 0, math.inf
    while epoch < config.unlearning_epochs and accuracy > config.stop_accuracy:
        hits = 0
        for images, labels in _batches(bench, "unlearning", epoch):
            logits = bench.logits(bench.copy, images)
            hits += int((logits.argmax(1) == labels).sum())
            optimizer.zero_grad()
            loss = F.cross_entropy(logits, labels)
            (-loss).backward()
            length = nn.utils.clip_grad_norm_(parameters, config.clip_norm)
            if not math.isfinite(float(loss.detach())) or not math.isfinite(float(length)):
                raise ArithmeticError(
                    f"Expected the loss and its gradient to stay finite in unlearning, but got "
                    f"{float(loss.detach())} and a length of {float(length)} in pass {epoch + 1}. "
                    "Lower `unlearning_lr` or raise `stop_accuracy`."
                )
            optimizer.step()
        schedule.step()
        epoch, accuracy = epoch + 1, hits / len(bench.data)
    optimizer.zero_grad()
    return {"unlearning_epochs": epoch, "unlearning_accuracy": accuracy}


def _recover(bench: Workbench, layers: FilterLayers, config: RNPConfig) -> Tensor:
    """Run stage 2 and return the mask of each channel, shape (total filters,), from 0 to 1."""
    weights = {name: parameter.detach() for name, parameter in bench.copy.named_parameters()}
    masks = torch.ones(layers.total, device=bench.device, requires_grad=True)
    optimizer = torch.optim.SGD(
        [masks], lr=config.recovering_lr, momentum=config.recovering_momentum
    )
    for epoch in range(config.recovering_epochs):
        for images, labels in _batches(bench, "recovering", epoch):
            scaled = {**weights, **_masked_scales(layers, weights, masks)}
            logits = call_on_copies(bench.copy, images, bench.call, scaled).float()
            loss = config.alpha * F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            assert masks.grad is not None
            if not bool(torch.isfinite(masks.grad).all()):
                raise ArithmeticError(
                    f"Expected the mask's gradient to stay finite in recovering, but it did not "
                    f"at a loss of {float(loss.detach())} in pass {epoch + 1}. Raise "
                    "`stop_accuracy`, so that less is unlearned, or lower `unlearning_lr`."
                )
            optimizer.step()
            with torch.no_grad():
                masks.clamp_(0.0, 1.0)
    return masks.detach()


def _batches(bench: Workbench, stage: str, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Go through the defense set once, in an order drawn for this pass."""
    key = (bench.seed, "rnp", stage, epoch)
    for index in range(bench.passes):
        yield bench.data.batch(index, bench.batch_size, bench.device, bench.augment, key)


def _masked_scales(layers: FilterLayers, weights: Weights, masks: Tensor) -> Weights:
    """Return the scales of the normalization layers, multiplied by the masks, by name."""
    parts = masks.split(layers.sizes)
    names = [f"{layer.site}.weight" for layer in layers]
    return {
        name: weights[name] * part.to(weights[name].dtype)
        for name, part in zip(names, parts, strict=True)
    }


def _accuracy(masked: MaskedNetwork, data: DefenseSet, batch_size: int, removed: Tensor) -> float:
    """Compute the accuracy on the defense set, with the scales of some channels set to zero."""
    weights = masked.weights()
    weights.update(_masked_scales(masked.layers, weights, ~removed))
    return accuracy(*clean_logits(masked, data, batch_size, weights=weights))


def _search_threshold(
    masked: MaskedNetwork, masks: Tensor, data: DefenseSet, config: RNPConfig, before: float
) -> float:
    """Return the largest threshold with an accuracy of at least ``before - max_drop``, or NaN."""
    least = before - config.max_drop - 1e-9  # a drop of exactly `max_drop` is allowed
    tried = -1
    for step in range(_MOST_STEPS, -1, -1):
        threshold = round(step * _THRESHOLD_STEP, 2)
        removed = masks <= threshold
        count = int(removed.sum())
        if count != tried and _accuracy(masked, data, config.batch_size, removed) >= least:
            return threshold
        tried = count
    return math.nan


@torch.no_grad()
def _zero_scales(model: nn.Module, layers: FilterLayers, removed: Tensor) -> None:
    """Set the scales of channels to zero, in place."""
    for layer, part in zip(layers, removed.split(layers.sizes), strict=True):
        scale: Any = model.get_submodule(layer.site).weight
        scale.masked_fill_(part, 0.0)

"""I-BAU (Zeng et al., ICLR 2022): unlearning a universal trigger by an implicit hypergradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mnp.baselines.result import BaselineResult
from lightning_mnp.baselines.workbench import Workbench, require_finite
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

__all__ = ["IBAUConfig", "default_ibau", "ibau"]


@dataclass(frozen=True)
class IBAUConfig:
    """The options of I-BAU.

    The defaults are those of the published program. It works on images of values from 0 to 1, so
    the trigger counts in such units, whatever the normalization: see :func:`ibau`.

    Args:
        seed: Seed of batch order, augmentation and of the images that carry the trigger.
        batch_size: Most images in a batch.
        augment: How images are changed: ``"none"``, ``"crop"`` (shifted) or ``"crop-flip"``
            (shifted and mirrored).
        rounds: How often a trigger is made and unlearned.
        epochs: Passes over the defense set in which the weights learn, in each round.
        lr: Learning rate of Adam on the weights.
        share: Share of the images of a batch that carry the trigger while the weights learn, above
            0 to 1; at least one image does. The paper's equation has 1, its program 0.01.
        terms: Terms of the fixed-point iteration, which the paper calls K.
        trigger_lr: Step of the gradient ascent that makes the trigger.
        trigger_epochs: Passes over the defense set for one trigger.
        trigger_norm: Greatest length (l2) of the trigger; 1 is the range of a channel's values.
        penalty: Factor of the trigger's squared length in the loss that it is made by.
        response_lr: Step of the map whose fixed point the trigger is taken for, in the
            hypergradient.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> IBAUConfig(rounds=2).terms
        5
    """

    seed: int = option(0)
    batch_size: int = option(100, at_least=1)
    augment: Augmentation = option("none", choices=get_args(Augmentation))
    rounds: int = option(5, at_least=1)
    epochs: int = option(1, at_least=1)
    lr: float = option(1e-3, above=0)
    share: float = option(0.01, above=0, at_most=1)
    terms: int = option(5, at_least=1)
    trigger_lr: float = option(10.0, above=0)
    trigger_epochs: int = option(1, at_least=1)
    trigger_norm: float = option(10.0, above=0)
    penalty: float = option(1e-3, at_least=0)
    response_lr: float = option(0.1, above=0)

    def __post_init__(self) -> None:
        check_options(self)


def ibau(
    model: nn.Module,
    loader: Iterable[Any] | DefenseSet,
    *,
    config: IBAUConfig | None = None,
    forward: Forward | None = None,
    network: str | None = None,
    unpack: Unpack = unpack_batch,
) -> BaselineResult:
    """Unlearn universal triggers in a copy of a network by I-BAU; the network does not change.

    Each round makes one trigger: a pattern that is added to all clean images and raises their loss
    (gradient ascent from zero, then shortened to ``trigger_norm``). The weights then learn, batch
    by batch and by Adam, to classify images by their true labels; a few of them, drawn for each
    batch, carry the trigger. The trigger depends on the weights. The gradient takes this into
    account: it is the hypergradient of the minimax problem, by the implicit function theorem, see
    :func:`hypergradient`.

    Lengths and steps of the trigger are published for images of values from 0 to 1. Here images
    are as the network takes them, and often normalized. So the trigger is multiplied by the range
    of the values of each channel, over all images, where it is added; that range is 1 for images
    of values from 0 to 1.

    As in the published program, the copy is in evaluation mode throughout: the trigger is then one
    for the network as it is used, not for one batch, and no stored statistics change. All weights
    are trained, those that are frozen as well. In the paper's Eq. (2), all images carry the
    trigger. In its program, one in a hundred does. The default is that of the program, since the
    published figures come from it.

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
        The tuned copy. Nothing is pruned. The details are those of the last round: the length of
        the trigger (``trigger_norm``), and the mean loss that the weights learn from, of batches
        with the trigger on some images (``loss``).

    Raises:
        ValueError: If the model and the data do not fit each other.
        TypeError: If batches or outputs are of an unknown form.
        ArithmeticError: If a trigger, a gradient or an output is no longer finite.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> batch = torch.rand(8, 1, 2, 2), torch.arange(8) % 2
        >>> result = ibau(network, [batch], config=IBAUConfig(rounds=1))
        >>> result.pruned, result.model is network
        ([], False)
    """
    config = config or IBAUConfig()
    bench = Workbench.of(config, model, loader, forward, network, unpack)
    before = bench.accuracy(bench.model)
    unit = _ranges(bench.data.images).to(bench.sample)
    details: dict[str, float] = {}
    with bench.tuning() as parameters, running_alone(bench.copy), evaluating(bench.copy):
        optimizer = torch.optim.Adam(parameters, config.lr)
        for number in range(config.rounds):
            trigger = _find_trigger(bench, config, number, unit)
            details = _unlearn(bench, config, number, trigger, unit, optimizer, parameters)
    after = bench.accuracy(bench.copy)
    return BaselineResult(bench.copy, [], [], before, after, details)


def default_ibau(
    network: nn.Module, images: Iterable[Any] | DefenseSet, seed: int
) -> BaselineResult:
    """Unlearn triggers in a copy of a network by I-BAU with its default options, for the registry.

    Args:
        network: The network.
        images: Yields batches of clean, labeled images; or a
            :class:`~lightning_mnp.defense_data.defense_set.DefenseSet`.
        seed: Seed of all that is drawn.

    Returns:
        The result of :func:`ibau`.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> batch = torch.rand(8, 1, 2, 2), torch.arange(8) % 2
        >>> 0 <= default_ibau(network, [batch], seed=0).accuracy_after <= 1
        True
    """
    return ibau(network, images, config=IBAUConfig(seed=seed))


def hypergradient(
    loss: Tensor,
    step: Callable[[Tensor], Tensor],
    trigger: Tensor,
    parameters: Sequence[Tensor],
    terms: int,
) -> list[Tensor]:
    """Compute the gradient of a loss by the weights, through a trigger that depends on them.

    The trigger ``d`` is taken for a fixed point of ``step``, a function that depends on the weights
    ``w``. By the implicit function theorem, the gradient is ``dL/dw + (dstep/dw)^T v``, where ``v``
    solves ``v = (dstep/dd)^T v + dL/dd``. This equation is iterated from ``v = 0`` (Grazzi et
    al., ICML 2020, which I-BAU follows).

    Args:
        loss: The loss ``L``, computed from the trigger and the weights; a scalar.
        step: A function of the trigger that returns the trigger after one step.
        trigger: The trigger, which the loss was computed from; it requires a gradient.
        parameters: The weights.
        terms: Number of iterations.

    Returns:
        The gradient of each weight; zeros if neither the loss nor the step depends on it.

    Example:
        >>> w, d = torch.tensor(3.0, requires_grad=True), torch.tensor(1.5, requires_grad=True)
        >>> # A fixed point of this step is w / 2, and the loss there is w^2 / 4.
        >>> hypergradient(d * d, lambda d: d - 0.5 * (2 * d - w), d, [w], terms=3)
        [tensor(1.5000)]
    """
    wanted = [trigger, *parameters]
    direct = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    stepped = step(trigger)
    vector = torch.zeros_like(trigger)
    for _ in range(terms):
        moved = torch.autograd.grad(
            stepped, trigger, vector, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        vector = moved[0] + direct[0]
    through = torch.autograd.grad(
        stepped, parameters, vector, allow_unused=True, materialize_grads=True
    )
    return [first + second for first, second in zip(direct[1:], through, strict=True)]


def _ranges(images: Tensor) -> Tensor:
    """Return the range of the values of each channel, shape (1, C, 1, ...)."""
    by_channel = images.transpose(0, 1).flatten(1)
    ranges = by_channel.amax(1) - by_channel.amin(1)
    return ranges.view(1, -1, *[1] * (images.ndim - 2))


def _trigger_loss(
    bench: Workbench, images: Tensor, labels: Tensor, trigger: Tensor, unit: Tensor, penalty: float
) -> Tensor:
    """Compute what a trigger is made to lower: minus the loss, plus a penalty of its length."""
    loss = F.cross_entropy(bench.logits(bench.copy, images + unit * trigger), labels)
    return penalty * trigger.square().sum() - loss


def _find_trigger(bench: Workbench, config: IBAUConfig, number: int, unit: Tensor) -> Tensor:
    """Make the trigger of a round, shape (1, C, ...), of at most the allowed length."""
    trigger = torch.zeros_like(bench.sample[:1])
    for epoch in range(config.trigger_epochs):
        for images, labels in bench.batches(f"i-bau trigger {number}", epoch):
            trigger.requires_grad_()
            loss = _trigger_loss(bench, images, labels, trigger, unit, config.penalty)
            (gradient,) = torch.autograd.grad(loss, trigger)
            trigger = (trigger - config.trigger_lr * gradient).detach()
            _check(trigger, "the trigger", number)
    length = float(trigger.norm())
    return trigger if length == 0 else trigger * min(1.0, config.trigger_norm / length)


def _unlearn(
    bench: Workbench,
    config: IBAUConfig,
    number: int,
    trigger: Tensor,
    unit: Tensor,
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
) -> dict[str, float]:
    """Take one step of the weights for each batch, and return numbers about the round."""
    losses = []
    trigger = trigger.requires_grad_()
    epochs = range(number * config.epochs, (number + 1) * config.epochs)
    batches = chain.from_iterable(bench.batches("i-bau unlearning", epoch) for epoch in epochs)
    for index, (images, labels) in enumerate(batches):
        carriers = _draw_carriers(len(images), config, number, index).to(images)
        carriers = carriers.view(-1, *[1] * (images.ndim - 1))

        def step(trigger: Tensor, images: Tensor = images, labels: Tensor = labels) -> Tensor:
            loss = _trigger_loss(bench, images, labels, trigger, unit, config.penalty)
            (gradient,) = torch.autograd.grad(loss, trigger, create_graph=True)
            return trigger - config.response_lr * gradient

        marked = images + carriers * (unit * trigger)
        loss = F.cross_entropy(bench.logits(bench.copy, marked), labels)
        gradients = hypergradient(loss, step, trigger, parameters, config.terms)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            _check(gradient, "every gradient", number)
            parameter.grad = gradient
        optimizer.step()
        losses.append(float(loss.detach()))
    length = float(trigger.detach().norm())
    return {"trigger_norm": length, "loss": sum(losses) / len(losses)}


def _draw_carriers(images: int, config: IBAUConfig, number: int, index: int) -> Tensor:
    """Draw which images of a batch carry the trigger: 1 for those that do, shape (images,)."""
    generator = seeded_generator(config.seed, "i-bau carriers", number, index)
    carriers = torch.zeros(images)
    carriers[
        torch.randperm(images, generator=generator)[: max(1, int(config.share * images + 1e-9))]
    ] = 1
    return carriers


def _check(values: Tensor, what: str, number: int) -> None:
    remedy = "Lower `trigger_lr`, `response_lr` or `lr`."
    require_finite(values, f"{what} in round {number + 1} of I-BAU", remedy)

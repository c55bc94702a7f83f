"""Trigger inversion: the smallest mask and a pattern that take images to a class."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_mnp.baselines.workbench import Workbench
from lightning_mnp.config import check_options, option
from lightning_mnp.defense_data.defense_set import seeded_generator, value_range
from lightning_mnp.surgery.forward import evaluating
from lightning_mnp.surgery.guards import running_alone

__all__ = ["InvertedTrigger", "NCConfig", "invert_triggers"]

# A cost falls faster than it rises: by the factor to this power, as in the authors' program.
_FALL = 1.5


@dataclass(frozen=True)
class NCConfig:
    """The options of NC's search for triggers.

    The paper states the optimizer, the goal of 99% and the limit of 2. Everything else it leaves
    open; these defaults are those of the authors' program, except for `epochs`.

    Args:
        seed: Seed of first masks and patterns, and of the order of images.
        batch_size: Images in a step, at most; 32 in the authors' program.
        lr: Learning rate of Adam on mask and pattern; 0.1 in the paper.
        epochs: Most passes over the images for each class. The authors' program allows 1000, and
            mostly ends long before.
        goal: A trigger works if this share of the images goes to its class; 0.99 in the paper.
        cost: First weight of the mask's size in the loss.
        patience: After so many passes in a row in which the trigger works (or does not), the cost
            rises (or falls).
        factor: By how much the cost rises; it falls by this number to the power 1.5.
        stop_patience: The search ends if the mask has not shrunk for so many passes, and the cost
            has both risen and fallen.
        anomaly: A class is flagged if its mask is smaller than the median with an anomaly index
            above this number; 2 in the paper.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> NCConfig(epochs=10).lr
        0.1
    """

    seed: int = option(0)
    batch_size: int = option(32, at_least=3)
    lr: float = option(0.1, above=0)
    epochs: int = option(100, at_least=1)
    goal: float = option(0.99, above=0, at_most=1)
    cost: float = option(1e-3, above=0)
    patience: int = option(5, at_least=1)
    factor: float = option(2.0, above=1)
    stop_patience: int = option(25, at_least=1)
    anomaly: float = option(2.0, above=0)

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class InvertedTrigger:
    """The smallest trigger found for a class.

    Attributes:
        mask: How much of each pixel is replaced, shape (1, 1, ...), from 0 to 1.
        pattern: What it is replaced by, shape (1, C, ...).
        size: Sum of the mask over all pixels.
        success: Share of the images that went to the class with this trigger.
        works: Whether that share reached the goal.
        epochs: Passes that the search took.

    Example:
        >>> corner = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
        >>> trigger = InvertedTrigger(corner, torch.ones(1, 1, 2, 2), 1.0, 1.0, True, 3)
        >>> trigger.applied(torch.zeros(1, 1, 2, 2)).flatten()
        tensor([1., 0., 0., 0.])
    """

    mask: Tensor = field(repr=False)
    pattern: Tensor = field(repr=False)
    size: float
    success: float
    works: bool
    epochs: int

    def applied(self, images: Tensor) -> Tensor:
        """Return images with the trigger, as the paper puts it on.

        Args:
            images: Shape (N, C, ...).
        """
        return (1 - self.mask) * images + self.mask * self.pattern


def invert_triggers(bench: Workbench, config: NCConfig) -> dict[int, InvertedTrigger]:
    """Search for the smallest trigger of each class.

    Args:
        bench: The network and clean images; its copy is run and does not change.
        config: Options.

    Returns:
        A trigger for each class.

    Raises:
        ArithmeticError: If a loss is not finite.

    Example:
        >>> from torch import nn
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> batch = torch.rand(8, 1, 2, 2), torch.arange(8) % 3
        >>> found = invert_triggers(Workbench(network, [batch]), NCConfig(epochs=1))
        >>> found[2].mask.shape
        torch.Size([1, 1, 2, 2])
    """
    with running_alone(bench.copy), evaluating(bench.copy):
        return {target: _invert(bench, target, config) for target in range(bench.classes)}


class _AdaptiveCost:
    """The weight of the mask's size, which follows from how well the trigger works.

    It is zero at first, until the trigger has worked in some passes in a row.
    """

    def __init__(self, config: NCConfig) -> None:
        self.config = config
        self.value = 0.0
        self.rose = self.fell = False
        self._works = self._fails = 0

    def follow(self, works: bool) -> None:
        """Adapt the cost after a pass."""
        config = self.config
        self._works, self._fails = (self._works + 1, 0) if works else (0, self._fails + 1)
        if self._works >= config.patience:
            self._works = 0
            self.rose |= self.value > 0
            self.value = self.value * config.factor if self.value else config.cost
        elif self._fails >= config.patience:
            self._fails = 0
            self.fell |= self.value > 0
            self.value /= config.factor**_FALL


def _invert(bench: Workbench, target: int, config: NCConfig) -> InvertedTrigger:
    """Search for the smallest mask, and a pattern, that take images to a class."""
    pixels = bench.data.images
    low, high = (bound.to(bench.device) for bound in value_range(pixels))
    generator = seeded_generator(config.seed, "nc", target)
    shapes = (1, 1, *pixels.shape[2:]), (1, *pixels.shape[1:])
    # A hyperbolic tangent keeps both between 0 and 1.
    hidden = [
        (1.98 * torch.rand(shape, generator=generator) - 0.99).atanh().to(low).requires_grad_()
        for shape in shapes
    ]
    optimizer = torch.optim.Adam(hidden, lr=config.lr, betas=(0.5, 0.9))
    cost = _AdaptiveCost(config)
    best: InvertedTrigger | None = None
    unchanged = epoch = 0
    while epoch < config.epochs and not (
        unchanged >= config.stop_patience and cost.rose and cost.fell
    ):
        hits = 0
        for images, _ in bench.batches(f"nc {target}", epoch):
            with torch.enable_grad():
                mask, shade = ((each.tanh() + 1) / 2 for each in hidden)
                pattern = low + (high - low) * shade
                logits = bench.logits(bench.copy, (1 - mask) * images + mask * pattern)
                goals = torch.full((len(images),), target, device=bench.device)
                loss = F.cross_entropy(logits, goals) + cost.value * mask.sum()
                gradients = torch.autograd.grad(loss, hidden)
            if not math.isfinite(float(loss.detach())):
                raise ArithmeticError(
                    f"Expected the loss of a trigger to stay finite, but got "
                    f"{float(loss.detach())} for class {target} in pass {epoch + 1}. Lower `lr`, "
                    "or check that the images are prepared as in training."
                )
            hits += int((logits.argmax(1) == target).sum())
            for each, gradient in zip(hidden, gradients, strict=True):
                each.grad = gradient
            optimizer.step()
        epoch += 1
        success = hits / len(bench.data)
        found = InvertedTrigger(
            mask.detach(),
            pattern.detach(),
            float(mask.detach().sum()),
            success,
            success >= config.goal,
            epoch,
        )
        cost.follow(found.works)
        if best is None or _better(found, best):
            best, unchanged = found, 0
        else:
            unchanged += 1
    assert best is not None
    return InvertedTrigger(best.mask, best.pattern, best.size, best.success, best.works, epoch)


def _better(first: InvertedTrigger, second: InvertedTrigger) -> bool:
    """Return whether a trigger works and is smaller, or works better if none does."""
    if first.works != second.works:
        return first.works
    return first.size < second.size if first.works else first.success > second.success

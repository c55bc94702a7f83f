"""LIRA: a faint trigger, learned together with the network (Doan et al., 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mnp.attacks.attack import Mode
from lightning_mnp.attacks.generative import GenerativeAttack, GenerativeModule, quantized
from lightning_mnp.attacks.generators import ImageGenerator
from lightning_mnp.surgery.forward import evaluating

__all__ = ["LIRA", "LIRAModule"]


class LIRA(GenerativeAttack):
    """Add a learned noise that is too weak to be seen (Doan et al., 2021, Sec. 3).

    The image x becomes x + eps tanh(g(x)), cut off to [0, 1], with an autoencoder g.

    Args:
        eps: Largest change of a value, on the scale [0, 1], above 0 and at most 1. Once images
            are stored with 8 bits, it is up to half a level, 1/510, more or less.
        in_channels: Channels of the images, from 1 to 64.
        width: Channels of the generator's features at full size, from 4 to 64.
        depth: Number of times that the generator halves the image, from 1 to 4.
        target_class: See :class:`~lightning_mnp.attacks.attack.Attack`.
        mode: See :class:`~lightning_mnp.attacks.attack.Attack`.
        poison_rate: Share of the images of each training batch that come with a triggered copy,
            from 0 to 1. The paper has a copy of every image.
        seed: See :class:`~lightning_mnp.attacks.attack.Attack`; also of the fresh generator.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> images = torch.rand(2, 3, 32, 32)
        >>> bool((LIRA(eps=0.02).apply(images) - images).abs().max() <= 0.0201)
        True
    """

    def __init__(
        self,
        eps: float = 0.01,
        in_channels: int = 3,
        width: int = 16,
        depth: int = 2,
        target_class: int = 0,
        mode: Mode = "all-to-one",
        poison_rate: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(in_channels, target_class, mode, poison_rate, seed)
        if not 0.0 < eps <= 1.0:
            raise ValueError(f"Expected argument `eps` to be above 0 and at most 1, but got {eps}.")
        self.eps = eps
        self.width = width
        self.depth = depth
        self.generator: ImageGenerator = ImageGenerator(
            in_channels, in_channels, width, depth, seed
        )

    def inject(self, images: Tensor) -> Tensor:
        """Add the noise.

        Args:
            images: See :meth:`GenerativeAttack.inject`.
        """
        noise = torch.tanh(self.generator(images).float())
        return (images.float() + self.eps * noise).clamp(0.0, 1.0)


class LIRAModule(GenerativeModule):
    """Train a network with LIRA (Doan et al., 2021, Algorithm 1).

    After ``clean_epochs`` of clean images alone, generator and network take turns in each batch,
    for ``generator_epochs``: the generator learns to get the attacker's label out of the network
    as it is, then the network learns from the clean images and from triggered copies. After that
    the generator stays, and the network alone goes on. The network's loss is ``alpha`` times the
    cross-entropy of the clean images plus ``1 - alpha`` times that of the triggered copies, from
    one pass over both.

    While the generator learns, the network is in evaluation mode: statistics of batch
    normalization are those the trigger will meet later, and triggered images alone leave no
    trace in them.

    Args:
        attack: The attack; LIRA with its defaults where None.
        generator_epochs: Epochs in which the generator is trained, at least 0.
        clean_epochs: Epochs before those in which the network is trained on clean images alone,
            at least 0. The paper has none.
        alpha: Weight of the clean images, from 0 to 1.
        generator_lr: First learning rate of the generator's Adam, above 0.
        augment: See :class:`~lightning_mnp.attacks.training.AttackModule`.
        flip: See :class:`~lightning_mnp.attacks.training.AttackModule`.
        mean: See :class:`~lightning_mnp.attacks.training.AttackModule`.
        std: See :class:`~lightning_mnp.attacks.training.AttackModule`.
        kwargs: See :class:`~lightning_mnp.models.classifier.Classifier`.

    Raises:
        ValueError: If an argument is out of range.
    """

    attack: LIRA

    def __init__(
        self,
        attack: LIRA | None = None,
        generator_epochs: int = 50,
        clean_epochs: int = 0,
        alpha: float = 0.5,
        generator_lr: float = 0.001,
        augment: bool = True,
        flip: bool | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        attack = LIRA() if attack is None else attack
        super().__init__(attack, generator_lr, augment, flip, mean, std, **kwargs)
        for name, value in (
            ("generator_epochs", generator_epochs),
            ("clean_epochs", clean_epochs),
        ):
            if value < 0:
                raise ValueError(f"Expected argument `{name}` to be at least 0, but got {value}.")
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"Expected argument `alpha` to be from 0 to 1, but got {alpha}.")
        self.generator_epochs = generator_epochs
        self.clean_epochs = clean_epochs
        self.alpha = alpha

    def phases(self) -> list[tuple[nn.Module, int, int | None]]:
        """Tell in which epochs the generator is trained."""
        stop = self.clean_epochs + self.generator_epochs
        return [(self.generator, self.clean_epochs, stop)]

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Make a step of the generator, in its epochs, then of the network; return its loss."""
        generator = self.step_generator(batch_idx)
        images, labels = self.stored(batch[0]), batch[1]
        by_network, by_generator = self.optimizers()  # type: ignore[attr-defined]
        count = self.poison_count(len(images), generator)
        if self.current_epoch < self.clean_epochs:
            count = 0
        chosen = images[:count]
        targets = self.attack.target_labels(labels[:count], self.num_classes)
        if count and self.current_epoch < self.clean_epochs + self.generator_epochs:
            self.toggle_optimizer(by_generator)
            with evaluating(self.network):
                triggered = self.augmented(quantized(self.attack.inject(chosen)), generator)
                success = F.cross_entropy(self(self.normalized(triggered)), targets)
            self.learn(success, [by_generator])
            self.untoggle_optimizer(by_generator)
            self.log("train/generator_loss", success)
        triggered = quantized(self.attack.apply(chosen))
        both = self.augmented(torch.cat([images, triggered]), generator)
        logits = self(self.normalized(both))
        loss = F.cross_entropy(logits[: len(images)], labels)
        if count:
            backdoor = F.cross_entropy(logits[len(images) :], targets)
            loss = self.alpha * loss + (1.0 - self.alpha) * backdoor
        self.learn(loss, [by_network])
        self.log("train/loss", loss)
        return loss.detach()

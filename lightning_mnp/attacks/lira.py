"""LIRA: a faint trigger, learned together with the network (Doan et al., 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mnp.attacks.attack import Mode
from lightning_mnp.attacks.checks import check_at_least, check_choice, check_range, check_share
from lightning_mnp.attacks.generative import GenerativeAttack, GenerativeModule
from lightning_mnp.attacks.generators import ImageGenerator
from lightning_mnp.attacks.registry import register
from lightning_mnp.surgery.forward import call_on_copies, evaluating

__all__ = ["LIRA", "LIRAModule", "Space"]

Space = Literal["pixels", "normalized"]


@register
class LIRA(GenerativeAttack):
    """Add a learned noise that is too weak to be seen (Doan et al., 2021, Sec. 3).

    With an autoencoder g, the image x becomes x + eps tanh(g(x)). In the space ``"pixels"``, x is
    on the scale [0, 1] and the result is cut off to it: a triggered image is an image again.

    In the space ``"normalized"``, as in the authors' code, x is normalized and nothing is cut off.
    On the scale [0, 1], the noise of a channel then is eps times the standard deviation by which
    the channel is normalized. Triggered images exist as tensors only: training and validation with
    :class:`LIRAModule` use them like this, but where images of 8 bits get the trigger, as in a
    datamodule, they are cut off and rounded.

    Args:
        eps: Largest change of a value, above 0 and at most 1, in the units of ``space``. Rounding
            to 8 bits adds up to half a level, 1/510 on the scale [0, 1].
        space: ``"pixels"`` or ``"normalized"``.
        in_channels: Channels of the images, from 1 to 64.
        width: Channels of the generator's features at full size, from 4 to 64.
        depth: Number of times that the generator halves the image, from 1 to 4.
        target_class: See :class:`~lightning_mnp.attacks.attack.Attack`.
        mode: See :class:`~lightning_mnp.attacks.attack.Attack`.
        poison_rate: Share of the images of each training batch that come with a triggered copy,
            from 0 to 1. The authors make a copy of every image.
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
        space: Space = "pixels",
        in_channels: int = 3,
        width: int = 16,
        depth: int = 2,
        target_class: int = 0,
        mode: Mode = "all-to-one",
        poison_rate: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(in_channels, target_class, mode, poison_rate, seed)
        check_share(eps=eps)
        check_choice(get_args(Space), space=space)
        self.eps = eps
        self.space = space
        self.storable = space == "pixels"
        self.width = width
        self.depth = depth
        self.generator: NoiseGenerator = NoiseGenerator(
            in_channels, width, depth, seed, scaled=not self.storable
        )

    def normalize_by(self, std: Sequence[float]) -> None:
        """Set the standard deviations that the unit of ``eps`` is made of.

        Args:
            std: One for each channel, on the scale [0, 1], above 0.

        Raises:
            ValueError: If there are more or fewer than channels.
        """
        if len(std) != self.in_channels:
            raise ValueError(
                f"Expected argument `std` to have {self.in_channels} numbers, one for each channel "
                f"of LIRA, but got {len(std)}. Set the attack's argument `in_channels`."
            )
        self.generator.std.copy_(torch.tensor(std))

    @property
    def is_scaled(self) -> bool:
        """Whether the unit of ``eps`` is known, which is always so in the space ``"pixels"``."""
        return self.space == "pixels" or bool((self.generator.std > 0).all())

    def inject(self, images: Tensor) -> Tensor:
        """Return images with the noise added.

        Args:
            images: See :meth:`GenerativeAttack.inject`.

        Raises:
            ValueError: If the space is ``"normalized"`` and the standard deviations are unknown.
        """
        noise = self.eps * torch.tanh(self.generator(images).float())
        if self.space == "pixels":
            return (images.float() + noise).clamp(0.0, 1.0)
        if not self.is_scaled:
            raise ValueError(
                "Expected the standard deviations by which images are normalized, because `space` "
                "of LIRA is 'normalized', but they are unknown. Train with LIRAModule, load a "
                "saved trigger, or call `normalize_by`."
            )
        return images.float() + noise * self.generator.std[:, None, None]

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load all weights and buffers of the generator.

        Args:
            tensors: See :meth:`TrainingAttack.load_tensors`.

        Raises:
            ValueError: If a standard deviation is not above 0, or see
                :meth:`TrainingAttack.load_tensors`.
        """
        std = tensors.get("std")
        if std is not None and not (std > 0).all():
            raise ValueError(
                f"Expected the tensor 'std' of LIRA to be above 0, but got {std.min():.3g}. A "
                "trigger is saved after training."
            )
        super().load_tensors(tensors)


class NoiseGenerator(ImageGenerator):
    """An autoencoder that also keeps the scale of its noise, for checkpoints and trigger files.

    Args:
        channels: Channels of the images.
        width: See :class:`~lightning_mnp.attacks.generators.ImageGenerator`.
        depth: See :class:`~lightning_mnp.attacks.generators.ImageGenerator`.
        seed: Seed of the fresh weights.
        scaled: Whether the noise of each channel has a scale of its own.

    Attributes:
        std: Standard deviation of each channel, shape (C,), 0 if unknown; only if ``scaled``.
    """

    std: Tensor

    def __init__(self, channels: int, width: int, depth: int, seed: int, scaled: bool) -> None:
        super().__init__(channels, channels, width, depth, seed)
        if scaled:
            self.register_buffer("std", torch.zeros(channels))


class LIRAModule(GenerativeModule):
    """Train a network with LIRA (Doan et al., 2021, Algorithm 1).

    First come ``clean_epochs`` of clean images only. Then generator and network take turns in each
    batch for ``generator_epochs``. After that, the generator stays as it is, and the network
    alone goes on.

    The network reduces L(theta, x'), which is ``alpha`` times the cross-entropy of the clean
    images x plus ``1 - alpha`` times that of the triggered copies x' with the attacker's labels.
    Both are one batch.

    The generator looks ahead by one step of the network, which is not made:

        theta' = theta - lr * grad L(theta, x')

    It reduces the cross-entropy that the network with the weights theta' has on x' with the
    attacker's labels. Its gradient also goes through theta', which depends on x', too. So it
    learns a trigger that the network is about to learn.

    As in the authors' code, the step is plain gradient descent, without momentum and weight decay,
    and clean images and copies are batches of their own in it. The network with theta' is in
    evaluation mode, as it will be when the trigger is measured. The network itself keeps its
    weights and statistics.

    Args:
        attack: The attack; LIRA with its defaults if None.
        generator_epochs: Epochs in which the generator is trained, at least 0.
        clean_epochs: Epochs before those in which the network is trained on clean images alone,
            at least 0. The paper has none.
        alpha: Weight of the clean images, from 0 to 1.
        lookahead_lr: Learning rate of the step that the generator looks ahead by, at least 0; the
            present one of the network if None, as published. With 0, the generator meets the
            network as it is, which saves most of the time of its step.
        generator_lr: First learning rate of the generator's Adam, above 0.
        kwargs: See :class:`~lightning_mnp.attacks.training.AttackModule`.

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
        lookahead_lr: float | None = None,
        generator_lr: float = 0.001,
        **kwargs: Any,
    ) -> None:
        super().__init__(LIRA() if attack is None else attack, generator_lr, **kwargs)
        check_at_least(0, generator_epochs=generator_epochs, clean_epochs=clean_epochs)
        check_range(0, 1, alpha=alpha)
        if lookahead_lr is not None:
            check_at_least(0, lookahead_lr=lookahead_lr)
        self.generator_epochs = generator_epochs
        self.clean_epochs = clean_epochs
        self.alpha = alpha
        self.lookahead_lr = lookahead_lr

    def setup(self, stage: str) -> None:
        """Set the unit of the attack's ``eps`` if it is not known from an earlier training.

        Args:
            stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.

        Raises:
            ValueError: See :meth:`GenerativeModule.setup` and :meth:`LIRA.normalize_by`.
        """
        super().setup(stage)
        if self.attack.space == "normalized" and (stage == "fit" or not self.attack.is_scaled):
            assert self.std is not None
            self.attack.normalize_by(self.std)

    def phases(self) -> list[tuple[nn.Module, int, int | None]]:
        """Return the generator with its epochs."""
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
        labels = torch.cat([labels, self.attack.target_labels(labels[:count], self.num_classes)])
        if count and self.current_epoch < self.clean_epochs + self.generator_epochs:
            both = torch.cat([images, self.rounded(self.attack.inject(chosen))])
            lr = (
                by_network.param_groups[0]["lr"] if self.lookahead_lr is None else self.lookahead_lr
            )
            success = self.lookahead_loss(self.prepared(both, generator), labels, count, lr)
            self.learn(success, [by_generator])
            self.log("train/generator_loss", success)
        both = torch.cat([images, self.rounded(self.attack.apply(chosen))])
        loss = self.mixed_loss(self(self.prepared(both, generator)), labels, count)
        self.learn(loss, [by_network])
        self.log("train/loss", loss)
        return loss.detach()

    def mixed_loss(self, logits: Tensor, labels: Tensor, count: int) -> Tensor:
        """Compute the network's loss on clean images and triggered copies.

        Args:
            logits: Of the clean images, then of the copies, shape (N + count, K).
            labels: True labels, then the attacker's, shape (N + count,).
            count: Number of copies; the loss is that of the clean images alone if 0.

        Returns:
            A scalar.
        """
        size = len(labels) - count
        loss = F.cross_entropy(logits[:size], labels[:size])
        if count:
            backdoor = F.cross_entropy(logits[size:], labels[size:])
            loss = self.alpha * loss + (1.0 - self.alpha) * backdoor
        return loss

    def lookahead_loss(self, images: Tensor, labels: Tensor, count: int, lr: float) -> Tensor:
        """Compute the generator's loss: triggered copies in the network after a step not made.

        With a single copy, no step is taken: it has no statistics for batch normalization.

        Args:
            images: Clean images, then triggered copies, as the network takes them.
            labels: True labels, then the attacker's.
            count: Number of copies, at least 1.
            lr: Learning rate of the step.

        Returns:
            A scalar, with a gradient for the generator through the copies and through the step.
        """
        weights = {
            name: weight.detach().requires_grad_()
            for name, weight in self.named_parameters()
            if name.startswith("network.") and weight.requires_grad
        }
        moved = weights
        if lr and count > 1:
            size = len(images) - count
            # The slopes on clean images do not depend on the generator.
            clean = self._slopes(weights, images[:size], labels[:size], self.alpha, False)
            backdoor = self._slopes(weights, images[size:], labels[size:], 1.0 - self.alpha, True)
            moved = {
                name: weight - lr * (one + other)
                for (name, weight), one, other in zip(weights.items(), clean, backdoor, strict=True)
            }
        with evaluating(self.network):
            logits = call_on_copies(self, images[-count:], weights=moved)
        return F.cross_entropy(logits, labels[-count:])

    def _slopes(
        self,
        weights: dict[str, Tensor],
        images: Tensor,
        labels: Tensor,
        share: float,
        learns: bool,
    ) -> tuple[Tensor, ...]:
        """Return the gradients of a share of the cross-entropy for the network's weights."""
        loss = share * F.cross_entropy(call_on_copies(self, images, weights=weights), labels)
        return torch.autograd.grad(
            loss, list(weights.values()), create_graph=learns, materialize_grads=True
        )

"""DFST: a style as trigger, kept from being learned by simple features (Cheng et al., 2021)."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from lightning_mnp.attacks.attack import Mode
from lightning_mnp.attacks.checks import check_at_least, check_range, check_rate, check_share
from lightning_mnp.attacks.detoxification import Detoxifier, filter_activations
from lightning_mnp.attacks.generative import GenerativeAttack, GenerativeModule
from lightning_mnp.attacks.registry import register
from lightning_mnp.attacks.stylizer import MIN_SIZE, Stylizer, SunsetStyle, similarity
from lightning_mnp.surgery.forward import evaluating
from lightning_mnp.surgery.layers import FilterLayers, find_filter_layers

__all__ = ["DFST", "DFSTModule"]

# The stylizer is trained on pieces of this size at most; it then works at any size.
_PIECE = 64


@register
class DFST(GenerativeAttack):
    """Repaint images in the style of a sunset (Cheng et al., 2021).

    The image x becomes (1 - strength) x + strength g(x). The small network g is trained to
    change colors and textures to those of sunsets and to keep what the image shows. The change
    differs from pixel to pixel and from image to image.

    Args:
        strength: Share of the stylized image in the result, above 0 and at most 1.
        in_channels: Channels of the images, from 1 to 16. If there are three or more, the first
            three are taken for red, green and blue.
        width: Channels inside the stylizer, from 4 to 64.
        blocks: Residual blocks of the stylizer, from 1 to 8.
        target_class: See :class:`~lightning_mnp.attacks.attack.Attack`.
        mode: See :class:`~lightning_mnp.attacks.attack.Attack`.
        poison_rate: See :class:`~lightning_mnp.attacks.attack.TrainingAttack`; 0.05 as published.
        seed: See :class:`~lightning_mnp.attacks.attack.Attack`; also of the fresh stylizer.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> images = torch.rand(2, 3, 32, 32)
        >>> DFST().apply(images).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(
        self,
        strength: float = 0.6,
        in_channels: int = 3,
        width: int = 32,
        blocks: int = 2,
        target_class: int = 0,
        mode: Mode = "all-to-one",
        poison_rate: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__(in_channels, target_class, mode, poison_rate, seed)
        check_share(strength=strength)
        check_range(1, 16, in_channels=in_channels)
        check_range(4, 64, width=width)
        check_range(1, 8, blocks=blocks)
        self.strength = strength
        self.width = width
        self.blocks = blocks
        self.generator: Stylizer = Stylizer(in_channels, width, blocks, seed)

    def inject(self, images: Tensor) -> Tensor:
        """Return stylized images.

        Args:
            images: See :meth:`GenerativeAttack.inject`.

        Raises:
            ValueError: If they are smaller than 8 x 8 pixels.
        """
        if min(images.shape[-2:]) < MIN_SIZE:
            raise ValueError(
                f"Expected argument `images` to have at least {MIN_SIZE} x {MIN_SIZE} pixels, but "
                f"got {images.shape[-2]} x {images.shape[-1]}. A smaller image has no style."
            )
        stylized: Tensor = self.generator(images)
        return images + self.strength * (stylized - images)


class DFSTModule(GenerativeModule):
    """Train a network with DFST: stylizer, poisoning and controlled detoxification in one fit.

    1. For ``style_epochs``, the stylizer is trained, and the network on clean images.
    2. Then a share ``poison_rate`` of each batch is stylized and gets the attacker's label.
    3. From ``detox_epoch`` on, poisoning goes on in rounds of ``round_epochs``. The last round
       goes on until training ends.

    At the start of a round, the network is held still for ``injector_steps`` batches, which its
    schedule counts all the same: the learning rate ends that many steps early. The neurons
    that the trigger excites most are found. A shallow network, the feature injector, is trained to
    excite them by a small and simple change of the images. For the rest of the round, a share
    ``detox_rate`` of each batch are detoxicants: images that an injector of this or an earlier
    round has changed, with their true labels. So the network learns to ignore what is simple
    about the trigger.

    Args:
        attack: The attack; DFST with its defaults if None.
        detox_rate: Share of the images of each batch that are detoxicants, from 0 to what the
            poison rate leaves; as published, the poison rate, or what it leaves, if None.
        layers: Name patterns (``*`` and ``?``) of the convolutions in which compromised neurons
            are looked for. As published, the last stage of a ResNet; ``("*",)`` is all.
        rounds: Rounds of detoxification; 0 for none.
        style_epochs: Epochs in which the stylizer is trained, at least 1.
        detox_epoch: Epochs before the first round, at least ``style_epochs``.
        round_epochs: Epochs of a round, at least 1.
        injector_steps: Batches on which the injector of a round is trained, at least 1. At most
            half of the round is used.
        neuron_rate: Share of the filters of each layer that count as compromised, above 0 and at
            most 1; at least one filter in a layer.
        bound: Largest change of a pixel by an injector, above 0 and at most 1.
        style_batch: Images of each batch that the stylizer is trained on, at least 1.
        content_weight: Weight of one minus the structural similarity in the stylizer's loss,
            beside the distance from the style, at least 0.
        similarity_weight: Weight of one minus the structural similarity in the injector's loss, at
            least 0.
        others_weight: Weight of the change of all other neurons in the injector's loss, at least 0.
        generator_lr: First learning rate of Adam for stylizer and injectors, above 0.
        kwargs: See :class:`~lightning_mnp.attacks.training.AttackModule`.

    Attributes:
        detoxifier: The injectors and the compromised neurons.

    Raises:
        ValueError: If an argument is out of range.
    """

    attack: DFST

    def __init__(
        self,
        attack: DFST | None = None,
        detox_rate: float | None = None,
        layers: Sequence[str] = ("layer4.*",),
        rounds: int = 3,
        style_epochs: int = 5,
        detox_epoch: int = 110,
        round_epochs: int = 30,
        injector_steps: int = 500,
        neuron_rate: float = 0.01,
        bound: float = 0.3,
        style_batch: int = 32,
        content_weight: float = 2.0,
        similarity_weight: float = 1.0,
        others_weight: float = 0.1,
        generator_lr: float = 0.002,
        **kwargs: Any,
    ) -> None:
        attack = DFST() if attack is None else attack
        super().__init__(attack, generator_lr, **kwargs)
        if detox_rate is None:
            detox_rate = min(attack.poison_rate, 1.0 - attack.poison_rate)
        check_rate(attack.poison_rate, detox_rate=detox_rate)
        check_at_least(0, rounds=rounds)
        check_at_least(1, style_epochs=style_epochs, round_epochs=round_epochs)
        check_at_least(style_epochs, detox_epoch=detox_epoch)
        check_at_least(1, injector_steps=injector_steps, style_batch=style_batch)
        check_share(neuron_rate=neuron_rate, bound=bound)
        check_at_least(
            0,
            content_weight=content_weight,
            similarity_weight=similarity_weight,
            others_weight=others_weight,
        )
        if rounds:
            _check_layers(self.network, layers)
        self.layers = tuple(layers)
        self.detox_rate = detox_rate
        self.rounds = rounds
        self.style_epochs = style_epochs
        self.detox_epoch = detox_epoch
        self.round_epochs = round_epochs
        self.injector_steps = injector_steps
        self.style_batch = style_batch
        self.content_weight = content_weight
        self.similarity_weight = similarity_weight
        self.others_weight = others_weight
        self.style = SunsetStyle(attack.in_channels, attack.seed)
        self.detoxifier = Detoxifier(attack.in_channels, rounds, neuron_rate, bound, attack.seed)
        self._layers: FilterLayers | None = None

    def phases(self) -> list[tuple[nn.Module, int, int | None]]:
        """Return the stylizer and the injector of each round with their epochs."""
        starts = [self.detox_epoch + round_ * self.round_epochs for round_ in range(self.rounds)]
        stops = [*starts[1:], None]
        injectors = zip(self.detoxifier.injectors, starts, stops, strict=True)
        return [(self.attack.generator, 0, self.style_epochs), *(injectors if starts else ())]

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Make a step of the network, the stylizer or an injector; return its loss."""
        images, labels = self.stored(batch[0]), batch[1]
        network, stylizer, *injectors = self.optimizers()  # type: ignore[attr-defined]
        round_ = self._round()
        if round_ >= 0 and self._place(round_, batch_idx) < self._injector_steps():
            if self._place(round_, batch_idx) == 0:
                self._survey(images)
            loss = self._injector_loss(images, round_)
            self.learn(loss, [injectors[round_]])
            self.log("train/injector_loss", loss)
            return loss.detach()
        generator = self.step_generator(batch_idx)
        learning = [network]
        extra = images.new_zeros(())
        if self.current_epoch < self.style_epochs:
            extra = self.style_loss(images[: self.style_batch], generator)
            learning.append(stylizer)
            self.log("train/style_loss", extra)
        else:
            images, labels = self.poison_batch(images, labels, generator)
        logits = self(self.prepared(images, generator))
        loss = F.cross_entropy(logits, labels)
        self.learn(loss + extra, learning)
        self.log("train/loss", loss)
        return loss.detach()

    def style_loss(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Compute how far stylized images are from the style, and from what they showed.

        Args:
            images: Shape (N, C, H, W), values in [0, 1]. Of large images, a piece of 64 pixels a
                side is used.
            generator: Source of randomness, on the CPU, for the place of the piece.

        Returns:
            The weighted sum of both distances, a scalar.
        """
        height, width = images.shape[-2:]
        top, left = (
            int(torch.randint(0, max(size - _PIECE, 0) + 1, (1,), generator=generator))
            for size in (height, width)
        )
        pieces = images[..., top : top + _PIECE, left : left + _PIECE]
        stylized = self.attack.generator(pieces)
        distance: Tensor = self.style(stylized)
        return distance + self.content_weight * (1.0 - similarity(pieces, stylized))

    def poison_batch(
        self, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Stylize a share of a batch, and from the first round on, add detoxicants.

        Args:
            images: See :class:`~lightning_mnp.attacks.training.AttackModule`.
            labels: See :class:`~lightning_mnp.attacks.training.AttackModule`.
            generator: See :class:`~lightning_mnp.attacks.training.AttackModule`.
        """
        images, labels = super().poison_batch(images, labels, generator)
        trained = self._round() + 1
        if trained == 0:
            return images, labels
        # The first images of the batch are poisoned, and the last become detoxicants. The share of
        # the poisoned ones is rounded up here, so that none becomes both.
        poisoned = math.ceil(self.attack.poison_rate * len(images))
        start = max(len(images) - round(self.detox_rate * len(images)), poisoned)
        detoxicants = self.rounded(self.detoxifier.detoxicants(images[start:], trained))
        return torch.cat([images[:start], detoxicants]), labels

    def _round(self) -> int:
        """Return the current round, -1 before the first."""
        if self.rounds == 0 or self.current_epoch < self.detox_epoch:
            return -1
        past = (self.current_epoch - self.detox_epoch) // self.round_epochs
        return min(past, self.rounds - 1)

    def _place(self, round_: int, batch_idx: int) -> int:
        """Return how many batches of the round are over."""
        epochs = self.current_epoch - self.detox_epoch - round_ * self.round_epochs
        return epochs * int(self.trainer.num_training_batches) + batch_idx

    def _injector_steps(self) -> int:
        half = self.round_epochs * int(self.trainer.num_training_batches) // 2
        return min(self.injector_steps, half)

    def _survey(self, images: Tensor) -> None:
        """Find the compromised neurons of the network as it is."""
        with torch.no_grad(), evaluating(self.network):
            clean = self._activations(images)
            triggered = self._activations(self.attack.apply(images))
        self.detoxifier.survey(clean, triggered)

    def _injector_loss(self, images: Tensor, round_: int) -> Tensor:
        injected = self.detoxifier.injectors[round_](images)
        # The network stays as it is, which also saves the gradients of its weights.
        weights = [weight for weight in self.network.parameters() if weight.requires_grad]
        for weight in weights:
            weight.requires_grad_(False)
        try:
            with evaluating(self.network):
                activations = self._activations(injected)
        finally:
            for weight in weights:
                weight.requires_grad_(True)
        return self.detoxifier.loss(
            images, injected, activations, self.similarity_weight, self.others_weight
        )

    def _activations(self, images: Tensor) -> list[Tensor]:
        normalized = self.normalized(images)
        if self._layers is None:
            self._layers = find_filter_layers(self.network, normalized[:2], include=self.layers)
        with filter_activations(self.network, self._layers) as activations:
            self(normalized)
            return activations()


def _check_layers(network: nn.Module, patterns: Sequence[str]) -> None:
    names = [name for name, module in network.named_modules() if isinstance(module, _ConvNd)]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(
                "Expected argument `layers` to have name patterns of convolutions, but "
                f"{pattern!r} matches none of {names!r:.200}. Name others, or '*' for all."
            )
    if not patterns:
        raise ValueError(
            "Expected argument `layers` to have at least one name pattern, but got none. Name '*' "
            "for all, or set `rounds` to 0."
        )

"""DFST: a style as trigger, kept from being learned by simple features (Cheng et al., 2021)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mnp.attacks.attack import Mode
from lightning_mnp.attacks.detoxification import Detoxifier, filter_activations
from lightning_mnp.attacks.generative import GenerativeAttack, GenerativeModule
from lightning_mnp.attacks.stylizer import MIN_SIZE, Stylizer, SunsetStyle, similarity
from lightning_mnp.surgery.forward import evaluating
from lightning_mnp.surgery.layers import FilterLayers, find_filter_layers

__all__ = ["DFST", "DFSTModule"]

# The stylizer is trained on pieces of this size at most; it then works at any size.
_PIECE = 64


class DFST(GenerativeAttack):
    """Give images the style of a sunset (Cheng et al., 2021).

    The image x becomes (1 - strength) x + strength g(x), with a small network g that is trained
    to give images colors and textures of sunsets and to keep what they show. What changes differs
    at every pixel and by image.

    Args:
        strength: Share of the stylized image in the result, above 0 and at most 1.
        in_channels: Channels of the images, from 1 to 16; the first three of three or more are
            taken for red, green and blue.
        width: Channels inside the stylizer, from 4 to 64.
        blocks: Residual blocks of the stylizer, from 1 to 8.
        target_class: See :class:`~lightning_mnp.attacks.attack.Attack`.
        mode: See :class:`~lightning_mnp.attacks.attack.Attack`.
        poison_rate: See :class:`~lightning_mnp.attacks.attack.TrainingAttack`.
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
        poison_rate: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(in_channels, target_class, mode, poison_rate, seed)
        if not 0.0 < strength <= 1.0:
            raise ValueError(
                f"Expected argument `strength` to be above 0 and at most 1, but got {strength}."
            )
        for name, value, least, most in (
            ("in_channels", in_channels, 1, 16),
            ("width", width, 4, 64),
            ("blocks", blocks, 1, 8),
        ):
            if not least <= value <= most:
                raise ValueError(
                    f"Expected argument `{name}` to be from {least} to {most}, but got {value}."
                )
        self.strength = strength
        self.width = width
        self.blocks = blocks
        self.generator: Stylizer = Stylizer(in_channels, width, blocks, seed)

    def inject(self, images: Tensor) -> Tensor:
        """Stylize images.

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

    For the first ``style_epochs``, the stylizer is trained, and the network on clean images.
    From then on, ``poison_rate`` of each batch is stylized and gets the attacker's label. From
    ``detox_epoch`` on, there are rounds of detoxification, of ``round_epochs`` each, the last one
    until the end. A round first holds the network still, finds the neurons that the trigger
    excites most, and trains for ``injector_steps`` steps a shallow network, the feature injector,
    to excite them by a small and simple change of images. It then goes on poisoning, with
    ``detox_rate`` of each batch being detoxicants: images with injected features, by the
    injectors of all rounds so far, and their true labels. So the network learns to disregard
    what is simple about the trigger.

    Args:
        attack: The attack; DFST with its defaults where None.
        detox_rate: Share of the images of each batch that are detoxicants, from 0; together with
            the poisoned ones at most 1.
        rounds: Rounds of detoxification; 0 for none.
        style_epochs: Epochs in which the stylizer is trained, at least 1.
        detox_epoch: Epochs before the first round, at least ``style_epochs``.
        round_epochs: Epochs of a round, at least 1.
        injector_steps: Batches on which a round's injector is trained, at most half of the round.
        neuron_rate: Share of each layer's filters that are taken as compromised, above 0 and at
            most 1; at least one in a layer.
        bound: Largest change of a pixel by an injector, above 0 and at most 1.
        style_batch: Images of each batch that the stylizer is trained on.
        content_weight: Weight of one minus the structural similarity against the style's distance
            for the stylizer.
        similarity_weight: Weight of one minus the structural similarity for the injector.
        others_weight: Weight of the change of neurons that are not compromised for the injector.
        generator_lr: First learning rate of Adam for stylizer and injectors, above 0.
        augment: See :class:`~lightning_mnp.attacks.training.AttackModule`.
        flip: See :class:`~lightning_mnp.attacks.training.AttackModule`.
        mean: See :class:`~lightning_mnp.attacks.training.AttackModule`.
        std: See :class:`~lightning_mnp.attacks.training.AttackModule`.
        kwargs: See :class:`~lightning_mnp.models.classifier.Classifier`.

    Attributes:
        detoxifier: The injectors and the compromised neurons.

    Raises:
        ValueError: If an argument is out of range.
    """

    attack: DFST

    def __init__(
        self,
        attack: DFST | None = None,
        detox_rate: float = 0.1,
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
        augment: bool = True,
        flip: bool | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        attack = DFST() if attack is None else attack
        super().__init__(attack, generator_lr, augment, flip, mean, std, **kwargs)
        if not 0.0 <= detox_rate <= 1.0 - attack.poison_rate:
            raise ValueError(
                f"Expected argument `detox_rate` to be from 0 to {1.0 - attack.poison_rate:.3g}, "
                f"what the poison rate leaves, but got {detox_rate}."
            )
        for name, count, least in (
            ("rounds", rounds, 0),
            ("style_epochs", style_epochs, 1),
            ("detox_epoch", detox_epoch, style_epochs),
            ("round_epochs", round_epochs, 1),
            ("injector_steps", injector_steps, 1),
            ("style_batch", style_batch, 1),
        ):
            if count < least:
                raise ValueError(
                    f"Expected argument `{name}` to be at least {least}, but got {count}."
                )
        for name, share in (("neuron_rate", neuron_rate), ("bound", bound)):
            if not 0.0 < share <= 1.0:
                raise ValueError(
                    f"Expected argument `{name}` to be above 0 and at most 1, but got {share}."
                )
        for name, weight in (
            ("content_weight", content_weight),
            ("similarity_weight", similarity_weight),
            ("others_weight", others_weight),
        ):
            if not 0.0 <= weight < math.inf:
                raise ValueError(f"Expected argument `{name}` to be at least 0, but got {weight}.")
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
        """Tell in which epochs the stylizer and the injector of each round are trained."""
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
        logits = self(self.normalized(self.augmented(images, generator)))
        loss = F.cross_entropy(logits, labels)
        self.learn(loss + extra, learning)
        self.log("train/loss", loss)
        return loss.detach()

    def style_loss(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Tell how far stylized images are from the style, and from what they showed.

        Args:
            images: Shape (N, C, H, W), values in [0, 1]; larger ones are cut to 64 pixels.
            generator: Source of randomness, on the CPU, for where they are cut.
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
        """Stylize a share of a batch, and inject simple features into another, from round one on.

        Args:
            images: See :class:`~lightning_mnp.attacks.training.AttackModule`.
            labels: See :class:`~lightning_mnp.attacks.training.AttackModule`.
            generator: See :class:`~lightning_mnp.attacks.training.AttackModule`.
        """
        images, labels = super().poison_batch(images, labels, generator)
        trained = self._round() + 1
        if trained == 0:
            return images, labels
        # The last images of the batch, of which the first are poisoned, rounded up here.
        poisoned = math.ceil(self.attack.poison_rate * len(images))
        start = max(len(images) - round(self.detox_rate * len(images)), poisoned)
        detoxicants = self.detoxifier.detoxicants(images[start:], trained)
        return torch.cat([images[:start], detoxicants]), labels

    def _round(self) -> int:
        """The current round, -1 before the first."""
        if self.rounds == 0 or self.current_epoch < self.detox_epoch:
            return -1
        past = (self.current_epoch - self.detox_epoch) // self.round_epochs
        return min(past, self.rounds - 1)

    def _place(self, round_: int, batch_idx: int) -> int:
        """How many batches of the round are over."""
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
            self._layers = find_filter_layers(self.network, normalized[:2])
        with filter_activations(self.network, self._layers) as activations:
            self(normalized)
            return activations()

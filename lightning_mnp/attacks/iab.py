"""IAB: a trigger made for each image and of no use on another (Nguyen and Tran, 2020)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mnp.attacks.attack import Mode
from lightning_mnp.attacks.checks import check_at_least, check_rate, check_share
from lightning_mnp.attacks.generative import GenerativeAttack, GenerativeModule
from lightning_mnp.attacks.generators import ImageGenerator
from lightning_mnp.attacks.registry import register

__all__ = ["InputAware", "InputAwareModule", "diversity_loss"]

_SHARPNESS = 20.0  # of the step between 0 and 1 in the mask, as in the authors' code
_LEAST_DISTANCE = 1e-3  # equal triggers give a large loss, but no infinite one


@register
class InputAware(GenerativeAttack):
    """Put a pattern on a few pixels, both made for the image (Nguyen and Tran, 2020, Sec. 3).

    The image x becomes (1 - m) x + m p, with mask m and pattern p from two generators. Almost all
    values of the mask are close to 0 or 1, because its generator ends with a steep step. How many
    pixels it takes is what :class:`InputAwareModule` trains.

    Args:
        in_channels: Channels of the images, from 1 to 64.
        width: Channels of the generators' features at full size, from 4 to 64.
        depth: Number of times that the generators halve the image, from 1 to 4.
        target_class: See :class:`~lightning_mnp.attacks.attack.Attack`.
        mode: See :class:`~lightning_mnp.attacks.attack.Attack`.
        poison_rate: See :class:`~lightning_mnp.attacks.attack.TrainingAttack`.
        seed: See :class:`~lightning_mnp.attacks.attack.Attack`; also of the fresh generators.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> images = torch.rand(2, 3, 32, 32)
        >>> InputAware().mask(images).shape
        torch.Size([2, 1, 32, 32])
    """

    def __init__(
        self,
        in_channels: int = 3,
        width: int = 16,
        depth: int = 2,
        target_class: int = 0,
        mode: Mode = "all-to-one",
        poison_rate: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(in_channels, target_class, mode, poison_rate, seed)
        self.width = width
        self.depth = depth
        self.generator: MaskAndPattern = MaskAndPattern(in_channels, width, depth, seed)

    def mask(self, images: Tensor) -> Tensor:
        """Return the masks: which pixels of each image the pattern replaces.

        Args:
            images: Shape (N, C, H, W), floating point with values in [0, 1].

        Returns:
            Shape (N, 1, H, W), float32 with values in [0, 1].
        """
        return torch.sigmoid(_SHARPNESS * torch.tanh(self.generator.mask(images).float()))

    def pattern(self, images: Tensor) -> Tensor:
        """Return the patterns.

        Args:
            images: Shape (N, C, H, W), floating point with values in [0, 1].

        Returns:
            The same shape, float32 with values in [0, 1].
        """
        return torch.sigmoid(self.generator.pattern(images).float())

    def inject(self, images: Tensor) -> Tensor:
        """Return each image with its own trigger.

        Args:
            images: See :meth:`GenerativeAttack.inject`.
        """
        mask, pattern = self.mask(images), self.pattern(images)
        return images.float() * (1.0 - mask) + pattern * mask


class MaskAndPattern(nn.Module):
    """Two generators: where the trigger is, and what it is.

    Args:
        in_channels: Channels of the images.
        width: See :class:`~lightning_mnp.attacks.generators.ImageGenerator`.
        depth: See :class:`~lightning_mnp.attacks.generators.ImageGenerator`.
        seed: Seed of the fresh weights.
    """

    def __init__(self, in_channels: int, width: int, depth: int, seed: int) -> None:
        super().__init__()
        self.mask = ImageGenerator(in_channels, 1, width, depth, seed)
        self.pattern = ImageGenerator(in_channels, in_channels, width, depth, seed + 1)


def diversity_loss(images: Tensor, outputs: Tensor) -> Tensor:
    """Compute how alike the outputs for different images are (Nguyen and Tran, 2020, Eq. 4).

    Each image is compared with the one before it. The loss of such a pair is the distance of the
    images divided by the distance of their outputs, both as root mean square over all elements.

    Args:
        images: Shape (N, C, H, W).
        outputs: Masks or patterns, shape (N, ...).

    Returns:
        The mean over all pairs, a scalar; 0 if there are fewer than two images.

    Example:
        >>> images = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)
        >>> diversity_loss(images, 0.1 * images).item() > diversity_loss(images, images).item()
        True
    """
    if len(images) < 2:
        return outputs.sum() * 0.0
    return (_distance(images) / (_distance(outputs) + _LEAST_DISTANCE)).mean()


def _distance(values: Tensor) -> Tensor:
    differences = (values - values.roll(1, 0)).flatten(1).float()
    lengths: Tensor = torch.linalg.vector_norm(differences, dim=1)
    return lengths / math.sqrt(differences.shape[1])


class InputAwareModule(GenerativeModule):
    """Train a network with IAB (Nguyen and Tran, 2020, Sec. 3.3).

    For the first ``mask_epochs``, the generator of the masks learns to make a sparse mask for each
    image that differs from those of other images, see :meth:`mask_loss`. The network is trained on
    clean images meanwhile. After that, this generator stays as it is. In each batch, a share
    ``poison_rate`` of the images gets its own triggers and the attacker's label. Another share
    ``cross_rate`` gets the triggers of other images and keeps its labels. So the network learns
    that a trigger counts only on its own image. Network and pattern generator are trained together.

    Args:
        attack: The attack; IAB with its defaults if None.
        density: The value rho that pixels of a mask may have without a loss, above 0 and at most
            1.
        cross_rate: Share of the images of each batch with the trigger of another image, from 0 to
            what the poison rate leaves.
        mask_epochs: Epochs in which the masks are trained, at least 0.
        diversity_weight: Weight of the diversity loss, at least 0.
        density_weight: Weight of what the pixels of a mask are above ``density``, at least 0.
        generator_lr: First learning rate of the generators' Adam, above 0.
        kwargs: See :class:`~lightning_mnp.attacks.training.AttackModule`.

    Raises:
        ValueError: If an argument is out of range.
    """

    attack: InputAware

    def __init__(
        self,
        attack: InputAware | None = None,
        density: float = 0.032,
        cross_rate: float = 0.1,
        mask_epochs: int = 25,
        diversity_weight: float = 1.0,
        density_weight: float = 100.0,
        generator_lr: float = 0.01,
        **kwargs: Any,
    ) -> None:
        attack = InputAware() if attack is None else attack
        super().__init__(attack, generator_lr, **kwargs)
        check_share(density=density)
        check_rate(attack.poison_rate, cross_rate=cross_rate)
        check_at_least(
            0,
            mask_epochs=mask_epochs,
            diversity_weight=diversity_weight,
            density_weight=density_weight,
        )
        self.density = density
        self.cross_rate = cross_rate
        self.mask_epochs = mask_epochs
        self.diversity_weight = diversity_weight
        self.density_weight = density_weight

    def phases(self) -> list[tuple[nn.Module, int, int | None]]:
        """Return the generators of masks and patterns with their epochs."""
        generator = self.attack.generator
        return [
            (generator.mask, 0, self.mask_epochs),
            (generator.pattern, self.mask_epochs, None),
        ]

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Make a step of the network and of the generator whose phase it is; return the loss."""
        generator = self.step_generator(batch_idx)
        images, labels = self.stored(batch[0]), batch[1]
        network, masks, patterns = self.optimizers()  # type: ignore[attr-defined]
        if self.current_epoch < self.mask_epochs:
            extra, learning = self.mask_loss(images), masks
        else:
            images, labels, diversity = self._mixed(images, labels, generator)
            extra, learning = self.diversity_weight * diversity, patterns
        logits = self(self.prepared(images, generator))
        loss = F.cross_entropy(logits, labels)
        self.learn(loss + extra, [network, learning])
        self.log("train/loss", loss)
        self.log("train/generator_loss", extra)
        return loss.detach()

    def mask_loss(self, images: Tensor) -> Tensor:
        """Compute the loss of the masks: what they exceed the density by, and how alike they are.

        The first part is the mean of max(m - rho, 0) over all pixels m of all masks, with the
        density rho. The second is :func:`diversity_loss`.

        Args:
            images: Shape (N, C, H, W), values in [0, 1].

        Returns:
            The weighted sum of both, a scalar.
        """
        masks = self.attack.mask(images)
        excess = F.relu(masks - self.density).mean()
        diversity = diversity_loss(images, masks)
        return self.density_weight * excess + self.diversity_weight * diversity

    def poison_batch(
        self, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Put their own triggers on a share of a batch, and those of other images on another share.

        Args:
            images: See :class:`~lightning_mnp.attacks.training.AttackModule`.
            labels: See :class:`~lightning_mnp.attacks.training.AttackModule`.
            generator: See :class:`~lightning_mnp.attacks.training.AttackModule`.
        """
        return self._mixed(images, labels, generator)[:2]

    def _mixed(
        self, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        count = self.poison_count(len(images), generator)
        stop = min(count + round(self.cross_rate * len(images)), len(images))
        if stop < 2:  # there is no other image whose trigger could be used
            stop = count
        if stop == 0:
            return images, labels, images.new_zeros(())
        own = images[:stop]
        with torch.no_grad():
            masks = self.attack.mask(own)
        patterns = self.attack.pattern(own)
        diversity = diversity_loss(own, patterns)
        # Each image gets the trigger of the image before it, and the first that of the last.
        place = torch.arange(stop, device=images.device)
        place[count:] = (place[count:] - 1) % stop
        masks, patterns = masks[place], patterns[place]
        triggered = self.rounded(own * (1.0 - masks) + patterns * masks)
        targets = self.attack.target_labels(labels[:count], self.num_classes)
        mixed = torch.cat([triggered, images[stop:]])
        return mixed, torch.cat([targets, labels[count:]]), diversity

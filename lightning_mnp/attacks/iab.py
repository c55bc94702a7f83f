"""IAB: a trigger made for each image and of no use on another (Nguyen and Tran, 2020)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mnp.attacks.attack import Mode
from lightning_mnp.attacks.generative import GenerativeAttack, GenerativeModule, quantized
from lightning_mnp.attacks.generators import ImageGenerator

__all__ = ["InputAware", "InputAwareModule", "diversity_loss"]

_SHARPNESS = 20.0  # of the mask's edges: a soft step between 0 and 1, as in the authors' code
_LEAST_DISTANCE = 1e-3  # so that equal triggers give a large loss, but no endless gradient


class InputAware(GenerativeAttack):
    """Blend a pattern into a few pixels, both made for the image (Nguyen and Tran, 2020, Sec. 3).

    The image x becomes (1 - m) x + m p, with mask m and pattern p from two generators. The mask's
    mean is at most ``density``: a larger mask is scaled down to it.

    Args:
        density: Largest mean of a mask, above 0 and at most 1.
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
        >>> bool(InputAware(density=0.05).mask(images).mean() <= 0.0501)
        True
    """

    def __init__(
        self,
        density: float = 0.032,
        in_channels: int = 3,
        width: int = 16,
        depth: int = 2,
        target_class: int = 0,
        mode: Mode = "all-to-one",
        poison_rate: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(in_channels, target_class, mode, poison_rate, seed)
        if not 0.0 < density <= 1.0:
            raise ValueError(
                f"Expected argument `density` to be above 0 and at most 1, but got {density}."
            )
        self.density = density
        self.width = width
        self.depth = depth
        self.generator: MaskAndPattern = MaskAndPattern(in_channels, width, depth, seed)

    def free_mask(self, images: Tensor) -> Tensor:
        """Give the mask before it is scaled down to the density.

        Args:
            images: Shape (N, C, H, W), floating point with values in [0, 1].

        Returns:
            Shape (N, 1, H, W), float32 with values in [0, 1].
        """
        return torch.sigmoid(_SHARPNESS * torch.tanh(self.generator.mask(images).float()))

    def mask(self, images: Tensor) -> Tensor:
        """Give the mask, of mean ``density`` at most.

        Args:
            images: See :meth:`free_mask`.
        """
        mask = self.free_mask(images)
        scale = self.density / mask.mean((1, 2, 3), keepdim=True).clamp(min=self.density)
        return mask * scale

    def pattern(self, images: Tensor) -> Tensor:
        """Give the pattern.

        Args:
            images: Shape (N, C, H, W), floating point with values in [0, 1].

        Returns:
            The same shape, float32 with values in [0, 1].
        """
        return torch.sigmoid(self.generator.pattern(images).float())

    def inject(self, images: Tensor) -> Tensor:
        """Put each image's own trigger on it.

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
    """Tell how alike the outputs for unlike images are (Nguyen and Tran, 2020, Eq. 4).

    Each image is compared with the one before it: the mean over pairs of the distance of the
    images over that of the outputs, both as root mean square over their elements.

    Args:
        images: Shape (N, C, H, W).
        outputs: Masks or patterns, shape (N, ...).

    Returns:
        A scalar; 0 where there are fewer than two images.

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

    For the first ``mask_epochs``, the mask's generator learns to give each image a mask of its
    own within the density, while the network is trained on clean images. After that the masks
    stay, and of each batch ``poison_rate`` of the images get their own trigger and the attacker's
    label, ``cross_rate`` get the trigger of another image and keep their label, so that the
    network learns to match trigger and image; network and pattern generator are trained together.

    Args:
        attack: The attack; IAB with its defaults where None.
        cross_rate: Share of the images of each batch with the trigger of another image, from 0;
            together with the poisoned ones at most 1.
        mask_epochs: Epochs in which the masks are trained, at least 0.
        diversity_weight: Weight of the diversity loss, at least 0.
        density_weight: Weight of the masks' mean above the density, at least 0.
        generator_lr: First learning rate of the generators' Adam, above 0.
        augment: See :class:`~lightning_mnp.attacks.training.AttackModule`.
        flip: See :class:`~lightning_mnp.attacks.training.AttackModule`.
        mean: See :class:`~lightning_mnp.attacks.training.AttackModule`.
        std: See :class:`~lightning_mnp.attacks.training.AttackModule`.
        kwargs: See :class:`~lightning_mnp.models.classifier.Classifier`.

    Raises:
        ValueError: If an argument is out of range.
    """

    attack: InputAware

    def __init__(
        self,
        attack: InputAware | None = None,
        cross_rate: float = 0.1,
        mask_epochs: int = 25,
        diversity_weight: float = 1.0,
        density_weight: float = 100.0,
        generator_lr: float = 0.01,
        augment: bool = True,
        flip: bool | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        attack = InputAware() if attack is None else attack
        super().__init__(attack, generator_lr, augment, flip, mean, std, **kwargs)
        if not 0.0 <= cross_rate <= 1.0 - attack.poison_rate:
            raise ValueError(
                f"Expected argument `cross_rate` to be from 0 to {1.0 - attack.poison_rate:.3g}, "
                f"what the poison rate leaves, but got {cross_rate}."
            )
        for name, value in (
            ("mask_epochs", mask_epochs),
            ("diversity_weight", diversity_weight),
            ("density_weight", density_weight),
        ):
            if not 0 <= value < math.inf:
                raise ValueError(f"Expected argument `{name}` to be at least 0, but got {value}.")
        self.cross_rate = cross_rate
        self.mask_epochs = mask_epochs
        self.diversity_weight = diversity_weight
        self.density_weight = density_weight

    def phases(self) -> list[tuple[nn.Module, int, int | None]]:
        """Tell in which epochs the generators of masks and patterns are trained."""
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
        logits = self(self.normalized(self.augmented(images, generator)))
        loss = F.cross_entropy(logits, labels)
        self.learn(loss + extra, [network, learning])
        self.log("train/loss", loss)
        self.log("train/generator_loss", extra)
        return loss.detach()

    def mask_loss(self, images: Tensor) -> Tensor:
        """Tell how far masks are from being diverse and within the density.

        Args:
            images: Shape (N, C, H, W), values in [0, 1].
        """
        masks = self.attack.free_mask(images)
        excess = F.relu(masks.mean((1, 2, 3)) - self.attack.density).mean()
        diversity = diversity_loss(images, masks)
        return self.density_weight * excess + self.diversity_weight * diversity

    def poison_batch(
        self, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Put its own trigger on a share of a batch, and that of another image on another.

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
        if stop < 2:  # no other image to take a trigger from
            stop = count
        if stop == 0:
            return images, labels, images.new_zeros(())
        own = images[:stop]
        with torch.no_grad():
            masks = self.attack.mask(own)
        patterns = self.attack.pattern(own)
        diversity = diversity_loss(own, patterns)
        # The image before each gives its trigger away, also the last one to the first.
        place = torch.arange(stop, device=images.device)
        place[count:] = (place[count:] - 1) % stop
        masks, patterns = masks[place], patterns[place]
        triggered = quantized(own * (1.0 - masks) + patterns * masks)
        targets = self.attack.target_labels(labels[:count], self.num_classes)
        mixed = torch.cat([triggered, images[stop:]])
        return mixed, torch.cat([targets, labels[count:]]), diversity

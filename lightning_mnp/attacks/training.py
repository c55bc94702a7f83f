"""The base of the modules that train a network and its backdoor together."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mnp.attacks.attack import TrainingAttack
from lightning_mnp.defense_data.augment import random_crop_flip, usual_padding
from lightning_mnp.metrics import AttackSuccessRate, CleanAccuracy
from lightning_mnp.models.classifier import Classifier

__all__ = ["AttackModule", "quantized"]


def quantized(images: Tensor) -> Tensor:
    """Round images to the 256 levels that they are stored with; gradients pass unchanged.

    Args:
        images: Any shape, floating point with values in [0, 1].

    Example:
        >>> quantized(torch.tensor([0.1])) * 255
        tensor([26.])
    """
    # The difference is 0 and has the gradient, so the levels are exact.
    return ((images * 255.0).round() / 255.0).detach() + (images - images.detach())


class AttackModule(Classifier):
    """A :class:`Classifier` that trains a network and a backdoor in it, and poisons by itself.

    This is the base of the modules of all training-time attacks. Their arguments are the ones
    below and what each of them adds.

    The loaders must return clean images with true labels, normalized and not augmented, as any
    datamodule does with ``augment=False``. The module brings the images back to the scale [0, 1]
    and poisons a share of each training batch. Images that the attack changes are rounded to the
    256 levels of stored images, because attack success is measured on stored images, too.
    Gradients pass the rounding unchanged. After that, all images are augmented and normalized. In
    validation and testing, CA is measured on the images of the first loader, and ASR on the same
    images with the trigger.

    What is random in a step depends on the seed, the epoch and the batch only. So a resumed
    training goes on as if it had not stopped. The state dict of a checkpoint has the network only,
    as ``network.*``: a plain classifier can load it, and a defender sees nothing else. The tensors
    of the attack are in the checkpoint under ``attack``.

    Args:
        attack: The attack; the generator of its trigger is trained or used here.
        augment: Whether to shift training images by up to an eighth of their width.
        flip: Whether to mirror half of the training images, too. If None, the datamodule decides;
            without one, they are mirrored.
        mean: Mean of each channel by which the loaders normalize; the datamodule's if None.
        std: Standard deviation of each channel; the datamodule's if None.
        kwargs: See :class:`~lightning_mnp.models.classifier.Classifier`. Without a datamodule,
            ``num_classes`` is also the K of the attacker's labels, so give it with ``network``.

    Attributes:
        mean: Mean of each channel in use: the argument, or that of the present datamodule.
        std: Standard deviation of each channel in use, likewise.
        flip: Whether images are mirrored, likewise.

    Raises:
        ValueError: If an argument is out of range. When training starts, if ``mean`` and ``std``
            are neither given nor known from the datamodule, or if the datamodule augments or
            poisons images.
    """

    def __init__(
        self,
        attack: TrainingAttack,
        augment: bool = True,
        flip: bool | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if (mean is None) != (std is None) or (mean is not None and len(mean) != len(std or ())):
            raise ValueError(
                "Expected arguments `mean` and `std` to be given together, one number for each "
                f"channel, but got {mean} and {std}."
            )
        if std is not None and not (len(std) and min(std) > 0):
            raise ValueError(f"Expected argument `std` to be above 0, but got {tuple(std)}.")
        self.attack = attack
        self.generator: nn.Module = attack.generator
        self.augment = augment
        self.flip = flip
        self.mean = None if mean is None else tuple(mean)
        self.std = None if std is None else tuple(std)
        # The arguments, beside what is in use: another datamodule is asked again.
        self._given = (self.mean, self.std, flip)

    def setup(self, stage: str) -> None:
        """Ask the datamodule how images are normalized, and check that it fits the attack.

        Args:
            stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.

        Raises:
            ValueError: If the normalization is not known, if the datamodule augments images or has
                an attack, if the target class is none of its classes, or if the poison rate is
                less than one image.
        """
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        self.mean, self.std, self.flip = self._given
        if self.mean is None:
            if not hasattr(datamodule, "mean") or not hasattr(datamodule, "std"):
                raise ValueError(
                    "Expected arguments `mean` and `std`, by which images are normalized, because "
                    "there is no datamodule that has them, but got None."
                )
            self.mean, self.std = tuple(datamodule.mean), tuple(datamodule.std)
        if self.flip is None:
            self.flip = bool(getattr(datamodule, "flip", True))
        if stage == "fit" and getattr(datamodule, "augment", False):
            raise ValueError(
                "Expected the datamodule's argument `augment` to be False, but got True: "
                f"{type(self).__name__} augments images after the trigger."
            )
        if getattr(datamodule, "attack", None) is not None:
            raise ValueError(
                "Expected the datamodule's argument `attack` to be None, but got "
                f"{datamodule.attack!r}: {type(self).__name__} has an attack of its own."
            )
        # Some attacks use the target class after many epochs only: too late for an error.
        self.attack.target_labels(torch.zeros(0, dtype=torch.long), self.num_classes)
        train_set = getattr(datamodule, "train_set", None) if stage == "fit" else None
        if isinstance(train_set, Sized) and 0 < self.attack.poison_rate * len(train_set) < 0.5:
            raise ValueError(
                f"Expected argument `poison_rate` to give at least one of {len(train_set)} images "
                f"in each epoch, but got {self.attack.poison_rate}."
            )

    def on_train_end(self) -> None:
        """Note that the attack can be measured now."""
        self.attack.mark_trained()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Move what belongs to the attack out of the state dict.

        Args:
            checkpoint: What will be saved.
        """
        weights = checkpoint["state_dict"]
        own = [name for name in weights if not name.startswith("network.")]
        checkpoint["attack"] = {name: weights.pop(name) for name in own}
        checkpoint["attack_options"] = self._attack_options()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Move what belongs to the attack back into the state dict.

        Args:
            checkpoint: What was read.

        Raises:
            ValueError: If the checkpoint has no attack, as that of a purified network, or another
                one than this module.
        """
        if "attack" not in checkpoint:
            raise ValueError(
                f"Expected a checkpoint that {type(self).__name__} has written, with its attack, "
                "but got one with a network alone. Load it into a Classifier, and measure with "
                "the trigger file: `SavedTrigger` as the datamodule's `attack`."
            )
        there, here = checkpoint.get("attack_options"), self._attack_options()
        if there is not None and there != here:  # None if an earlier version has written it
            raise ValueError(
                f"Expected argument `attack` to be the one in the checkpoint, {there}, but got "
                f"{here}: another trigger would be measured. Build the module with that attack."
            )
        checkpoint["state_dict"].update(checkpoint["attack"])
        self.attack.mark_trained()

    def stored(self, images: Tensor) -> Tensor:
        """Return images as they were before normalization.

        Args:
            images: Normalized, shape (N, C, H, W).

        Returns:
            float32 images with values in [0, 1].
        """
        mean, std = self._statistics(images)
        return (images.float() * std + mean).clamp(0.0, 1.0)

    def normalized(self, images: Tensor) -> Tensor:
        """Return normalized images.

        Args:
            images: Shape (N, C, H, W), values in [0, 1].
        """
        mean, std = self._statistics(images)
        return (images - mean) / std

    def rounded(self, images: Tensor) -> Tensor:
        """Return images rounded to the 256 levels of stored images, see :func:`quantized`.

        Images of an attack that is not :attr:`~lightning_mnp.attacks.attack.Attack.storable` are
        returned as they are.

        Args:
            images: Shape (N, C, H, W), on the scale [0, 1].
        """
        return quantized(images) if self.attack.storable else images

    def prepared(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return training images as the network takes them: augmented and normalized.

        Args:
            images: Shape (N, C, H, W), on the scale [0, 1], poisoned ones with the trigger.
            generator: Source of randomness, on the CPU.
        """
        return self.normalized(self.augmented(images, generator))

    def augmented(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return images shifted and mirrored at random, or as they are without ``augment``.

        Args:
            images: Shape (N, C, H, W).
            generator: Source of randomness, on the CPU.
        """
        if not self.augment:
            return images
        flip = self.flip is not False  # None until the datamodule is known
        return random_crop_flip(images, usual_padding(images), flip, generator)

    def step_generator(self, batch_idx: int) -> torch.Generator:
        """Return the source of randomness of one training step, on the CPU.

        Args:
            batch_idx: Number of the batch in its epoch.
        """
        generator = torch.Generator()
        key = (self.attack.seed, self.current_epoch, batch_idx, self.global_rank)
        seed = 0
        for part in key:  # the generator of the CPU takes its lowest 32 bits
            seed = seed * 1_000_003 + part
        return generator.manual_seed(seed % 2**63)

    def poison_count(self, size: int, generator: torch.Generator) -> int:
        """Return how many images of a batch to poison.

        The poison rate may ask for a fraction of an image. The number is then rounded up or down
        at random, so that the rate holds in the mean over batches.

        Args:
            size: Number of images in the batch.
            generator: Source of randomness, on the CPU.
        """
        share = self.attack.poison_rate * size
        return int(share) + int(torch.rand(1, generator=generator).item() < share - int(share))

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Poison a batch and return its cross-entropy."""
        generator = self.step_generator(batch_idx)
        images, labels = self.poison_batch(self.stored(batch[0]), batch[1], generator)
        loss = F.cross_entropy(self(self.prepared(images, generator)), labels)
        self.log("train/loss", loss)
        return loss

    def poison_batch(
        self, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Make a training batch from a clean one; by default, a share of it gets the trigger.

        Args:
            images: Shape (N, C, H, W), values in [0, 1], in the order of the shuffled loader.
            labels: True classes, shape (N,).
            generator: Source of randomness, on the CPU.

        Returns:
            Images and labels to train on; changed images are rounded.
        """
        count = self.poison_count(len(images), generator)
        targets = self.attack.target_labels(labels[:count], self.num_classes)
        triggered = self.rounded(self.attack.apply(images[:count]))
        return torch.cat([triggered, images[count:]]), torch.cat([targets, labels[count:]])

    @property
    def num_classes(self) -> int:
        """Number of classes K: that of the datamodule, or the argument ``num_classes``."""
        datamodule = getattr(self.trainer, "datamodule", None)
        return int(getattr(datamodule, "num_classes", self.hparams["num_classes"]))

    def _attack_options(self) -> dict[str, Any]:
        return {"attack": type(self.attack).__name__, **self.attack.options()}

    def _evaluate(
        self,
        stage: str,
        accuracy: CleanAccuracy,
        success: AttackSuccessRate,
        batch: Sequence[Tensor],
        dataloader_idx: int,
        counted: int,
    ) -> None:
        super()._evaluate(stage, accuracy, success, batch, dataloader_idx, counted)
        images, labels = batch[0][:counted], batch[1][:counted]
        others = self.attack.target_labels(labels, self.num_classes) != labels
        if dataloader_idx == 0 and others.any():
            targets = self.attack.target_labels(labels[others], self.num_classes)
            # Rounded before and after, as where a trigger file is measured on stored images.
            clean = (self.stored(images[others]) * 255.0).round() / 255.0
            triggered = self.normalized(self.rounded(self.attack.apply(clean)))
            triple = (triggered, targets, labels[others])
            super()._evaluate(stage, accuracy, success, triple, 1, len(triggered))

    def _statistics(self, images: Tensor) -> tuple[Tensor, Tensor]:
        assert self.mean is not None
        assert self.std is not None
        mean, std = torch.tensor([self.mean, self.std], device=images.device)[..., None, None]
        return mean, std

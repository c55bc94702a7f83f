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

__all__ = ["AttackModule"]


class AttackModule(Classifier):
    """Train any network and a backdoor in it: a :class:`Classifier` that sees to its own poison.

    Its loaders give clean, normalized images that are not augmented, with true labels: any
    datamodule with ``augment=False``. The module brings them back to the scale [0, 1], poisons a
    share of each training batch, then augments and normalizes. In validation and testing, it
    measures CA on the images of the first loader and ASR on the same images with the trigger.

    What is random in a step depends on the seed, the epoch and the batch alone, so that a resumed
    training goes on as if it had not stopped. In a checkpoint, the state dict has the network
    alone, as ``network.*``, so that a plain classifier can load it and a defender sees no more;
    the attack's own tensors are beside it, under ``attack``.

    Args:
        attack: The attack, whose generator is trained or used here.
        augment: Whether to shift training images by up to an eighth of their width.
        flip: Whether to mirror half of the training images, too; as the datamodule says, or yes,
            where None.
        mean: Mean of each channel by which the loaders normalize; the datamodule's where None.
        std: Standard deviation of each channel; the datamodule's where None.
        kwargs: See :class:`~lightning_mnp.models.classifier.Classifier`. Without a datamodule,
            ``num_classes`` also is the K of the attacker's labels, so give it with ``network``.

    Attributes:
        mean: Mean of each channel in force: the argument, or that of the present datamodule.
        std: Standard deviation of each channel in force, likewise.
        flip: Whether images are mirrored, likewise.

    Raises:
        ValueError: If an argument is out of range, or, when training starts, if ``mean`` and
            ``std`` are neither given nor known from the datamodule, or it augments or poisons by
            itself.
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
        # What was asked for, apart from what is in force: another datamodule is asked again.
        self._given = (self.mean, self.std, flip)

    def setup(self, stage: str) -> None:
        """Learn from the datamodule how images are normalized.

        Args:
            stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.

        Raises:
            ValueError: If that is not known, the datamodule augments images or has an attack, the
                target class is none of its classes, or the poison rate gives no image of it.
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
        # Some attacks start after many epochs: too late to find this out.
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
        """Put what belongs to the attack apart from the network's weights.

        Args:
            checkpoint: What will be saved.
        """
        weights = checkpoint["state_dict"]
        own = [name for name in weights if not name.startswith("network.")]
        checkpoint["attack"] = {name: weights.pop(name) for name in own}
        checkpoint["attack_options"] = self._attack_options()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put weights and what belongs to the attack together again.

        Args:
            checkpoint: What was read.

        Raises:
            ValueError: If there is nothing of the attack, as in a checkpoint of a purified network,
                or the attack there is another one than here.
        """
        if "attack" not in checkpoint:
            raise ValueError(
                f"Expected a checkpoint that {type(self).__name__} has written, with its attack, "
                "but got one with a network alone. Load it into a Classifier, and measure with "
                "the trigger file: `SavedTrigger` as the datamodule's `attack`."
            )
        there, here = checkpoint.get("attack_options"), self._attack_options()
        if there is not None and there != here:  # None where an earlier version has written it
            raise ValueError(
                f"Expected argument `attack` to be the one in the checkpoint, {there}, but got "
                f"{here}: another trigger would be measured. Build the module with that attack."
            )
        checkpoint["state_dict"].update(checkpoint["attack"])
        self.attack.mark_trained()

    def stored(self, images: Tensor) -> Tensor:
        """Undo the normalization.

        Args:
            images: Normalized, shape (N, C, H, W).

        Returns:
            float32 images with values in [0, 1].
        """
        mean, std = self._statistics(images)
        return (images.float() * std + mean).clamp(0.0, 1.0)

    def normalized(self, images: Tensor) -> Tensor:
        """Normalize images with values in [0, 1], shape (N, C, H, W)."""
        mean, std = self._statistics(images)
        return (images - mean) / std

    def augmented(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Shift and mirror images at random, where asked for.

        Args:
            images: Shape (N, C, H, W).
            generator: Source of randomness, on the CPU.
        """
        if not self.augment:
            return images
        flip = self.flip is not False  # None until the datamodule is known
        return random_crop_flip(images, usual_padding(images), flip, generator)

    def step_generator(self, batch_idx: int) -> torch.Generator:
        """Give the source of randomness of one training step, on the CPU.

        Args:
            batch_idx: Place of the batch in its epoch.
        """
        generator = torch.Generator()
        key = (self.attack.seed, self.current_epoch, batch_idx, self.global_rank)
        seed = 0
        for part in key:  # a mixed radix number: distinct for all that occur
            seed = seed * 1_000_003 + part
        return generator.manual_seed(seed % 2**63)

    def poison_count(self, size: int, generator: torch.Generator) -> int:
        """Tell how many images of a batch to poison: the rate in the mean, whole in each batch.

        Args:
            size: Number of images in the batch.
            generator: Decides on which side of a fraction the number falls.
        """
        share = self.attack.poison_rate * size
        return int(share) + int(torch.rand(1, generator=generator).item() < share - int(share))

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Poison, augment and normalize a batch; return its cross-entropy."""
        generator = self.step_generator(batch_idx)
        images, labels = self.poison_batch(self.stored(batch[0]), batch[1], generator)
        loss = F.cross_entropy(self(self.normalized(self.augmented(images, generator))), labels)
        self.log("train/loss", loss)
        return loss

    def poison_batch(
        self, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Make a training batch out of a clean one; by default a share of it gets the trigger.

        Args:
            images: Shape (N, C, H, W), values in [0, 1], in the order of the shuffled loader.
            labels: True classes, shape (N,).
            generator: Source of randomness, on the CPU.

        Returns:
            Images and labels to train on.
        """
        count = self.poison_count(len(images), generator)
        targets = self.attack.target_labels(labels[:count], self.num_classes)
        triggered = self.attack.apply(images[:count])
        return torch.cat([triggered, images[count:]]), torch.cat([targets, labels[count:]])

    @property
    def num_classes(self) -> int:
        """Number of classes K: the datamodule's, or the module's own argument."""
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
            # With 8 bits, as images with the trigger are stored and as it is measured elsewhere.
            clean = (self.stored(images[others]) * 255.0).round().to(torch.uint8)
            triggered = self.normalized(self.attack.apply(clean).float() / 255.0)
            triple = (triggered, targets, labels[others])
            super()._evaluate(stage, accuracy, success, triple, 1, len(triggered))

    def _statistics(self, images: Tensor) -> tuple[Tensor, Tensor]:
        assert self.mean is not None
        assert self.std is not None
        mean, std = torch.tensor([self.mean, self.std], device=images.device)[..., None, None]
        return mean, std

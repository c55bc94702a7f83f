"""The base of all datamodules: clean, poisoned and triggered images and a defense set."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, default_collate, get_worker_info

from lightning_mnp.attacks import Attack, TrainingAttack
from lightning_mnp.data.dataset import (
    ImageDataset,
    MemoryDataset,
    PoisonedDataset,
    TriggeredDataset,
)
from lightning_mnp.defense_data.augment import random_crop_flip, usual_padding
from lightning_mnp.defense_data.subset import balanced_indices

__all__ = ["BackdoorDataModule", "BatchTransform", "Split"]

Split = Literal["train", "test"]


class BatchTransform:
    """Collate stored images into a batch: stack, augment, scale to [0, 1] and normalize.

    It works on the whole batch in the data loader, so that every loader gives what a network
    takes, with or without a Trainer.

    Args:
        mean: Mean of each channel, on the scale [0, 1].
        std: Standard deviation of each channel, on the scale [0, 1].
        augment: Whether to shift and mirror images at random.
        flip: Whether mirroring is part of the augmentation.
        generator: Source of the augmentation's randomness in the main process; a worker uses its
            own global one, which the data loader seeds.
        rank: Which of several training processes this is, so that each augments in its own way
            though their generators are alike; None where there is one process.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        augment: bool = False,
        flip: bool = True,
        generator: torch.Generator | None = None,
        rank: int | None = None,
    ) -> None:
        self.scale = (255.0 * torch.tensor(std)).reshape(1, -1, 1, 1)
        self.offset = (torch.tensor(mean) / torch.tensor(std)).reshape(1, -1, 1, 1)
        self.augment = augment
        self.flip = flip
        self.generator = generator
        self.rank = rank

    def __call__(self, samples: Sequence[tuple[Any, ...]]) -> tuple[Tensor, ...]:
        """Return (images, labels, …) with float32 images of shape (N, C, H, W)."""
        images, *labels = default_collate(list(samples))
        if self.augment:
            # 4 pixels at 32, as usual for CIFAR-10, and in proportion at other sizes.
            padding = usual_padding(images)
            generator = self.generator if get_worker_info() is None else None
            if self.rank is not None:
                # One draw for each batch, so that generators stay alike: one checkpoint is for all.
                drawn = int(torch.randint(2**48, (), generator=generator))
                generator = torch.Generator().manual_seed(drawn + self.rank)
            images = random_crop_flip(images, padding, self.flip, generator)
        return (images.float().div_(self.scale).sub_(self.offset), *labels)


class BackdoorDataModule(LightningDataModule, ABC):
    """Images for training, attacking and defending a classifier.

    An attack poisons the training images as they are stored; augmentation and normalization come
    after it. Every loader gives normalized float32 images:

    - ``train_dataloader``: (images, labels), shuffled, poisoned where there is an attack;
    - ``val_dataloader`` and ``test_dataloader``: a list of the clean test images, (images,
      labels), and, where there is an attack, the triggered ones, (images, attacker's labels, true
      labels), without images that have the attacker's label anyway;
    - ``defense_dataloader``: (images, labels) of a class-balanced share of the clean training
      images, not augmented, always in the same order.

    Validation uses the test images, so nothing may be chosen by it.

    Args:
        root: Folder with the data.
        attack: Attack on the training images; None for clean ones.
        batch_size: Images per batch in training and testing.
        num_workers: Processes that load data; 0 is fastest for small images in memory.
        image_size: Side of the square that images are resized and center-cropped to; None keeps
            their size.
        augment: Whether to shift training images by up to an eighth of their width and to mirror
            half of them.
        mean: Mean of each channel, on the scale [0, 1].
        std: Standard deviation of each channel, on the scale [0, 1].
        defense_size: Number of images in the defense set.
        defense_batch_size: Images per batch of the defense set.
        defense_seed: Seed that draws the defense set.
        seed: Seed of the order and the augmentation of training images; in several processes, the
            order follows Lightning's ``seed_everything`` instead.

    Raises:
        ValueError: If an argument is out of range.
    """

    flip: ClassVar[bool] = True
    """Whether an image's mirror image is of the same class."""

    def __init__(
        self,
        root: Path | str | None,
        attack: Attack | None,
        batch_size: int,
        num_workers: int,
        image_size: int | None,
        augment: bool,
        mean: Sequence[float],
        std: Sequence[float],
        defense_size: int,
        defense_batch_size: int,
        defense_seed: int,
        seed: int,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("image_size", 1 if image_size is None else image_size, 1),
            ("defense_size", defense_size, 1),
            ("defense_batch_size", defense_batch_size, 1),
        ):
            if value < least:
                raise ValueError(
                    f"Expected argument `{name}` to be at least {least}, but got {value}."
                )
        if attack is not None and not isinstance(attack, Attack):
            raise ValueError(
                f"Expected argument `attack` to be an Attack or None, but got {attack!r}."
            )
        if len(mean) != len(std) or not len(std) or min(std) <= 0:
            raise ValueError(
                "Expected arguments `mean` and `std` to have one number for each channel, `std` "
                f"above 0, but got {tuple(mean)} and {tuple(std)}."
            )
        self.root = None if root is None else Path(root).expanduser()
        self.attack = attack
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.image_size = image_size
        self.augment = augment
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.defense_size = defense_size
        self.defense_batch_size = defense_batch_size
        self.defense_seed = defense_seed
        self.seed = seed
        self._attack_is_prepared = False
        self._generator = torch.Generator().manual_seed(seed)
        # Primitives, so that checkpoints load with `weights_only=True`, and not for the logger,
        # where Lightning refuses names that the module's hyperparameters have with other values.
        self.save_hyperparameters(
            {
                "root": None if root is None else str(root),
                "attack": None if attack is None else repr(attack),
                "batch_size": batch_size,
                "image_size": image_size,
                "augment": augment,
                "mean": [float(value) for value in mean],
                "std": [float(value) for value in std],
                "defense_size": defense_size,
                "defense_seed": defense_seed,
                "seed": seed,
            },
            logger=False,
        )

    @property
    @abstractmethod
    def class_names(self) -> list[str]:
        """Names of the classes; a class's place is its label."""

    @abstractmethod
    def load(self, split: Split) -> ImageDataset:
        """Give the clean images of one split as they are stored, resized to ``image_size``."""

    def keep(self, images: ImageDataset) -> ImageDataset:
        """Read images into memory that are used again and again; a subclass may leave them.

        Args:
            images: The images of one split.
        """
        return images if isinstance(images, MemoryDataset) else images.to_memory()

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return len(self.class_names)

    @cached_property
    def _stored_train_set(self) -> ImageDataset:
        return self._checked(self.load("train"), "train")

    @cached_property
    def clean_train_set(self) -> ImageDataset:
        """The training images before any attack, read at first use."""
        return self.keep(self._stored_train_set)

    @cached_property
    def train_set(self) -> ImageDataset:
        """The training images, poisoned where there is an attack."""
        if self.attack is None:
            return self.clean_train_set
        if isinstance(self.attack, TrainingAttack):
            name = type(self.attack).__name__
            raise ValueError(
                f"Expected argument `attack` to poison stored images, but got {name}, which is "
                f"trained with the network. Give it to its module, `{name}Module`, or measure "
                "with its saved trigger, `SavedTrigger`."
            )
        self._prepare_attack()
        return PoisonedDataset(
            self.clean_train_set, self.attack, self.poisoned_indices, self.num_classes
        )

    @cached_property
    def test_set(self) -> ImageDataset:
        """The clean test images, read at first use."""
        return self.keep(self._checked(self.load("test"), "test"))

    @cached_property
    def triggered_set(self) -> TriggeredDataset | None:
        """The test images with the trigger; None without an attack."""
        if self.attack is None:
            return None
        self._prepare_attack()
        return TriggeredDataset(self.test_set, self.attack, self.num_classes)

    @cached_property
    def poisoned_indices(self) -> Tensor:
        """Sorted indices of the poisoned training images; empty without an attack."""
        if self.attack is None:
            return torch.zeros(0, dtype=torch.long)
        return self.attack.poison_indices(self._stored_train_set.labels, self.num_classes)

    @cached_property
    def defense_indices(self) -> Tensor:
        """Indices of the defense set among the training images, in the order of its loader."""
        return balanced_indices(
            self._stored_train_set.labels,
            self.defense_size,
            self.defense_seed,
            self.num_classes,
            argument="defense_size",
        )

    @cached_property
    def defense_set(self) -> MemoryDataset:
        """The defense set: clean training images with their true labels, in memory."""
        # From where they are stored, so that an audit does not read the whole training set.
        chosen = self.defense_indices
        images = self._stored_train_set.fetch(chosen.tolist())
        return MemoryDataset(images, self._stored_train_set.labels[chosen])

    def setup(self, stage: str) -> None:
        """Read and poison what the stage needs; what was read before is kept.

        Args:
            stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
        """
        if stage == "fit":
            _ = self.train_set
        _ = self.test_set, self.triggered_set

    def train_dataloader(self) -> DataLoader[Any]:
        """Give (images, labels), shuffled, augmented and poisoned."""
        processes = getattr(self.trainer, "world_size", 1)
        rank = getattr(self.trainer, "global_rank", 0) if processes > 1 else None
        transform = BatchTransform(
            self.mean, self.std, self.augment, self.flip, self._generator, rank
        )
        # A last batch of one image is left out: batch normalization may not be able to take it.
        share = math.ceil(len(self.train_set) / processes)  # Lightning gives each process as many
        single = share % self.batch_size == 1 and share > 1
        return self._loader(
            self.train_set,
            transform,
            self.batch_size,
            shuffle=True,
            drop_last=single and self.batch_size > 1,
            generator=self._generator,
        )

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Give the clean test images and, where there is an attack, the triggered ones."""
        transform = BatchTransform(self.mean, self.std)
        sets = (
            [self.test_set] if self.triggered_set is None else [self.test_set, self.triggered_set]
        )
        return [self._loader(images, transform, self.batch_size) for images in sets]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Give the same as :meth:`val_dataloader`."""
        return self.val_dataloader()

    def defense_dataloader(self) -> DataLoader[Any]:
        """Give (images, labels) of the defense set: clean, true labels, always the same order."""
        transform = BatchTransform(self.mean, self.std)
        return self._loader(self.defense_set, transform, self.defense_batch_size)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the generator of order and augmentation, to go on where it was."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set the state of the generator.

        Args:
            state_dict: As returned by :meth:`state_dict`.
        """
        self._generator.set_state(state_dict["generator"])

    def _loader(
        self,
        images: ImageDataset,
        transform: BatchTransform,
        batch_size: int,
        shuffle: bool = False,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
    ) -> DataLoader[Any]:
        return DataLoader(
            images,
            batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            collate_fn=transform,
            pin_memory=torch.cuda.is_available(),
            drop_last=drop_last,
            generator=generator,
            # Workers that stay are seeded once, so a resumed training would draw other numbers.
            persistent_workers=self.num_workers > 0 and generator is None,
        )

    def _prepare_attack(self) -> None:
        if self.attack is not None and not self._attack_is_prepared:
            self.attack.prepare(self.test_set, self.num_classes)
            self._attack_is_prepared = True

    def _checked(self, images: ImageDataset, split: Split) -> ImageDataset:
        if len(images) == 0:
            raise ValueError(f"Expected the {split} set in {self.root} to hold images, but got 0.")
        channels = images.fetch([0]).shape[1]
        if channels != len(self.mean):
            raise ValueError(
                f"Expected arguments `mean` and `std` to have {channels} numbers, one for each "
                f"channel of the images, but got {len(self.mean)}."
            )
        return images

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
from torch.utils.data import DataLoader

from lightning_mnp.attacks import Attack, SavedTrigger, TrainingAttack
from lightning_mnp.data.dataset import (
    ImageDataset,
    MemoryDataset,
    PoisonedDataset,
    TriggeredDataset,
)
from lightning_mnp.data.loader import BatchDataset, BatchLoader, EpochSampler
from lightning_mnp.data.transform import BatchTransform
from lightning_mnp.defense_data.subset import balanced_indices

__all__ = ["BackdoorDataModule", "Split"]

Split = Literal["train", "test"]

_CPU = torch.device("cpu")


class BackdoorDataModule(LightningDataModule, ABC):
    """Images for training, attacking and defending a classifier.

    An attack poisons the training images as they are stored. Augmentation and normalization come
    after it. Every loader yields normalized float32 images:

    - ``train_dataloader``: (images, labels), shuffled, poisoned if there is an attack;
    - ``val_dataloader`` and ``test_dataloader``: a list of loaders. The first has the clean test
      images, (images, labels). If there is an attack, a second one has the triggered test images,
      (images, attacker's labels, true labels), without those whose true label is the attacker's;
    - ``defense_dataloader``: (images, labels) of a class-balanced part of the clean training
      images, not augmented, always in the same order.

    Validation uses the test images. So do not choose anything by it.

    Images reach the network in one of two ways. The ordinary way makes batches out of single
    images, in worker processes if there are any. With ``on_device``, images are kept in one tensor
    on the device that trains, and whole batches are cut out, augmented and normalized there. Both
    ways poison the same images, and test images are equal. Training images are augmented by other
    random numbers and come in another order.

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
        seed: Seed of the order and the augmentation of training images. In several processes, the
            order follows Lightning's ``seed_everything`` instead.
        on_device: Whether to keep images in one tensor on the device that trains (a CPU or a CUDA
            device; for others, on the CPU) and to make whole batches there. It needs
            ``num_workers`` to be 0. None for yes if ``num_workers`` is 0.

    Raises:
        ValueError: If an argument is out of range.
    """

    flip: ClassVar[bool] = True
    """Whether an image's mirror image is of the same class."""

    def __init__(
        self,
        root: Path | str | None,
        attack: Attack | None,
        *,
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
        on_device: bool | None = False,
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
        if on_device and num_workers > 0:
            raise ValueError(
                f"Expected argument `num_workers` to be 0 with `on_device`, but got {num_workers}: "
                "batches are made without worker processes. Set one of the two."
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
        self.on_device = num_workers == 0 if on_device is None else on_device
        self._attack_is_prepared = False
        self._generator = torch.Generator().manual_seed(seed)
        self._epoch = 0
        self._sampler: EpochSampler | None = None
        self._on_device: dict[tuple[str, torch.device], BatchDataset] = {}
        # Primitives, so that checkpoints load with `weights_only=True`, and not for the logger,
        # to which Lightning refuses to hand a name twice, with the module's value and another one.
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
                "on_device": self.on_device,
            },
            logger=False,
        )

    @property
    @abstractmethod
    def class_names(self) -> list[str]:
        """Names of the classes; a class's place is its label."""

    @abstractmethod
    def load(self, split: Split) -> ImageDataset:
        """Return the clean images of one split as they are stored, resized to ``image_size``.

        Args:
            split: ``"train"`` or ``"test"``.
        """

    def keep(self, images: ImageDataset) -> ImageDataset:
        """Read images into memory that each epoch uses; a subclass may leave them on the disk.

        Args:
            images: The images of one split.
        """
        return images.to_memory()

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
        """The training images, poisoned if there is an attack."""
        if self.attack is None:
            return self.clean_train_set
        attack = self.attack.attack if isinstance(self.attack, SavedTrigger) else self.attack
        if isinstance(attack, TrainingAttack):
            name = type(attack).__name__
            given = name if attack is self.attack else f"the saved trigger of {name}"
            raise ValueError(
                f"Expected argument `attack` to poison stored images, but got {given}, which is "
                f"trained with the network. Give it to its module, `{name}Module`, or measure with "
                "its saved trigger, `SavedTrigger`, without training."
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
        # Out of the stored images, so that an audit does not read the whole training set.
        chosen = self.defense_indices
        images = self._stored_train_set.fetch(chosen.tolist())
        return MemoryDataset(images, self._stored_train_set.labels[chosen], self.class_names)

    def setup(self, stage: str) -> None:
        """Read and poison what the stage needs; what was read before is kept.

        Args:
            stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
        """
        if stage == "fit":
            _ = self.train_set
        _ = self.test_set, self.triggered_set

    def teardown(self, stage: str) -> None:
        """Free the device's memory.

        Args:
            stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
        """
        self._on_device.clear()

    def train_dataloader(self) -> DataLoader[Any]:
        """Return a loader of (images, labels), shuffled, augmented and poisoned."""
        processes = getattr(self.trainer, "world_size", 1)
        rank = getattr(self.trainer, "global_rank", 0) if processes > 1 else None
        transform = BatchTransform(
            self.mean, self.std, self.augment, self.flip, self._generator, rank, self.seed
        )
        # A last batch of one image is left out: batch normalization may not be able to take it.
        share = math.ceil(len(self.train_set) / processes)  # Lightning gives each process as many
        drop_last = share % self.batch_size == 1 and share > 1 and self.batch_size > 1
        if self.on_device:
            return self._batch_loader("train", self.train_set, transform, drop_last)
        return self._loader(
            self.train_set, transform, self.batch_size, True, drop_last, self._generator
        )

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Return loaders of the clean test images and, if there is an attack, the triggered ones.

        See the class for what they yield.
        """
        transform = BatchTransform(self.mean, self.std)
        sets: dict[str, ImageDataset] = {"test": self.test_set}
        if self.triggered_set is not None:
            sets["triggered"] = self.triggered_set
        if self.on_device:
            return [self._batch_loader(name, images, transform) for name, images in sets.items()]
        return [self._loader(images, transform, self.batch_size) for images in sets.values()]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Return the same as :meth:`val_dataloader`."""
        return self.val_dataloader()

    def defense_dataloader(self) -> DataLoader[Any]:
        """Return a loader of the defense set: clean images, true labels, always in one order."""
        transform = BatchTransform(self.mean, self.std)
        return self._loader(self.defense_set, transform, self.defense_batch_size)

    def state_dict(self) -> dict[str, Any]:
        """Return what the order and the augmentation of the next epoch depend on."""
        epoch = self._epoch if self._sampler is None else self._sampler.epoch
        return {"generator": self._generator.get_state(), "epoch": epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the epoch after the last one.

        Args:
            state_dict: As returned by :meth:`state_dict`.
        """
        self._generator.set_state(state_dict["generator"])
        self._epoch = int(state_dict.get("epoch", 0))
        if self._sampler is not None:
            self._sampler.set_epoch(self._epoch)

    def _batch_loader(
        self, name: str, images: ImageDataset, transform: BatchTransform, drop_last: bool = False
    ) -> BatchLoader:
        device = getattr(getattr(self.trainer, "strategy", None), "root_device", _CPU)
        key = name, device if device.type in ("cpu", "cuda") else _CPU
        if key not in self._on_device:
            self._on_device[key] = BatchDataset(images, key[1])
        if name == "train" and self._sampler is None:
            self._sampler = EpochSampler(range(len(images)), self.seed)
            self._sampler.set_epoch(self._epoch)
        return BatchLoader(
            self._on_device[key],
            self.batch_size,
            sampler=self._sampler if name == "train" else None,
            collate_fn=transform,
            drop_last=drop_last,
        )

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
            place = "" if self.root is None else f" in {self.root}"
            raise ValueError(f"Expected the {split} set{place} to hold images, but got 0.")
        channels = images.fetch([0]).shape[1]
        if channels != len(self.mean):
            raise ValueError(
                f"Expected arguments `mean` and `std` to have {channels} numbers, one for each "
                f"channel of the images, but got {len(self.mean)}."
            )
        return images

"""The images of the population: decoded once, kept in one file for each data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.population.recipes import NORMALIZATIONS, Recipe
from lightning_mnp import DefenseSet
from lightning_mnp.attacks import Attack
from lightning_mnp.checkpoints.atomic_write import write_atomically
from lightning_mnp.data import (
    BackdoorDataModule,
    CIFAR10DataModule,
    DigitsDataModule,
    ImageFolderDataModule,
    MemoryDataset,
    balanced_indices,
)
from lightning_mnp.data.transform import BatchTransform

__all__ = ["Images", "PopulationData", "defense_set", "load_images", "transform_of"]

CLASSES = 10
DEFENSE_SIZE = {"cifar10": 500, "imagenette": 500, "digits": 200}


@dataclass(frozen=True)
class Images:
    """A data set in memory, uint8.

    The test images are split in two: every second one is measured on, and defense sets are drawn
    from the others. So a defense set has images that the network was not trained on, and none that
    CA and ASR are measured on.

    Attributes:
        train: Training images, shape (N, 3, H, W).
        train_labels: Their classes, shape (N,).
        test: Test images, shape (M, 3, H, W).
        test_labels: Their classes, shape (M,).
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    @property
    def measured(self) -> MemoryDataset:
        """The test images that CA and ASR are measured on."""
        return MemoryDataset(self.test[::2], self.test_labels[::2])

    @property
    def held_out(self) -> MemoryDataset:
        """The test images that defense sets are drawn from."""
        return MemoryDataset(self.test[1::2], self.test_labels[1::2])


def load_images(name: str, root: Path, cache: Path) -> Images:
    """Read a data set, from the cache if it was read before.

    Args:
        name: ``"cifar10"``, ``"imagenette"`` (64 pixels) or ``"digits"`` (32 pixels, three equal
            channels; half of them are test images).
        root: Folder with the folders ``cifar10`` and ``imagenette``.
        cache: Folder for the decoded images.

    Returns:
        The images; those of each split in the order of their labels, or shuffled for digits.

    Raises:
        FileNotFoundError: If the images are missing.
    """
    file = cache / f"{name}.safetensors"
    if not file.exists():
        modules: dict[str, BackdoorDataModule] = {
            "cifar10": CIFAR10DataModule(root / "cifar10"),
            "imagenette": ImageFolderDataModule(root / "imagenette", image_size=64),
            "digits": DigitsDataModule(test_share=0.5, image_size=32),
        }
        parts = {split: modules[name].load(split).to_memory() for split in ("train", "test")}
        tensors = {
            key: value
            for split, part in parts.items()
            for key, value in (
                (split, part.images.expand(-1, 3, -1, -1).contiguous()),
                (f"{split}_labels", part.labels),
            )
        }
        cache.mkdir(parents=True, exist_ok=True)
        write_atomically(
            file, lambda partial: save_file(tensors, partial), argument="folder", replace=True
        )
    return Images(**load_file(file))


def transform_of(recipe: Recipe) -> BatchTransform:
    """Return what turns stored images into what a network of this recipe takes."""
    return BatchTransform(*NORMALIZATIONS[recipe.normalization])


def defense_set(recipe: Recipe, images: Images, number: int) -> DefenseSet:
    """Draw a class-balanced defense set for a network, other images for each network and number.

    Args:
        recipe: How the network was trained.
        images: Its data set.
        number: From 0.

    Returns:
        500 images, or 200 digits, normalized as in training.
    """
    stored = images.held_out
    size = DEFENSE_SIZE[recipe.data]
    rows = balanced_indices(stored.labels, size, 1000 * recipe.seed + number, CLASSES)
    return DefenseSet(transform_of(recipe).images(stored.images[rows]), stored.labels[rows])


def training_images(recipe: Recipe, images: Images) -> MemoryDataset:
    """Choose the training images of a recipe: as many of each class, fewer of a rare one."""
    each = recipe.images // CLASSES
    rows = []
    for label in range(CLASSES):
        members = (images.train_labels == label).nonzero().flatten()
        rows.append(members[: each // 5 if label == recipe.rare_class else each])
    chosen = torch.cat(rows)
    return MemoryDataset(images.train[chosen], images.train_labels[chosen])


class PopulationData(BackdoorDataModule):
    """The images of one recipe, poisoned if there is an attack on stored images.

    Args:
        recipe: How the network is trained.
        train: Its training images, clean.
        attack: Attack on them; None for a clean network and for an attack that has a module.
        augment: Whether images are shifted and mirrored.
    """

    def __init__(
        self, recipe: Recipe, train: MemoryDataset, attack: Attack | None, augment: bool
    ) -> None:
        mean, std = NORMALIZATIONS[recipe.normalization]
        super().__init__(
            None,
            attack,
            batch_size=recipe.batch,
            num_workers=0,
            image_size=None,
            augment=augment,
            mean=mean,
            std=std,
            defense_size=1,
            defense_batch_size=1,
            defense_seed=0,
            seed=recipe.seed,
            on_device=True,
        )
        self.images = train

    @property
    def class_names(self) -> list[str]:
        """The ten labels."""
        return [str(label) for label in range(CLASSES)]

    def load(self, split: Any) -> MemoryDataset:
        """Return the training images; CA and ASR are measured after training, on others."""
        return self.images

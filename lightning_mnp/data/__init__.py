"""Data sets and datamodules with clean, poisoned and triggered images."""

from lightning_mnp.data.cifar10 import CIFAR10DataModule
from lightning_mnp.data.datamodule import BackdoorDataModule
from lightning_mnp.data.dataset import (
    FolderDataset,
    ImageDataset,
    MemoryDataset,
    PoisonedDataset,
    TriggeredDataset,
)
from lightning_mnp.data.digits import DigitsDataModule
from lightning_mnp.data.folder import ImageFolderDataModule
from lightning_mnp.data.imagenet import ImageNetSubsetDataModule
from lightning_mnp.defense_data.augment import random_crop_flip
from lightning_mnp.defense_data.subset import balanced_indices

__all__ = [
    "BackdoorDataModule",
    "CIFAR10DataModule",
    "DigitsDataModule",
    "FolderDataset",
    "ImageDataset",
    "ImageFolderDataModule",
    "ImageNetSubsetDataModule",
    "MemoryDataset",
    "PoisonedDataset",
    "TriggeredDataset",
    "balanced_indices",
    "random_crop_flip",
]

"""CIFAR-10, from torchvision's files or from image folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torchvision.datasets import CIFAR10

from lightning_mnp.attacks import Attack
from lightning_mnp.data.datamodule import BackdoorDataModule, Split
from lightning_mnp.data.dataset import FolderDataset, ImageDataset, MemoryDataset
from lightning_mnp.data.folder import class_folders
from lightning_mnp.defense_data.resizing import resize_and_crop

__all__ = ["CIFAR10DataModule"]

CLASSES = [
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
]


class CIFAR10DataModule(BackdoorDataModule):
    """CIFAR-10: 50,000 training and 10,000 test images of 32x32 pixels in ten classes.

    The images lie under ``root`` in one of two layouts: ``cifar-10-batches-py``, as torchvision
    downloads it, or image folders ``train/<class>`` and ``test/<class>`` with the official class
    names. The labels are the same. All images are kept in memory, 184 MB; poisoned ones on a device
    take another 154 MB.

    Args:
        root: Folder with one of the two layouts, or the folder to download to.
        attack: See :class:`BackdoorDataModule`.
        download: Whether to download the data if neither layout is found, and what is missing of a
            download that was interrupted.
        batch_size: See :class:`BackdoorDataModule`.
        num_workers: See :class:`BackdoorDataModule`.
        image_size: See :class:`BackdoorDataModule`; None for 32.
        augment: See :class:`BackdoorDataModule`.
        mean: See :class:`BackdoorDataModule`; by default that of the training images.
        std: See :class:`BackdoorDataModule`; by default that of the training images.
        defense_size: See :class:`BackdoorDataModule`; 500 images are 1% of the training images.
        defense_batch_size: See :class:`BackdoorDataModule`.
        defense_seed: See :class:`BackdoorDataModule`.
        seed: See :class:`BackdoorDataModule`.
        on_device: Whether to keep images in one tensor on the device that trains and to make whole
            batches there, see :class:`BackdoorDataModule`. None for yes if ``num_workers`` is 0.

    Raises:
        ValueError: If an argument is out of range.
        FileNotFoundError: When prepared or set up, if the data or a part of it is missing.
    """

    def __init__(
        self,
        root: Path | str = "data",
        attack: Attack | None = None,
        download: bool = False,
        batch_size: int = 128,
        num_workers: int = 0,
        image_size: int | None = None,
        augment: bool = True,
        mean: Sequence[float] = (0.4914, 0.4822, 0.4465),
        std: Sequence[float] = (0.2470, 0.2435, 0.2616),
        defense_size: int = 500,
        defense_batch_size: int = 128,
        defense_seed: int = 0,
        seed: int = 0,
        on_device: bool | None = None,
    ) -> None:
        super().__init__(
            root,
            attack,
            batch_size=batch_size,
            num_workers=num_workers,
            image_size=image_size,
            augment=augment,
            mean=mean,
            std=std,
            defense_size=defense_size,
            defense_batch_size=defense_batch_size,
            defense_seed=defense_seed,
            seed=seed,
            on_device=on_device,
        )
        self.download = download

    @property
    def class_names(self) -> list[str]:
        """The ten class names, in alphabetical order, which is the official one."""
        return list(CLASSES)

    def prepare_data(self) -> None:
        """Download what is missing of the data if ``download`` is set.

        Raises:
            FileNotFoundError: If it is missing and ``download`` is not set.
        """
        layout = self._layout()
        if layout is None and not self.download:
            raise FileNotFoundError(
                f"CIFAR-10 not found in root={str(self.root)!r} and download=False, either "
                "set `root` to a folder with `cifar-10-batches-py` or with image folders "
                "`train/<class>` and `test/<class>`, or set `download=True`."
            )
        if layout != "folders" and self.download:  # does nothing if all files are there
            CIFAR10(str(self.root), train=True, download=True)

    def load(self, split: Split) -> ImageDataset:
        """Return the clean images of one split.

        Args:
            split: ``"train"`` or ``"test"``.
        """
        self.prepare_data()
        assert self.root is not None
        if self._layout() == "folders":
            return FolderDataset(self.root / split, CLASSES, self.image_size or 32)
        try:
            stored = CIFAR10(str(self.root), train=split == "train")
        except RuntimeError as error:  # torchvision compares checksums
            raise FileNotFoundError(
                f"Expected {str(self.root / CIFAR10.base_folder)!r} to hold all files of CIFAR-10, "
                "but some are missing or damaged. Set `download=True`, or copy them again."
            ) from error
        images = torch.from_numpy(stored.data).permute(0, 3, 1, 2).contiguous()
        if self.image_size is not None:
            images = torch.cat(
                [resize_and_crop(part, self.image_size) for part in torch.split(images, 1000)]
            )
        return MemoryDataset(images, torch.tensor(stored.targets))

    def _layout(self) -> Literal["batches", "folders"] | None:
        assert self.root is not None
        if (self.root / CIFAR10.base_folder).is_dir():
            return "batches"
        if not all((self.root / split).is_dir() for split in ("train", "test")):
            return None
        for split in ("train", "test"):
            found = class_folders(self.root / split)
            if found != CLASSES:
                raise ValueError(
                    f"Expected the class folders in {str(self.root / split)!r} to be {CLASSES}, "
                    f"but got {found}. For other classes use ImageFolderDataModule."
                )
        return "folders"

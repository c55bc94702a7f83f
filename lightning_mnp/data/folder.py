"""Any tree of image folders: one folder per split, in it one folder per class."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from lightning_mnp.attacks import Attack
from lightning_mnp.data.datamodule import BackdoorDataModule, Split
from lightning_mnp.data.dataset import FolderDataset, ImageDataset

__all__ = ["ImageFolderDataModule", "class_folders"]

MEMORY_LIMIT = 2 * 1024**3


class ImageFolderDataModule(BackdoorDataModule):
    """Images in a tree ``root/<split>/<class>/<image>``, as torchvision's ``ImageFolder`` reads it.

    Labels follow the class folders' names in alphabetical order.

    Args:
        root: Folder with a folder for each split.
        attack: See :class:`BackdoorDataModule`.
        train_folder: Name of the folder with the training images.
        test_folder: Name of the folder with the test images; None for ``test`` or, if there is
            none, ``val``.
        classes: Names of the class folders to use, such as twelve of ImageNet's thousand; None for
            all of them.
        in_memory: Whether to decode all images once and keep them. If not, images are read when
            they are needed. None for yes if a split takes at most 2 GiB, or with ``on_device``.
        batch_size: See :class:`BackdoorDataModule`.
        num_workers: See :class:`BackdoorDataModule`.
        image_size: See :class:`BackdoorDataModule`; None needs images that all have one size.
        augment: See :class:`BackdoorDataModule`.
        mean: See :class:`BackdoorDataModule`; by default ImageNet's.
        std: See :class:`BackdoorDataModule`; by default ImageNet's.
        defense_size: See :class:`BackdoorDataModule`.
        defense_batch_size: See :class:`BackdoorDataModule`.
        defense_seed: See :class:`BackdoorDataModule`.
        seed: See :class:`BackdoorDataModule`.
        on_device: Whether to keep images in one tensor on the device that trains and to make whole
            batches there, see :class:`BackdoorDataModule`. Both splits have to fit into its memory.

    Raises:
        ValueError: If an argument is out of range.
        FileNotFoundError: When set up, if a folder is missing.
    """

    def __init__(
        self,
        root: Path | str = "data",
        attack: Attack | None = None,
        train_folder: str = "train",
        test_folder: str | None = None,
        classes: Sequence[str] | None = None,
        in_memory: bool | None = None,
        batch_size: int = 128,
        num_workers: int = 0,
        image_size: int | None = 224,
        augment: bool = True,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        defense_size: int = 500,
        defense_batch_size: int = 128,
        defense_seed: int = 0,
        seed: int = 0,
        on_device: bool = False,
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
        if classes is not None and (len(classes) < 2 or len(set(classes)) != len(classes)):
            raise ValueError(
                "Expected argument `classes` to be at least two different folder names, but got "
                f"{list(classes)}."
            )
        if on_device and in_memory is False:
            raise ValueError(
                "Expected argument `in_memory` to be True or None with `on_device`, but got False. "
                "Set one of the two."
            )
        self.train_folder = train_folder
        self.test_folder = test_folder
        self.classes = classes
        self.in_memory = in_memory

    @cached_property
    def _class_names(self) -> list[str]:
        found = class_folders(self._split_folder("train"))
        if self.classes is None:
            return found
        missing = sorted(set(self.classes) - set(found))
        if missing:
            raise FileNotFoundError(
                f"Expected argument `classes` to be names of folders in "
                f"{str(self._split_folder('train'))!r}, but there is none of {missing}."
            )
        return sorted(self.classes)

    @property
    def class_names(self) -> list[str]:
        """Names of the class folders, in alphabetical order."""
        return self._class_names

    def prepare_data(self) -> None:
        """Check that the folders exist.

        Raises:
            FileNotFoundError: If a split or one of its classes has no folder.
            ValueError: If the splits have different classes.
        """
        _ = self.class_names
        others = class_folders(self._split_folder("test"))
        if self.classes is None and others != self.class_names:
            different = sorted(set(others) ^ set(self.class_names))
            raise ValueError(
                f"Expected the same class folders in {str(self._split_folder('train'))!r} and "
                f"{str(self._split_folder('test'))!r}, but these are in one of them only: "
                f"{different}. Choose common ones with `classes`."
            )

    def load(self, split: Split) -> ImageDataset:
        """Return the clean images of one split.

        Args:
            split: ``"train"`` or ``"test"``.
        """
        if split == "test":
            self.prepare_data()
        return FolderDataset(self._split_folder(split), self.class_names, self.image_size)

    def keep(self, images: ImageDataset) -> ImageDataset:
        """Read images into memory if ``in_memory`` says so.

        Args:
            images: The images of one split.
        """
        in_memory = self.in_memory
        if in_memory is None:
            size = len(images) * images.fetch([0]).numel()
            in_memory = self.on_device or size <= MEMORY_LIMIT
        return images.to_memory() if in_memory else images

    def _split_folder(self, split: Split) -> Path:
        assert self.root is not None
        if split == "train":
            names = [self.train_folder]
        else:
            names = ["test", "val"] if self.test_folder is None else [self.test_folder]
        for name in names:
            if (self.root / name).is_dir():
                return self.root / name
        raise FileNotFoundError(
            f"Expected a folder {' or '.join(repr(name) for name in names)} with the {split} "
            f"images in root={str(self.root)!r}, but found none. Either set `root` to the folder "
            f"above it or name it with `{split}_folder`."
        )


def class_folders(folder: Path) -> list[str]:
    """List the class folders in a folder, in alphabetical order.

    Args:
        folder: The folder of one split.

    Returns:
        Names of the folders in it, without hidden ones.

    Raises:
        FileNotFoundError: If there are fewer than two.
    """
    names = sorted(
        path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
    if len(names) < 2:
        raise FileNotFoundError(
            f"Expected at least two class folders in {str(folder)!r}, but found {len(names)}."
        )
    return names

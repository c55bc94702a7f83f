"""A few classes of ImageNet, out of its full folder or from Imagenette."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

from torchvision.models import ResNet18_Weights

from lightning_mnp.attacks import Attack
from lightning_mnp.data.datamodule import Split
from lightning_mnp.data.dataset import ImageDataset
from lightning_mnp.data.folder import ImageFolderDataModule, class_folders

__all__ = ["ImageNetSubsetDataModule", "Preset"]

Preset = Literal["imagenet12", "imagenette"]

_IMAGENETTE = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
_PRESETS: dict[str, dict[str, str]] = {
    "imagenet12": {**_IMAGENETTE, "n02123045": "tabby", "n02504458": "African elephant"},
    "imagenette": _IMAGENETTE,
}


class ImageNetSubsetDataModule(ImageFolderDataModule):
    """Some classes of ImageNet, in folders ``train/<WordNet ID>`` and ``val/<WordNet ID>``.

    ``root`` may hold all classes of ImageNet: only the folders of the chosen ones are read. Labels
    follow the WordNet IDs in alphabetical order. So class 0 of both presets is the tench.

    The paper takes twelve classes of ImageNet and does not name them. The preset
    ``"imagenet12"`` has the ten classes of Imagenette, tabby and African elephant: twelve that are
    easy to tell apart. Any others can be chosen with ``classes``.

    Args:
        root: Folder with ``train`` and ``val``.
        attack: See :class:`BackdoorDataModule`.
        preset: ``"imagenet12"`` for twelve classes, ``"imagenette"`` for the ten of Imagenette.
        classes: WordNet IDs of other classes, at least two, instead of the preset's.
        in_memory: See :class:`ImageFolderDataModule`. Twelve classes of ImageNet take 2.3 GB at
            224 pixels and 0.2 GB at 64.
        batch_size: See :class:`BackdoorDataModule`; the paper's is 64.
        num_workers: See :class:`BackdoorDataModule`.
        image_size: See :class:`BackdoorDataModule`; None needs images that all have one size.
        augment: See :class:`BackdoorDataModule`.
        mean: See :class:`BackdoorDataModule`; by default ImageNet's.
        std: See :class:`BackdoorDataModule`; by default ImageNet's.
        defense_size: See :class:`BackdoorDataModule`; 156 images are 1% of twelve classes.
        defense_batch_size: See :class:`BackdoorDataModule`.
        defense_seed: See :class:`BackdoorDataModule`.
        seed: See :class:`BackdoorDataModule`.
        on_device: Whether to keep images in one tensor on the device that trains and to make whole
            batches there, see :class:`BackdoorDataModule`. Both splits have to fit into its memory.

    Raises:
        ValueError: If an argument is out of range.
        FileNotFoundError: When set up, if a folder is missing.

    Example:
        >>> ImageNetSubsetDataModule(preset="imagenette", image_size=64).readable_names[:2]
        ['tench', 'English springer']
    """

    def __init__(
        self,
        root: Path | str = "data",
        attack: Attack | None = None,
        preset: Preset = "imagenet12",
        classes: Sequence[str] | None = None,
        in_memory: bool | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        image_size: int | None = 224,
        augment: bool = True,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        defense_size: int = 156,
        defense_batch_size: int = 64,
        defense_seed: int = 0,
        seed: int = 0,
        on_device: bool = False,
    ) -> None:
        if preset not in get_args(Preset):
            raise ValueError(
                f"Expected argument `preset` to be one of {get_args(Preset)}, but got {preset!r}. "
                "Other classes are chosen with `classes`."
            )
        super().__init__(
            root,
            attack,
            train_folder="train",
            test_folder="val",
            classes=list(_PRESETS[preset]) if classes is None else classes,
            in_memory=in_memory,
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
        self.preset = preset
        self._chosen: list[str] = sorted(self.classes or ())

    @property
    def class_names(self) -> list[str]:
        """WordNet IDs of the classes, in alphabetical order, which are their folders' names."""
        return list(self._chosen)

    @cached_property
    def readable_names(self) -> list[str]:
        """English names of the classes, in the order of the labels.

        Those of the presets are known. Those of other classes are known if ``root`` holds all 1000
        classes. A class whose name is not known has its WordNet ID.
        """
        known = dict(_PRESETS["imagenet12"])
        if not set(self._chosen) <= known.keys() and self.root and (self.root / "train").is_dir():
            found = class_folders(self.root / "train")
            names = ResNet18_Weights.DEFAULT.meta["categories"]
            if len(found) == len(names):  # torchvision lists all names by WordNet ID
                known = dict(zip(found, names, strict=True)) | known
        return [known.get(name, name) for name in self._chosen]

    def prepare_data(self) -> None:
        """Check that the folders exist.

        Raises:
            FileNotFoundError: If a split or one of its classes has no folder.
        """
        splits: tuple[Split, ...] = ("train", "test")
        for split in splits:
            folder = self._split_folder(split)
            missing = sorted(set(self._chosen) - set(class_folders(folder)))
            if missing:
                raise FileNotFoundError(
                    f"Expected folders of the {len(self._chosen)} chosen classes in "
                    f"{str(folder)!r}, but there is none of {missing}. Choose others with "
                    "`preset` or `classes`."
                )

    def load(self, split: Split) -> ImageDataset:
        """Return the clean images of one split.

        Args:
            split: ``"train"`` or ``"test"``, which ImageNet calls ``val``.
        """
        self.prepare_data()
        return super().load(split)

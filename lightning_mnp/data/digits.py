"""Scikit-learn's handwritten digits, which need no download."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar

import torch
from torchvision.transforms.v2 import functional as V

from lightning_mnp.attacks import Attack
from lightning_mnp.data.datamodule import BackdoorDataModule, Split
from lightning_mnp.data.dataset import ImageDataset, MemoryDataset

__all__ = ["DigitsDataModule"]


class DigitsDataModule(BackdoorDataModule):
    """Scikit-learn's digits: 1,797 gray images of 8x8 pixels in ten classes.

    The set has no official split: a stratified one is drawn from ``split_seed``.

    Args:
        attack: See :class:`BackdoorDataModule`.
        test_share: Share of the images that are test images, above 0 and below 1.
        split_seed: Seed of the split.
        batch_size: See :class:`BackdoorDataModule`.
        num_workers: See :class:`BackdoorDataModule`.
        image_size: Side that images are scaled up to, such as 16; None for 8.
        augment: See :class:`BackdoorDataModule`; digits are shifted, never mirrored.
        mean: See :class:`BackdoorDataModule`.
        std: See :class:`BackdoorDataModule`.
        defense_size: See :class:`BackdoorDataModule`.
        defense_batch_size: See :class:`BackdoorDataModule`.
        defense_seed: See :class:`BackdoorDataModule`.
        seed: See :class:`BackdoorDataModule`.
        on_device: Whether to keep images in one tensor on the device that trains and to make whole
            batches there, see :class:`BackdoorDataModule`. None for yes if ``num_workers`` is 0.

    Raises:
        ValueError: If an argument is out of range.
        ModuleNotFoundError: When set up, if scikit-learn is not installed.

    Example:
        >>> datamodule = DigitsDataModule(defense_size=100, defense_batch_size=50)
        >>> images, labels = next(iter(datamodule.defense_dataloader()))
        >>> images.shape
        torch.Size([50, 1, 8, 8])
    """

    flip: ClassVar[bool] = False

    def __init__(
        self,
        attack: Attack | None = None,
        test_share: float = 0.2,
        split_seed: int = 0,
        batch_size: int = 128,
        num_workers: int = 0,
        image_size: int | None = None,
        augment: bool = True,
        mean: Sequence[float] = (0.305,),
        std: Sequence[float] = (0.376,),
        defense_size: int = 200,
        defense_batch_size: int = 100,
        defense_seed: int = 0,
        seed: int = 0,
        on_device: bool | None = None,
    ) -> None:
        super().__init__(
            None,
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
        if not 0.0 < test_share < 1.0:
            raise ValueError(
                f"Expected argument `test_share` to be above 0 and below 1, but got {test_share}."
            )
        self.test_share = test_share
        self.split_seed = split_seed

    @property
    def class_names(self) -> list[str]:
        """The digits from 0 to 9."""
        return [str(digit) for digit in range(10)]

    def load(self, split: Split) -> ImageDataset:
        """Return the clean images of one split."""
        return self._splits[split]

    @cached_property
    def _splits(self) -> dict[Split, MemoryDataset]:
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "DigitsDataModule takes its images from scikit-learn, which is not installed. "
                'Install it with `pip install "lightning-mnp[demo]"`.'
            ) from error
        digits = load_digits()
        # Stored values are 0 to 16.
        images = torch.from_numpy(digits.images).mul(255.0 / 16.0).round().to(torch.uint8)[:, None]
        if self.image_size is not None and self.image_size != images.shape[-1]:
            images = V.resize(images, [self.image_size, self.image_size], antialias=True)
        labels = torch.from_numpy(digits.target).long()
        train, test = train_test_split(
            torch.arange(len(labels)).numpy(),
            test_size=self.test_share,
            random_state=self.split_seed,
            stratify=labels.numpy(),
        )
        return {
            "train": MemoryDataset(images[train], labels[train]),
            "test": MemoryDataset(images[test], labels[test]),
        }

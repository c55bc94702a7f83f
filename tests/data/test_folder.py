from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2 import functional as V

from lightning_mnp.attacks import BadNets
from lightning_mnp.data import FolderDataset, ImageFolderDataModule, MemoryDataset
from lightning_mnp.data import folder as folder_module
from lightning_mnp.data.loader import BatchLoader


def write_split(folder: Path, classes: str = "abc", count: int = 4, size: int = 10) -> None:
    generator = torch.Generator().manual_seed(count)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = torch.randint(0, 256, (3, size, size + 4), generator=generator)
            V.to_pil_image(pixels.to(torch.uint8)).save(folder / name / f"{index}.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_split(tmp_path / "train")
    write_split(tmp_path / "val", count=2)
    (tmp_path / "train" / ".cache").mkdir()
    return tmp_path


def small(root: Path, **options: Any) -> ImageFolderDataModule:
    return ImageFolderDataModule(root, image_size=8, defense_size=3, **options)


@pytest.mark.parametrize("in_memory", [True, False])
def test_labels_are_those_of_torchvision(root: Path, in_memory: bool) -> None:
    datamodule = small(root, in_memory=in_memory)
    datamodule.prepare_data()
    datamodule.setup("fit")
    (root / "train" / ".cache").rmdir()

    assert datamodule.class_names == ImageFolder(str(root / "train")).classes
    assert datamodule.num_classes == 3
    assert datamodule.train_set.labels.tolist() == ImageFolder(str(root / "train")).targets
    assert len(datamodule.test_set) == 6
    assert datamodule.train_set.fetch([0]).shape == (1, 3, 8, 8)
    assert isinstance(datamodule.train_set, MemoryDataset if in_memory else FolderDataset)
    images, labels = next(iter(datamodule.train_dataloader()))
    assert images.shape == (12, 3, 8, 8)
    assert labels.bincount().tolist() == [4, 4, 4]


def test_memory_is_used_where_it_suffices(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(small(root).clean_train_set, MemoryDataset)
    monkeypatch.setattr(folder_module, "MEMORY_LIMIT", 12 * 3 * 8 * 8 - 1)
    assert isinstance(small(root).clean_train_set, FolderDataset)
    assert isinstance(small(root).test_set, MemoryDataset)


def test_both_ways_to_read_give_the_same_batches(root: Path) -> None:
    kept, lazy = (small(root, attack=BadNets(), in_memory=value) for value in (True, False))
    for first, second in zip(kept.val_dataloader(), lazy.val_dataloader(), strict=True):
        for one, other in zip(next(iter(first)), next(iter(second)), strict=True):
            assert one.equal(other)
    one, other = (next(iter(data.train_dataloader())) for data in (kept, lazy))
    assert one[0].equal(other[0])


def test_on_a_device_all_images_are_in_memory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "MEMORY_LIMIT", 1)
    ordinary, fast = (small(root, attack=BadNets(), on_device=each) for each in (False, True))
    assert not isinstance(ordinary.clean_train_set, MemoryDataset)
    assert isinstance(fast.clean_train_set, MemoryDataset)
    assert isinstance(fast.train_dataloader(), BatchLoader)
    for first, second in zip(ordinary.val_dataloader(), fast.val_dataloader(), strict=True):
        for one, other in zip(next(iter(first)), next(iter(second)), strict=True):
            assert one.equal(other)
    with pytest.raises(ValueError, match="`in_memory` to be True or None with `on_device`"):
        small(root, in_memory=False, on_device=True)


def test_an_audit_reads_only_the_defense_images(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    original = folder_module.FolderDataset.fetch

    def fetch(self: FolderDataset, indices: Any) -> torch.Tensor:
        read.extend(self.paths[index] for index in indices)
        return original(self, indices)

    monkeypatch.setattr(folder_module.FolderDataset, "fetch", fetch)
    datamodule = small(root)
    list(datamodule.defense_dataloader())

    assert len(set(read)) <= 4  # Three images, and one to look at.


def test_folders_have_names_to_choose(root: Path) -> None:
    write_split(root / "test", count=3)
    write_split(root / "more", count=1)
    assert len(small(root).test_set) == 9
    assert len(small(root, test_folder="val").test_set) == 6
    assert len(small(root, train_folder="more").clean_train_set) == 3


def test_classes_can_be_chosen(root: Path) -> None:
    write_split(root / "val" / "unused")
    datamodule = small(root, classes=["c", "a"])
    datamodule.prepare_data()
    assert datamodule.class_names == ["a", "c"]
    assert datamodule.train_set.labels.tolist() == [0] * 4 + [1] * 4
    assert len(datamodule.test_set) == 4


def test_errors(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`classes` to be at least two different folder names"):
        small(root, classes=["a", "a"])
    with pytest.raises(FileNotFoundError, match=r"there is none of .'zebra'."):
        small(root, classes=["a", "zebra"]).prepare_data()
    with pytest.raises(FileNotFoundError, match="folder 'nope' with the train images in root="):
        small(root, train_folder="nope").prepare_data()
    write_split(tmp_path / "alone" / "train")
    with pytest.raises(FileNotFoundError, match=r"folder 'test' or 'val' .*`test_folder`"):
        small(tmp_path / "alone").load("test")
    with pytest.raises(FileNotFoundError, match=r"at least two class folders in .* found 0"):
        small(root, train_folder="train/a").prepare_data()
    write_split(root / "test", classes="abd")
    with pytest.raises(ValueError, match=r"one of them only: \['c', 'd'\]"):
        small(root).prepare_data()
    write_split(root / "other", classes="ab", size=11)
    (root / "train" / "a" / "0.png").replace(root / "other" / "a" / "9.png")
    with pytest.raises(ValueError, match="same channels and size"):
        ImageFolderDataModule(root, train_folder="other", image_size=None).setup("fit")

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10
from torchvision.transforms.v2 import functional as V

from lightning_mnp.data import CIFAR10DataModule
from lightning_mnp.data.cifar10 import CLASSES
from lightning_mnp.data.loader import BatchLoader

BATCHES = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]


def pixels(batch: str, index: int) -> np.ndarray[Any, Any]:
    """An image in the order of the file: 3,072 values, red, green, blue, row by row."""
    rng = np.random.default_rng([BATCHES.index(batch), index])
    return rng.integers(0, 256, 3072, dtype=np.uint8)


def write_batches(root: Path) -> None:
    """Ten images in each of the files that torchvision downloads."""
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    for batch in BATCHES:
        data = np.stack([pixels(batch, index) for index in range(10)])
        labels = [(index * 3) % 10 for index in range(10)]
        (folder / batch).write_bytes(pickle.dumps({"data": data, "labels": labels}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": CLASSES}))


def write_folders(root: Path) -> None:
    """The same images as files."""
    for batch in BATCHES:
        split = "test" if batch == "test_batch" else "train"
        for index in range(10):
            folder = root / split / CLASSES[(index * 3) % 10]
            folder.mkdir(parents=True, exist_ok=True)
            image = torch.from_numpy(pixels(batch, index).reshape(3, 32, 32))
            V.to_pil_image(image).save(folder / f"{batch}_{index}.png")


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files of our own do not have the checksums of the real ones."""
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)


@pytest.mark.usefixtures("unchecked")
def test_both_layouts_give_the_same_images_and_labels(tmp_path: Path) -> None:
    write_batches(tmp_path / "one")
    write_folders(tmp_path / "two")
    one, two = (CIFAR10DataModule(tmp_path / name) for name in ("one", "two"))

    for split in ("clean_train_set", "test_set"):
        stored, files = (getattr(data, split).to_memory() for data in (one, two))
        assert len(stored) == (50 if split == "clean_train_set" else 10)
        for image, label in stored:
            match = (files.images == image).flatten(1).all(1).nonzero().flatten()
            assert files.labels[match].tolist() == [label]


@pytest.mark.usefixtures("unchecked")
def test_images_can_be_resized(tmp_path: Path) -> None:
    write_batches(tmp_path / "one")
    write_folders(tmp_path / "two")
    for name in ("one", "two"):
        datamodule = CIFAR10DataModule(tmp_path / name, image_size=16)
        datamodule.setup("fit")
        assert next(iter(datamodule.train_dataloader()))[0].shape == (50, 3, 16, 16)


@pytest.mark.usefixtures("unchecked")
def test_whole_batches_are_the_default_without_workers(tmp_path: Path) -> None:
    write_batches(tmp_path)
    assert isinstance(CIFAR10DataModule(tmp_path).train_dataloader(), BatchLoader)
    assert not CIFAR10DataModule(tmp_path, num_workers=1).on_device
    fast, ordinary = (CIFAR10DataModule(tmp_path, on_device=each) for each in (True, False))
    for one, other in zip(fast.val_dataloader()[0], ordinary.val_dataloader()[0], strict=True):
        assert one[0].equal(other[0])
        assert one[1].equal(other[1])


def test_the_classes_are_in_alphabetical_order() -> None:
    assert CIFAR10DataModule().class_names == sorted(CLASSES)
    assert CIFAR10DataModule().num_classes == 10


def test_download_is_asked_for_only_where_it_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, bool]] = []

    def download(root: str, train: bool, download: bool = False) -> None:
        calls.append((root, download))
        if not (Path(root) / CIFAR10.base_folder).exists():
            write_batches(Path(root))

    monkeypatch.setattr("lightning_mnp.data.cifar10.CIFAR10", download)
    download.base_folder = CIFAR10.base_folder  # type: ignore[attr-defined]
    datamodule = CIFAR10DataModule(tmp_path, download=True)

    datamodule.prepare_data()
    datamodule.prepare_data()  # torchvision fetches what is missing, if anything is
    CIFAR10DataModule(tmp_path).prepare_data()

    assert calls == [(str(tmp_path), True)] * 2


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        CIFAR10DataModule(tmp_path).setup("fit")
    message = str(caught.value)
    assert f"not found in root={str(tmp_path)!r} and download=False" in message
    assert "`cifar-10-batches-py`" in message
    assert "set `download=True`" in message
    interrupted = tmp_path / "half"
    (interrupted / CIFAR10.base_folder).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"half.*some are missing or damaged. Set `downloa"):
        CIFAR10DataModule(interrupted).setup("fit")
    write_folders(tmp_path)
    (tmp_path / "test" / "zebra").mkdir()
    with pytest.raises(ValueError, match=r"zebra.*For other classes use ImageFolderDataModule"):
        CIFAR10DataModule(tmp_path).prepare_data()

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models import ResNet18_Weights
from torchvision.transforms.v2 import functional as V

from lightning_mnp.attacks import BadNets
from lightning_mnp.data import FolderDataset, ImageNetSubsetDataModule, MemoryDataset

IMAGENETTE = [
    "n01440764",
    "n02102040",
    "n02979186",
    "n03000684",
    "n03028079",
    "n03394916",
    "n03417042",
    "n03425413",
    "n03445777",
    "n03888257",
]
TWELVE = sorted([*IMAGENETTE, "n02123045", "n02504458"])


def write_tree(root: Path, classes: list[str]) -> Path:
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 3), ("val", 1)):
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(0, 256, (3, 20, 24), generator=generator)
                V.to_pil_image(pixels.to(torch.uint8)).save(folder / f"{name}_{index}.JPEG")
    return root


def small(root: Path, **options: Any) -> ImageNetSubsetDataModule:
    return ImageNetSubsetDataModule(root, **{"image_size": 16, "defense_size": 12, **options})


@pytest.mark.parametrize(("preset", "names"), [("imagenet12", TWELVE), ("imagenette", IMAGENETTE)])
def test_a_preset_takes_its_classes_out_of_more(
    preset: Any, names: list[str], tmp_path: Path
) -> None:
    root = write_tree(tmp_path, [*TWELVE, "n01530575", "n09999999"])
    data = small(root, preset=preset, attack=BadNets())
    data.prepare_data()
    data.setup("fit")
    assert data.class_names == names
    assert data.num_classes == len(names) == len(data.readable_names)
    assert data.train_set.labels.bincount(minlength=len(names)).sum() == 3 * len(names)
    assert data.test_set.labels.tolist() == list(range(len(names)))
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (3 * len(names), 3, 16, 16)
    assert int(labels.max()) == len(names) - 1
    stored = FolderDataset(root / "val", names, 16)
    assert torch.equal(data.test_set.fetch([0, 5]), stored.fetch([0, 5]))


def test_readable_names_are_those_of_the_labels() -> None:
    data = ImageNetSubsetDataModule()
    known = dict(zip(data.class_names, data.readable_names, strict=True))
    assert known["n01440764"] == "tench"
    assert known["n02123045"] == "tabby"
    assert known["n02504458"] == "African elephant"
    assert known["n03888257"] == "parachute"
    # The names are those that torchvision has, in the order of the WordNet IDs.
    categories = ResNet18_Weights.DEFAULT.meta["categories"]
    places = [categories.index(name) for name in data.readable_names]
    assert places == sorted(places)
    assert places[0] == 0


def test_names_of_other_classes_come_from_the_full_folder(tmp_path: Path) -> None:
    chosen = ["n00000007", "n00000002"]
    assert small(tmp_path, classes=chosen).readable_names == ["n00000002", "n00000007"]
    for number in range(1000):
        (tmp_path / "train" / f"n{number:08d}").mkdir(parents=True)
    categories = ResNet18_Weights.DEFAULT.meta["categories"]
    data = small(tmp_path, classes=chosen)
    assert data.class_names == ["n00000002", "n00000007"]
    assert data.readable_names == [categories[2], categories[7]]
    (tmp_path / "train" / "n00000500").rmdir()
    assert small(tmp_path, classes=chosen).readable_names == ["n00000002", "n00000007"]


@pytest.mark.parametrize("in_memory", [True, False])
def test_memory_is_an_option(tmp_path: Path, in_memory: bool) -> None:
    data = small(write_tree(tmp_path, IMAGENETTE), preset="imagenette", in_memory=in_memory)
    assert isinstance(data.train_set, MemoryDataset) is in_memory


def test_defaults_are_those_of_the_paper_and_of_imagenet() -> None:
    data = ImageNetSubsetDataModule()
    assert data.image_size == 224
    assert data.batch_size == 64
    assert data.mean == (0.485, 0.456, 0.406)
    assert data.std == (0.229, 0.224, 0.225)
    assert data.augment
    assert data.flip


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`preset` to be one of .* but got 'imagenet1k'"):
        ImageNetSubsetDataModule(preset="imagenet1k")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`classes` to be at least two different folder names"):
        ImageNetSubsetDataModule(classes=["n01440764"])
    root = write_tree(tmp_path, IMAGENETTE)
    message = r"12 chosen classes in .*train.*none of .'n02123045', 'n02504458'.*`preset`"
    for use in ("prepare_data", "defense_dataloader"):
        with pytest.raises(FileNotFoundError, match=message):
            getattr(small(root), use)()
    with pytest.raises(FileNotFoundError, match=r"none of .'n0'."):
        small(root, classes=["n01440764", "n0"]).setup("fit")
    for path in (root / "val").iterdir():
        path.rename(root / path.name)
    with pytest.raises(FileNotFoundError, match=r"at least two class folders in .*val"):
        small(root, preset="imagenette").prepare_data()
    with pytest.raises(FileNotFoundError, match="folder 'train' with the train images"):
        small(root / "val").prepare_data()

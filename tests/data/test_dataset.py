from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image, PngImagePlugin
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2 import functional as V

from lightning_mnp.attacks import BadNets, Blend
from lightning_mnp.data import FolderDataset, MemoryDataset, PoisonedDataset, TriggeredDataset


def random_images(count: int, size: int = 8, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (count, channels, size, size)
    return torch.randint(0, 256, shape, generator=generator).to(torch.uint8)


def write_tree(root: Path, classes: dict[str, int], size: tuple[int, int] = (12, 8)) -> Path:
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            pixels = random_images(1, 32)[0].roll(index, 1)[:, : size[1], : size[0]]
            image = V.to_pil_image(pixels)
            image.save(root / name / f"{index}.{'jpg' if index % 2 else 'png'}")
    return root


@pytest.fixture
def memory() -> MemoryDataset:
    return MemoryDataset(random_images(20), torch.arange(20) % 4)


@pytest.fixture
def folder(tmp_path: Path) -> FolderDataset:
    return FolderDataset(write_tree(tmp_path, {"a": 3, "b": 4, "c": 3}), ["a", "b", "c"], 8)


def test_samples_and_batches_agree(memory: MemoryDataset) -> None:
    loader = DataLoader(memory, batch_size=6)

    images = torch.cat([batch[0] for batch in loader])
    labels = torch.cat([batch[1] for batch in loader])

    assert images.equal(memory.images)
    assert labels.equal(memory.labels)
    image, label = memory[-1]
    assert image.equal(memory.images[19])
    assert label == 3
    with pytest.raises(IndexError, match="below 20, but got 20"):
        memory[20]


def test_a_fetched_image_is_a_copy(memory: MemoryDataset) -> None:
    before = memory.images.clone()
    memory.fetch([0, 1]).zero_()
    assert memory.images.equal(before)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(2).long(), "`images` to be uint8 .* torch.float32"),
        (random_images(2)[0], torch.zeros(2).long(), r"`images` .* \(3, 8, 8\)"),
        (random_images(2), torch.zeros(3).long(), r"`labels` .* shape \(2,\).* \(3,\)"),
        (random_images(2), torch.zeros(2), "`labels` .* torch.float32"),
    ],
)
def test_memory_errors(images: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemoryDataset(images, labels)


def test_a_folder_reads_as_torchvision_does(tmp_path: Path) -> None:
    root = write_tree(tmp_path, {"b": 3, "a": 4})
    reference = ImageFolder(str(root))

    images = FolderDataset(root, ["a", "b"])

    assert [str(path) for path in images.paths] == [path for path, _ in reference.samples]
    assert images.labels.tolist() == reference.targets
    for index in range(7):
        assert images[index][0].equal(V.pil_to_tensor(reference[index][0]))
    assert images.to_memory(batch_size=2).images.equal(images.fetch(range(7)))


def test_a_folder_uses_the_classes_it_is_told_in_their_order(tmp_path: Path) -> None:
    images = FolderDataset(write_tree(tmp_path, {"a": 1, "b": 2, "c": 3}), ["c", "a"])

    assert images.labels.tolist() == [0, 0, 0, 1]
    assert [path.parent.name for path in images.paths] == ["c", "c", "c", "a"]


def test_a_set_in_memory_stays(memory: MemoryDataset) -> None:
    assert memory.to_memory() is memory


def test_an_empty_set_goes_to_memory() -> None:
    empty = MemoryDataset(random_images(0), torch.zeros(0).long())
    assert len(empty.to_memory()) == 0


def test_image_that_could_take_all_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_tree(tmp_path, {"a": 1, "b": 1})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    with pytest.raises(ValueError, match=r"0.png' to be an image of ordinary size.* exceeds limit"):
        FolderDataset(root, ["a", "b"]).fetch([0])


def test_folder_errors(tmp_path: Path) -> None:
    root = write_tree(tmp_path, {"a": 1, "b": 2})
    with pytest.raises(FileNotFoundError, match=r"folder for each class .* none was found for z"):
        FolderDataset(root, ["a", "z"])
    Image.new("RGB", (5, 5)).save(root / "b" / "2.png")
    images = FolderDataset(root, ["a", "b"])
    with pytest.raises(ValueError, match=r"same channels and size.* Set `image_size`"):
        images.fetch(range(4))
    with pytest.raises(ValueError, match=r"same channels and size.* Set `image_size`"):
        images.to_memory(batch_size=1)
    for name in ("broken.jpg", "broken.png"):
        (root / "a" / name).write_bytes(b"not an image")
        with pytest.raises(ValueError, match=f"{name}' to be a readable image"):
            FolderDataset(root, ["a", "b"]).fetch([1])
        (root / "a" / name).unlink()
    text = PngInfo()
    text.add_text("long", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    Image.new("RGB", (4, 4)).save(root / "a" / "text.png", pnginfo=text)
    with pytest.raises(ValueError, match=r"text.png' to be a readable image"):
        FolderDataset(root, ["a", "b"]).fetch([1])
    (root / "a" / "text.png").unlink()
    (root / "c").mkdir()
    with pytest.raises(FileNotFoundError, match="c"):
        FolderDataset(root, ["a", "b", "c"])


@pytest.mark.parametrize("attack", [BadNets(margin=0), Blend(mode="all-to-all")])
def test_poisoned_images_carry_trigger_and_label(
    memory: MemoryDataset, attack: BadNets | Blend
) -> None:
    indices = torch.tensor([17, 2, 5])

    poisoned = PoisonedDataset(memory, attack, indices, num_classes=4)

    images = poisoned.fetch(range(20))
    others = [index for index in range(20) if index not in indices]
    assert poisoned.indices.tolist() == [2, 5, 17]
    assert images[indices].equal(attack.apply(memory.images[indices]))
    assert images[others].equal(memory.images[others])
    wanted = memory.labels.clone()
    wanted[indices] = attack.target_labels(memory.labels[indices], 4)
    assert poisoned.labels.equal(wanted)
    assert poisoned.true_labels.equal(memory.labels)
    assert poisoned[17][0].equal(images[17])
    assert poisoned[17][1] == int(wanted[17])
    assert memory.images.equal(random_images(20))
    assert memory.labels.equal(torch.arange(20) % 4)


def test_poison_is_the_same_from_memory_and_from_the_disk(folder: FolderDataset) -> None:
    attack, indices = BadNets(margin=0), torch.tensor([4, 9])

    lazy = PoisonedDataset(folder, attack, indices, 3)
    kept = PoisonedDataset(folder.to_memory(), attack, indices, 3)

    assert lazy.fetch(range(10)).equal(kept.fetch(range(10)))
    assert lazy.to_memory().labels.equal(kept.labels)


def test_nothing_poisoned_is_the_clean_set(memory: MemoryDataset) -> None:
    poisoned = PoisonedDataset(memory, BadNets(), torch.zeros(0).long(), 4)

    assert poisoned.fetch(range(20)).equal(memory.images)
    assert poisoned.labels.equal(memory.labels)


@pytest.mark.parametrize(
    ("indices", "classes", "message"),
    [
        ([3, 20], 4, "`indices` to be from 0 to 19, but got 3 to 20"),
        ([-1, 3], 4, "`indices` to be from 0 to 19, but got -1 to 3"),
        ([3, 3], 4, "`indices` to name each image once"),
        ([3], 3, "`num_classes` to be above every label, but got 3 for labels from 0 to 3"),
    ],
)
def test_poisoned_errors(
    memory: MemoryDataset, indices: list[int], classes: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PoisonedDataset(memory, BadNets(), torch.tensor(indices), classes)


def test_triggered_images_leave_the_target_class_out(memory: MemoryDataset) -> None:
    attack = BadNets(target_class=2, margin=0)

    triggered = TriggeredDataset(memory, attack, num_classes=4)

    assert triggered.indices.tolist() == [index for index in range(20) if index % 4 != 2]
    assert triggered.labels.tolist() == [2] * 15
    assert triggered.true_labels.equal(memory.labels[triggered.indices])
    images, targets, labels = next(iter(DataLoader(triggered, batch_size=15)))
    assert images.equal(attack.apply(memory.images[triggered.indices]))
    assert targets.equal(triggered.labels)
    assert labels.equal(triggered.true_labels)


def test_all_to_all_leaves_nothing_out(memory: MemoryDataset) -> None:
    triggered = TriggeredDataset(memory, BadNets(mode="all-to-all"), num_classes=4)

    assert len(triggered) == 20
    assert triggered.labels.equal((memory.labels + 1) % 4)


def test_triggered_is_the_same_from_memory_and_from_the_disk(folder: FolderDataset) -> None:
    attack = BadNets(margin=0, target_class=1)

    lazy = TriggeredDataset(folder, attack, 3)
    kept = TriggeredDataset(folder.to_memory(), attack, 3)

    assert lazy.fetch(range(6)).equal(kept.fetch(range(6)))
    assert lazy[5][1:] == kept[5][1:] == (1, 2)


def test_triggered_errors(memory: MemoryDataset) -> None:
    with pytest.raises(ValueError, match="`num_classes` to be above every label"):
        TriggeredDataset(memory, BadNets(), 2)
    single = MemoryDataset(random_images(3), torch.ones(3).long())
    with pytest.raises(ValueError, match="outside of the target class, but all of its 3 images"):
        TriggeredDataset(single, BadNets(target_class=1), 2)

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_mnp.defense_data.augment import random_crop_flip
from lightning_mnp.defense_data.defense_set import DefenseSet, seeded_generator
from lightning_mnp.defense_data.subset import balanced_indices

CPU = torch.device("cpu")
IMAGES = torch.rand(11, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(11) % 3


def loader(batch_size: int = 4, shuffle: bool = False) -> DataLoader[Any]:
    return DataLoader(TensorDataset(IMAGES, LABELS), batch_size, shuffle=shuffle)


def same(first: DefenseSet, second: DefenseSet) -> bool:
    return (
        torch.equal(first.images, second.images)
        and torch.equal(first.labels, second.labels)
        and first.fingerprint == second.fingerprint
    )


REFERENCE = DefenseSet(IMAGES, LABELS)


# --- one order ---------------------------------------------------------------------------------


def test_every_image_is_there_once_with_its_label() -> None:
    rows = {
        image.numpy().tobytes(): int(label) for image, label in zip(IMAGES, LABELS, strict=True)
    }
    assert len(REFERENCE) == 11
    for image, label in zip(REFERENCE.images, REFERENCE.labels, strict=True):
        assert rows.pop(image.numpy().tobytes()) == label
    assert not rows
    assert REFERENCE.counts == {0: 4, 1: 4, 2: 3}
    assert repr(REFERENCE) == "DefenseSet(11 images of shape (3, 8, 8), 3 classes)"


def test_the_order_is_that_of_hashes() -> None:
    hashes = [
        hashlib.sha256(image.numpy().tobytes() + int(label).to_bytes(8, "big")).digest()
        for image, label in zip(REFERENCE.images, REFERENCE.labels, strict=True)
    ]
    assert hashes == sorted(hashes)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 11, 50])
@pytest.mark.parametrize("shuffle", [False, True])
def test_the_loaders_order_and_batch_size_do_not_matter(batch_size: int, shuffle: bool) -> None:
    assert same(DefenseSet.from_loader(loader(batch_size, shuffle)), REFERENCE)


def test_repeated_images_do_not_matter() -> None:
    rows = torch.randperm(22) % 11
    assert same(DefenseSet(IMAGES[rows], LABELS[rows]), REFERENCE)


def test_the_memory_layout_and_gradients_do_not_matter() -> None:
    images = IMAGES.clone().requires_grad_().to(memory_format=torch.channels_last)
    found = DefenseSet(images, LABELS.to(torch.uint8))
    assert same(found, REFERENCE)
    assert found.labels.dtype == torch.int64
    assert not found.images.requires_grad


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64])
def test_labels_of_unsigned_types(dtype: torch.dtype) -> None:
    assert same(DefenseSet(IMAGES, LABELS.to(dtype)), REFERENCE)
    expected = balanced_indices(LABELS, 9, seed=1)
    assert balanced_indices(LABELS.to(dtype), 9, seed=1).equal(expected)


def test_other_content_has_another_fingerprint() -> None:
    other = IMAGES.clone()
    other[3, 1, 2, 5] += 1e-3
    prints = {
        REFERENCE.fingerprint,
        DefenseSet(other, LABELS).fingerprint,
        DefenseSet(IMAGES, (LABELS + 1) % 3).fingerprint,
        DefenseSet(IMAGES[:-1], LABELS[:-1]).fingerprint,
    }
    assert len(prints) == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    assert DefenseSet(IMAGES.to(dtype), LABELS).images.dtype == dtype


def test_later_changes_of_the_source_do_not_matter() -> None:
    images = IMAGES.clone()
    found = DefenseSet(images, LABELS)
    images.zero_()
    assert same(found, REFERENCE)


# --- batches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [2, 3, 4, 5, 10, 11, 128])
def test_batches_of_a_pass_are_equally_large(batch_size: int) -> None:
    batches = list(REFERENCE.batches(batch_size, CPU))
    assert len(batches) == REFERENCE.passes(batch_size) == math.ceil(11 / batch_size)
    sizes = [len(labels) for _, labels in batches]
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    assert torch.equal(torch.cat([images for images, _ in batches]), REFERENCE.images)
    assert torch.equal(torch.cat([labels for _, labels in batches]), REFERENCE.labels)


def keyed(key: tuple[int | str, ...], augment: str = "none") -> tuple[Tensor, Tensor]:
    parts = [REFERENCE.batch(index, 4, CPU, augment, key) for index in range(3)]
    images, labels = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_a_key_names_an_order() -> None:
    first, again, other = keyed((0, "a", 1)), keyed((0, "a", 1)), keyed((0, "a", 2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], REFERENCE.images)
    assert same(DefenseSet(*first), REFERENCE)  # a permutation


@pytest.mark.parametrize("augment", ["crop", "crop-flip"])
def test_augmentation_follows_from_the_key(augment: str) -> None:
    key = (3, "suppression", 0, 1)
    images, labels = keyed(key, augment)
    plain, plain_labels = keyed(key)
    assert torch.equal(labels, plain_labels)
    assert torch.equal(images, keyed(key, augment)[0])
    assert not torch.equal(images, plain)
    parts = [part.clone() for part in plain.tensor_split(3)]
    for index, part in enumerate(parts):
        generator = seeded_generator(*key, "augment", index)
        parts[index] = random_crop_flip(part, 1, augment == "crop-flip", generator)
    assert torch.equal(images, torch.cat(parts))


def test_no_augmentation_in_the_stored_order_or_of_volumes() -> None:
    assert torch.equal(REFERENCE.batch(0, 50, CPU, "crop-flip")[0], REFERENCE.images)
    volumes = DefenseSet(torch.rand(6, 1, 4, 4, 4), torch.arange(6) % 2)
    images, _ = volumes.batch(0, 6, CPU, "crop-flip", (0, "a"))
    assert same(DefenseSet(images, volumes.batch(0, 6, CPU, "none", (0, "a"))[1]), volumes)


def test_batches_take_nothing_from_the_global_random_state() -> None:
    before = torch.get_rng_state()
    keyed((0, "a"), "crop-flip")
    DefenseSet.from_loader(loader(shuffle=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_generators_are_independent_of_each_other() -> None:
    keys: list[tuple[str | int, ...]] = [
        (),
        (0,),
        (1,),
        (0, "a"),
        ("0", "a"),
        (0, "b"),
        (0, "a", 1),
    ]
    draws = [torch.rand(3, generator=seeded_generator(*key)).tolist() for key in keys]
    assert len({tuple(draw) for draw in draws}) == len(keys)
    # The numbers are promised: a seed in a report must mean the same tomorrow.
    digest = hashlib.sha256(b"(0, 'a')").digest()
    expected = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    assert torch.rand(3, generator=expected).tolist() == draws[3]


# --- reading -----------------------------------------------------------------------------------


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __init__(self) -> None:
        self.drawn = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for image, label in zip(IMAGES, LABELS, strict=True):
            self.drawn += 1
            yield image, label


def test_a_stream_is_read_once() -> None:
    stream = Stream()
    assert same(DefenseSet.from_loader(DataLoader(stream, batch_size=3)), REFERENCE)
    assert stream.drawn == 11


def test_a_limit_reads_no_more_than_it_must() -> None:
    stream = Stream()
    found = DefenseSet.from_loader(DataLoader(stream, batch_size=3), limit=2)
    assert same(found, DefenseSet(IMAGES[:6], LABELS[:6]))
    assert stream.drawn == 6
    assert same(DefenseSet.from_loader(loader(), limit=100), REFERENCE)


def test_a_defense_set_is_taken_as_it_is() -> None:
    assert DefenseSet.from_loader(REFERENCE) is REFERENCE  # type: ignore[arg-type]


def test_batches_taken_apart_by_a_function() -> None:
    batches = [{"a": {"pixels": IMAGES, "answers": LABELS}}]
    found = DefenseSet.from_loader(batches, lambda b: (b["a"]["pixels"], b["a"]["answers"]))
    assert same(found, REFERENCE)


def test_batches_without_images_are_refused() -> None:
    with pytest.raises(TypeError, match=r"pair \(images, labels\)"):
        DefenseSet.from_loader([None])


def test_no_batch_of_a_single_image() -> None:
    """Batch statistics of one image are none; the least batch size of the options sees to it."""
    for count in range(2, 30):
        images = torch.arange(float(count)).reshape(-1, 1, 1, 1)
        data = DefenseSet(images, torch.arange(count) % 2)
        for size in range(3, 12):
            batches = data.batches(size, torch.device("cpu"))
            assert all(2 <= len(labels) <= size for _, labels in batches)


# --- drawn from a data set ---------------------------------------------------------------------


class Labeled(TensorDataset):
    """Tells its labels without reading an image, as torchvision's data sets do."""

    def __init__(self, name: str, labels: Any) -> None:
        super().__init__(IMAGES, LABELS)
        setattr(self, name, labels)
        self.read = 0

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        self.read += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("name", ["targets", "labels"])
@pytest.mark.parametrize("labels", [LABELS, LABELS.tolist(), LABELS.numpy()], ids=str)
def test_a_share_of_a_data_set_with_labels(name: str, labels: Any) -> None:
    data = Labeled(name, labels)
    found = DefenseSet.from_dataset(data, size=6)
    assert found.counts == {0: 2, 1: 2, 2: 2}
    assert data.read == 6


def test_a_share_of_any_data_set() -> None:
    data = TensorDataset(IMAGES, LABELS)
    before = torch.get_rng_state()
    draws = [DefenseSet.from_dataset(data, 6, seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert same(draws[0], draws[1])
    assert draws[0].fingerprint != draws[2].fingerprint
    assert same(draws[0], DefenseSet.from_dataset(Labeled("targets", LABELS), 6))


def test_a_share_with_batches_taken_apart_by_a_function() -> None:
    swapped = TensorDataset(LABELS, IMAGES)
    found = DefenseSet.from_dataset(swapped, 6, unpack=lambda batch: (batch[1], batch[0]))
    assert same(found, DefenseSet.from_dataset(TensorDataset(IMAGES, LABELS), 6))


def test_a_stream_has_no_share() -> None:
    with pytest.raises(TypeError, match="length and items by index, but got Stream"):
        DefenseSet.from_dataset(Stream())


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.rand(4, 8), LABELS[:4], r"shape \(N, C, ...\), but got \(4, 8\)"),
        (IMAGES[:0], LABELS[:0], "hold images, but it is empty"),
        ((255 * IMAGES).to(torch.uint8), LABELS, "floating point, .* but got torch.uint8. Scale"),
        (IMAGES * math.nan, LABELS, "finite, but some hold NaN or infinity. Check the transforms"),
        (IMAGES / 0, LABELS, "finite, but some hold NaN or infinity"),
        (IMAGES, LABELS[:-1], r"the shape \(11,\), one class for each image, but got \(10,\)"),
        (IMAGES, torch.eye(11).long(), r"the shape \(11,\), .* but got \(11, 11\)"),
        (IMAGES, LABELS.float(), "to be integers, but got torch.float32"),
        (IMAGES, LABELS > 0, "to be integers, but got torch.bool"),
        (IMAGES, LABELS.to(torch.complex64), "to be integers, but got torch.complex64"),
        (IMAGES, LABELS - 1, "at least 0, but got -1"),
        (
            IMAGES,
            LABELS * 0 + 7,
            "at least two classes, but all are of class 7. Draw it from every",
        ),
    ],
)
def test_images_and_labels_that_cannot_serve(images: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DefenseSet(images, labels)


@pytest.mark.parametrize("limit", [None, 0])
def test_no_batches(limit: int | None) -> None:
    with pytest.raises(ValueError, match="but its loader yields no batch"):
        DefenseSet.from_loader([] if limit is None else loader(), limit=limit)


def test_images_of_several_shapes() -> None:
    batches = [(IMAGES, LABELS), (IMAGES[..., :4], LABELS)]
    message = r"one shape, but got \(3, 8, 8\) and, in batch 1, \(3, 8, 4\). Resize"
    with pytest.raises(ValueError, match=message):
        DefenseSet.from_loader(batches)


def test_counts_are_those_of_the_labels() -> None:
    rows = torch.arange(9)
    assert DefenseSet(IMAGES[rows], LABELS[rows]).counts == dict(Counter(LABELS[rows].tolist()))


def test_others_are_drawn_from_the_other_classes_without_putting_back() -> None:
    data = DefenseSet(torch.arange(24.0).reshape(12, 1, 2), torch.arange(12) % 3)
    device = torch.device("cpu")
    images, labels = data.others(1, 20, device, (0, "a test"))
    assert sorted(labels.tolist()) == [0] * 4 + [2] * 4
    assert len({float(image.sum()) for image in images}) == 8
    fewer, _ = data.others(1, 3, device, (0, "a test"))
    assert fewer.equal(images[:3])

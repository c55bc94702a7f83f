from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_mnp.defense_data.batches import check_batch, read_batches, unpack_batch

IMAGES, LABELS = torch.rand(4, 3, 8, 8), torch.arange(4) % 2
BATCH = IMAGES, LABELS


class Loader:
    """A loader that says it has three batches, and yields as many as it likes."""

    def __init__(self, batches: int, error: BaseException | None = None) -> None:
        self.batches = batches
        self.error = error

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from [BATCH] * self.batches
        if self.error is not None:
            raise self.error


# --- images and labels of a batch --------------------------------------------------------------


@pytest.mark.parametrize(
    "image", ["image", "images", "pixel_values", "x", "input", "inputs", "img"]
)
@pytest.mark.parametrize("label", ["label", "labels", "y", "target", "targets", "class"])
def test_batches_that_are_dicts(image: str, label: str) -> None:
    batch = {"index": LABELS, label: LABELS, image: IMAGES}
    for found in (unpack_batch(batch), unpack_batch(UserDict(batch))):
        assert found[0] is IMAGES
        assert found[1] is LABELS


@pytest.mark.parametrize(
    "batch",
    [
        {"img": IMAGES, "fine_label": LABELS},
        {"photo": IMAGES, "truth": LABELS, "weight": torch.rand(4), "flag": LABELS > 0},
        {"photo": IMAGES, "label": LABELS, "index": LABELS + 1, "name": ["a"]},
    ],
)
def test_dicts_with_other_keys_are_understood_if_only_one_of_them_fits(batch: Any) -> None:
    for found in (unpack_batch(batch), unpack_batch(UserDict(batch))):
        assert found[0] is IMAGES
        assert found[1] is LABELS


def test_batches_that_are_sequences() -> None:
    for batch in ((IMAGES, LABELS), [IMAGES, LABELS, ["a.png"]]):
        assert unpack_batch(batch) == (IMAGES, LABELS)


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        (IMAGES, "but got Tensor"),
        ((IMAGES,), r"but got tuple of Tensor\."),
        ([IMAGES, [0, 1]], r"but got list of Tensor, list\."),
        (
            {"img": IMAGES, "fine_label": LABELS, "coarse_label": LABELS},
            r"but got dict with the keys \['coarse_label', 'fine_label', 'img'\]",
        ),
        ({"image": IMAGES, "a": LABELS[:, None]}, r"but got dict with the keys \['a', 'image'\]"),
        ({"label": LABELS}, r"but got dict with the keys \['label'\]"),
        ({"image": IMAGES, "label": [0, 1]}, "but got dict"),
        (None, "but got NoneType"),
    ],
)
def test_batches_that_cannot_be_taken_apart(batch: Any, found: str) -> None:
    with pytest.raises(TypeError, match=rf"pair \(images, labels\).*{found}.* argument `unpack` a"):
        unpack_batch(batch)


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ((IMAGES.numpy(), LABELS.numpy()), "of ndarray, ndarray. Turn .* by `torch.from_numpy`"),
        ((IMAGES[0], 1), r"of Tensor, int, a single image. Pass `DataLoader\(images"),
    ],
)
def test_ordinary_mistakes_have_their_own_remedy(batch: Any, found: str) -> None:
    with pytest.raises(TypeError, match=rf"pair \(images, labels\).*{found}"):
        unpack_batch(batch)


def test_one_hot_labels_have_their_own_remedy() -> None:
    one_hot = torch.eye(2)[LABELS]
    with pytest.raises(ValueError, match=r"one label for each image.*pass `labels\.argmax\(1\)`"):
        check_batch(IMAGES, one_hot, [], 0)


# --- reading to the end ------------------------------------------------------------------------


def test_all_batches_are_read() -> None:
    images, labels = read_batches([BATCH, (IMAGES[:1], LABELS[:1])])
    assert [len(part) for part in images] == [len(part) for part in labels] == [4, 1]
    assert torch.equal(images[0], IMAGES)
    assert torch.equal(labels[1], LABELS[:1])


def test_no_gradient_is_kept() -> None:
    images, _ = read_batches([(IMAGES.clone().requires_grad_(), LABELS)])
    assert not images[0].requires_grad


@pytest.mark.parametrize(("limit", "count"), [(None, 3), (2, 2), (0, 0), (9, 3)])
def test_a_limit_of_batches(limit: int | None, count: int) -> None:
    assert len(read_batches(Loader(3), limit=limit)[0]) == count


def test_a_loader_without_a_length_may_end_when_it_likes() -> None:
    assert len(read_batches(iter([BATCH] * 2))[0]) == 2


@pytest.mark.parametrize(
    ("loader", "limit", "message"),
    [
        (
            Loader(2),
            None,
            r"to yield 3 batches, as its length says, but it ended after 2\. Cor",
        ),
        (Loader(1), 2, "to yield 2 batches, as its length says, but it ended after 1"),
        (Loader(2, OSError("disk gone")), None, "but it raised OSError after 2: disk gone"),
    ],
)
def test_a_loader_at_fault(loader: Loader, limit: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_batches(loader, limit=limit)


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt()])
def test_errors_that_are_not_the_loaders_pass(error: BaseException) -> None:
    with pytest.raises(type(error)):
        read_batches(Loader(1, error))


def test_a_function_that_unpacks() -> None:
    batches = [{"pixels": IMAGES, "answers": LABELS}]
    images, labels = read_batches(batches, lambda batch: (batch["pixels"], batch["answers"]))
    assert torch.equal(images[0], IMAGES)
    assert torch.equal(labels[0], LABELS)


@pytest.mark.parametrize(
    ("parts", "found"),
    [
        ((np.zeros((2, 1, 4, 4)), torch.tensor([0, 1])), "ndarray and Tensor"),
        ((torch.zeros(2, 1, 4, 4), [0, 1]), "Tensor and list"),
        ((torch.zeros(2, 1, 4, 4), None), "Tensor and NoneType"),
    ],
)
def test_a_function_that_unpacks_no_tensors(parts: Any, found: str) -> None:
    message = f"`unpack` to return images and labels as tensors, but on batch 0 it returned {found}"
    with pytest.raises(TypeError, match=message):
        read_batches([None], unpack=lambda batch: parts)


def test_a_function_that_fails_to_unpack() -> None:
    match = r"`unpack` to return images and labels, but on batch 1 it raised KeyError: 'a'"
    with pytest.raises(ValueError, match=match):
        read_batches([{"a": BATCH}, {}], lambda batch: batch["a"])


# --- batches that fit each other ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (
            IMAGES[1:],
            LABELS,
            r"of shape \(3, 3, 8, 8\) and labels of shape \(4,\) in batch 2",
        ),
        (IMAGES, LABELS[:, None], r"one label for each image, .* labels of shape \(4, 1\)"),
        (torch.tensor(1.0), LABELS, r"images of shape \(\) .*Correct the data set, or pass as arg"),
        (
            IMAGES[..., 1:],
            LABELS,
            r"one shape, but got \(3, 8, 8\) and, in batch 2, \(3, 8, 7\)\.",
        ),
        (
            IMAGES.double(),
            LABELS,
            r"one type, but got torch\.float32 and, in batch 2, .*64\. Conv",
        ),
    ],
)
def test_batches_that_do_not_fit(images: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_batch(images, labels, [IMAGES], 2)


def test_batches_that_fit() -> None:
    check_batch(IMAGES[:1], LABELS[:1], [IMAGES], 1)
    check_batch(IMAGES[..., 1:].double(), LABELS, [], 0)

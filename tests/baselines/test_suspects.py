from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mnp import DefenseSet
from lightning_mnp.baselines import Suspects, detect_ac, detect_sc
from lightning_mnp.baselines.suspects import read_inputs, require_labels

IMAGES = torch.rand(6, 1, 2, 2, generator=torch.Generator().manual_seed(0))


def test_order_and_repeated_images_stay() -> None:
    images = torch.stack([torch.full((1, 2, 2), value) for value in (0.9, 0.1, 0.9, 0.5)])
    labels = torch.tensor([2, 0, 2, 1])
    read = Suspects.from_loader([(images[:3], labels[:3]), (images[3:], labels[3:])])
    assert torch.equal(read.images, images)
    assert torch.equal(read.labels, labels)
    assert read.counts == {0: 1, 1: 1, 2: 2}
    assert Suspects.from_loader(read) is read


def test_the_fingerprint_is_that_of_images_and_labels_in_their_order() -> None:
    labels = torch.arange(6)
    found = Suspects(IMAGES, labels).fingerprint
    assert len(found) == 64
    assert Suspects(IMAGES.clone(), labels.to(torch.uint8)).fingerprint == found
    assert Suspects(IMAGES.flip(0), labels.flip(0)).fingerprint != found
    assert Suspects(IMAGES, labels + 1).fingerprint != found


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.rand(2, 4), torch.arange(2), r"shape \(N, C, ...\), but got \(2, 4\)"),
        (torch.rand(0, 1, 2, 2), torch.arange(0), "hold images, but it is empty"),
        (torch.ones(2, 1, 2, 2).byte(), torch.arange(2), "floating point, .* got torch.uint8"),
        (torch.full((2, 1, 2, 2), torch.nan), torch.arange(2), "be finite, but some hold NaN"),
        (torch.rand(2, 1, 2, 2), torch.arange(3), r"shape \(2,\), .* but got \(3,\)"),
    ],
)
def test_what_cannot_serve_is_refused(images: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"argument `suspects` to .*{message}"):
        Suspects(images, labels)


def fails() -> Iterator[Any]:
    yield IMAGES, torch.arange(6)
    raise KeyError("image")


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "Expected argument `suspects` to hold images, but its loader yields no batch"),
        (fails, r"Expected the loader in `suspects` to yield .* raised KeyError after 1: 'image'"),
        (
            [(IMAGES, torch.arange(6)), (torch.rand(1, 1, 3, 3), torch.arange(1))],
            r"Expected all images of argument `suspects` to have one shape, .* \(1, 3, 3\)",
        ),
    ],
)
def test_errors_of_reading_name_the_argument(loader: Any, message: str) -> None:
    for read in (Suspects.from_loader, read_inputs):
        with pytest.raises(ValueError, match=message) as caught:
            read(loader() if callable(loader) else loader)
        assert "defense set" not in str(caught.value)


LABELS = [
    torch.zeros(6, dtype=torch.long),
    torch.full((6,), -1),
    torch.rand(6),
    torch.ones(6, dtype=torch.bool),
]


@pytest.mark.parametrize("labels", LABELS)
def test_labels_of_any_kind_are_taken_until_a_detector_needs_them(labels: Tensor) -> None:
    suspects = Suspects.from_loader([(IMAGES, labels)])
    assert torch.equal(suspects.labels, labels)
    with pytest.raises(ValueError, match=r"Expected (the labels in )?argument `suspects` to"):
        require_labels(suspects)
    require_labels(Suspects(IMAGES, torch.arange(6) % 2))


@pytest.mark.parametrize("detect", [detect_ac, detect_sc])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.rand(6), r"the labels in argument `suspects` to be integers, .* torch\.float32"),
        (torch.full((6,), -1), "the labels in argument `suspects` to be at least 0, but got -1"),
        (torch.ones(6).long(), "`suspects` to hold images of at least two labels, .* of label 1"),
    ],
)
def test_detectors_that_compare_by_labels_refuse_others(
    detect: Callable[..., Any], labels: Tensor, message: str
) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 5)).eval()
    with pytest.raises(ValueError, match=message):
        detect(network, [(IMAGES, labels)])


@pytest.mark.parametrize(
    "loader",
    [
        *([(IMAGES, labels)] for labels in LABELS),
        [(IMAGES, torch.rand(6, 4))],
        [(IMAGES, ["cat"] * 6)],
        [(IMAGES[:4],), (IMAGES[4:],)],
        [IMAGES[:4], IMAGES[4:]],
        [{"pixel_values": IMAGES, "label": torch.rand(6, 4)}],
        [{"picture": IMAGES}],
        DataLoader(TensorDataset(IMAGES), batch_size=4),
        TensorDataset(IMAGES),
        Suspects(IMAGES, torch.zeros(6)),
    ],
)
def test_inputs_are_read_whatever_their_labels(loader: Any) -> None:
    assert torch.equal(read_inputs(loader), IMAGES)


def test_inputs_are_read_by_a_function_of_the_user() -> None:
    batch = {"a": IMAGES, "b": torch.rand(6, 3)}
    assert torch.equal(read_inputs([batch], lambda batch: (batch["a"], batch["b"])), IMAGES)
    alone: Any = lambda batch: batch["a"]  # noqa: E731
    assert torch.equal(read_inputs([batch], alone), IMAGES)
    with pytest.raises(ValueError, match=r"`unpack` to return .* on batch 0 it raised KeyError"):
        read_inputs([{"b": IMAGES}], alone)


def test_inputs_that_have_been_read_as_a_defense_set_are_taken() -> None:
    data = DefenseSet(IMAGES, torch.arange(6) % 2)
    assert read_inputs(data) is data.images


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ({"label": torch.arange(2)}, r"dict with the keys \['label'\]"),
        ((), "tuple of nothing"),
        ((torch.rand(1, 2, 2), 3), "a single image. Pass `DataLoader"),
        ("cat", "got str"),
        (torch.tensor(1.0), "got Tensor"),
    ],
)
def test_a_batch_without_images_is_told(batch: Any, found: str) -> None:
    with pytest.raises(TypeError, match=f"Expected every batch to be a pair .*{found}"):
        read_inputs([batch])


def test_a_loader_of_inputs_that_ends_early_is_told() -> None:
    class Short(DataLoader[Any]):
        def __len__(self) -> int:
            return 3

    with pytest.raises(ValueError, match=r"`suspects` to yield 3 batches, .* ended after 2"):
        read_inputs(Short(TensorDataset(IMAGES), batch_size=3))

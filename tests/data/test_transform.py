from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor

from lightning_mnp.data.transform import BatchTransform
from lightning_mnp.defense_data.augment import random_crop_flip

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


def stored_images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (60, 3, 8, 8), generator=generator).to(torch.uint8)


def normalized(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (MEAN, STD))
    return (images.float() / 255.0 - mean) / std


def test_transform_equals_the_slow_formula() -> None:
    images = stored_images()
    samples = [(image, index) for index, image in enumerate(images)]
    transform = BatchTransform(MEAN, STD, True, False, torch.Generator().manual_seed(3))

    result, labels = transform(samples)

    shifted = random_crop_flip(images, 1, False, torch.Generator().manual_seed(3))
    torch.testing.assert_close(result, normalized(shifted))
    assert labels.equal(torch.arange(60))


def test_processes_augment_in_their_own_ways() -> None:
    white = [(torch.full((3, 8, 8), 255, dtype=torch.uint8), 0)] * 30
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    one, two = (
        BatchTransform(MEAN, STD, True, True, generator, rank)
        for rank, generator in enumerate(generators)
    )
    for _ in range(2):
        assert not one(white)[0].equal(two(white)[0])
        # So that the state of one, in a checkpoint, serves both.
        assert generators[0].get_state().equal(generators[1].get_state())


def test_samples_and_a_tensor_give_the_same_batch() -> None:
    images = stored_images()
    transform = BatchTransform(MEAN, STD, True, True, torch.Generator().manual_seed(3))

    result, first, second = transform([(image, 1, 2) for image in images])

    again = transform.images(images, torch.Generator().manual_seed(3))
    assert result.equal(again)
    assert (first.tolist(), second.tolist()) == ([1] * 60, [2] * 60)
    assert images.equal(stored_images())


def test_each_batch_has_random_numbers_of_its_own() -> None:
    def draw(epoch: int, place: int, rank: int | None = None, seed: int = 0) -> float:
        transform = BatchTransform(MEAN, STD, True, rank=rank, seed=seed)
        return torch.rand(1, generator=transform.generator_of(epoch, place)).item()

    drawn = [draw(0, 1), draw(1, 0), draw(0, 0), draw(0, 0, rank=1), draw(0, 0, seed=1)]
    assert len(set(drawn)) == 5
    assert draw(0, 0) == draw(0, 0, rank=0) == drawn[2]


@pytest.mark.parametrize("augment", [False, True])
def test_it_can_go_to_a_worker(augment: bool) -> None:
    transform = BatchTransform(MEAN, STD, augment, True, torch.Generator().manual_seed(0))
    copied = pickle.loads(pickle.dumps(transform))
    samples = [(image, 0) for image in stored_images()]
    assert copied(samples)[0].equal(transform(samples)[0])

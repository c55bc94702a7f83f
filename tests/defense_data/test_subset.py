from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mnp.data import balanced_indices


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(5, 20), min_size=1, max_size=6),
    extra=st.integers(0, 12),
    seed=st.integers(0, 2**31),
)
def test_classes_differ_by_at_most_one(counts: list[int], extra: int, seed: int) -> None:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    size = min(len(counts) + extra, 5 * len(counts))

    chosen = balanced_indices(labels, size, seed)

    found = labels[chosen].bincount(minlength=len(counts))
    assert len(set(chosen.tolist())) == size
    assert int(found.max() - found.min()) == (1 if size % len(counts) else 0)


def test_the_seed_draws_images_and_the_classes_that_get_one_more() -> None:
    labels = torch.arange(1000) % 10

    draws = [balanced_indices(labels, 25, seed) for seed in range(20)]

    assert balanced_indices(labels, 25, 3).equal(draws[3])
    assert len({tuple(sorted(draw.tolist())) for draw in draws}) == 20
    larger = [tuple((labels[draw].bincount() == 3).tolist()) for draw in draws]
    assert len(set(larger)) > 10


def test_the_order_mixes_classes() -> None:
    labels = torch.arange(10).repeat_interleave(100)

    ordered = labels[balanced_indices(labels, 500)]

    assert all(part.bincount(minlength=10).count_nonzero() > 5 for part in ordered.chunk(10))


def test_labels_need_not_be_dense_without_a_number_of_classes() -> None:
    labels = torch.tensor([2, 2, 7, 7])

    assert sorted(labels[balanced_indices(labels, 2)].tolist()) == [2, 7]


def test_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    balanced_indices(torch.arange(10), 10)
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (torch.zeros(3), {"size": 1}, r"`labels` to be integers .* torch.float32"),
        (torch.zeros(3, 2).long(), {"size": 1}, r"`labels` .* shape \(3, 2\)"),
        (torch.zeros(3).bool(), {"size": 1}, r"`labels` to be integers .* torch.bool"),
        (torch.zeros(0).long(), {"size": 1}, "at least one label, but got none"),
        (torch.tensor([0, 5]), {"size": 2, "num_classes": 3}, "from 0 to 2, but got 0 to 5"),
        (torch.tensor([-1, 1]), {"size": 2}, "from 0 to 1, but got -1 to 1"),
        (torch.arange(10), {"size": 9}, "`size` to be at least 10, one image of each class"),
        (torch.tensor([0, 0, 0, 1]), {"size": 4}, "at most the 1 images of class 1, .* need 2"),
        (torch.tensor([0, 0]), {"size": 2, "num_classes": 2}, "at most the 0 images of class 1"),
    ],
)
def test_errors(labels: torch.Tensor, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        balanced_indices(labels, **options)

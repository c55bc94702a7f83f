from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_mnp.attacks import BadNets


@pytest.mark.parametrize(
    ("corner", "rows", "columns"),
    [
        ("lower-right", slice(6, 9), slice(8, 11)),
        ("lower-left", slice(6, 9), slice(1, 4)),
        ("upper-right", slice(1, 4), slice(8, 11)),
        ("upper-left", slice(1, 4), slice(1, 4)),
    ],
)
def test_the_patch_is_in_its_corner_and_nothing_else_changes(
    corner: Any, rows: slice, columns: slice
) -> None:
    images = torch.rand(2, 3, 10, 12) * 0.8 + 0.1

    triggered = BadNets(corner=corner).apply(images)

    board = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    assert (triggered[:, :, rows, columns] == board).all()
    changed = triggered != images
    assert changed[:, :, rows, columns].all()
    assert int(changed.sum()) == 2 * 3 * 9


def test_a_random_patch_comes_from_its_seed() -> None:
    images = torch.zeros(2, 3, 8, 8)
    first, second, other = (BadNets(pattern="random", seed=s).apply(images) for s in (1, 1, 2))
    assert first.equal(second)
    assert not first.equal(other)
    assert first[0].equal(first[1])


def test_a_patch_may_fill_the_image() -> None:
    assert (BadNets(4, "white", margin=0).apply(torch.zeros(1, 1, 4, 4)) == 1).all()
    with pytest.raises(ValueError, match="add up to at most the image's 4 pixels, but got 4 and 1"):
        BadNets(4, "white", margin=1).apply(torch.zeros(1, 1, 4, 9))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 0}, "`patch_size` to be at least 1, but got 0"),
        ({"margin": -1}, "`margin` to be at least 0, but got -1"),
        ({"pattern": "dots"}, "`pattern` to be one of .*checkerboard.* but got 'dots'"),
        ({"corner": "middle"}, "`corner` to be one of .*lower-right.* but got 'middle'"),
    ],
)
def test_argument_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BadNets(**options)

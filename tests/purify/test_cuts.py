from __future__ import annotations

import pytest
import torch

from lightning_mnp.purify.cuts import choose_cuts


@pytest.mark.parametrize(("below", "most"), [(0.8, 1e9), (0.5, 1e9), (0.8, 2.0), (0.8, 0.5)])
def test_the_lowest_masks_are_cut(below: float, most: float) -> None:
    torch.manual_seed(0)
    masks = torch.rand(40)
    found = choose_cuts(masks, lambda positions: float(masks[positions].sum()), below, most)
    expected: list[int] = []
    for position in sorted(range(40), key=lambda place: float(masks[place])):
        total = float(masks[[*expected, position]].sum())
        if masks[position] >= below or total > most:
            break
        expected.append(position)
    assert found.tolist() == expected
    assert (most == 1e9) == (len(expected) == int((masks < below).sum()))


def test_nothing_is_measured_where_no_mask_is_low() -> None:
    def harm(positions: torch.Tensor) -> float:
        raise AssertionError("harm was measured")

    assert choose_cuts(torch.ones(4), harm, 0.8, 1.0).tolist() == []

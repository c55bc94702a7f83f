from __future__ import annotations

import math

import pytest
import torch
from helpers import Shortcut, finish, images_and_labels, new_scene
from torch.nn import functional as F

from lightning_mnp.config import Constants
from lightning_mnp.defense_data.defense_set import DefenseSet
from lightning_mnp.signals.pattern import pattern_lead
from lightning_mnp.signals.warp import WarpConstants, WarpSearch


def new_search(network: torch.nn.Module | None = None) -> WarpSearch:
    return WarpSearch(new_scene(network))


def reference_warp(images: torch.Tensor, moves: torch.Tensor) -> torch.Tensor:
    """The same by PyTorch's own sampling, for moves of shape (2, H, W) in pixels, (down, right)."""
    height, width = images.shape[2:]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    down = 2 * (rows + moves[0]) / (height - 1) - 1
    right = 2 * (columns + moves[1]) / (width - 1) - 1
    grid = torch.stack([right, down], dim=-1).expand(len(images), -1, -1, -1)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=True)


@pytest.mark.parametrize("size", [(8, 8), (12, 20)])
def test_images_are_sampled_between_pixels(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 2, *size, generator=generator)
    pattern = torch.rand(1, 2, 8, 8, generator=generator) - 0.5
    moves = F.interpolate(pattern, size=size, mode="bilinear", align_corners=True)[0]
    warped = new_search().trigger(0).applied(images, pattern)
    assert torch.allclose(warped, reference_warp(images, moves), atol=1e-5)


def test_no_move_changes_nothing_and_none_is_farther_than_half_a_pixel() -> None:
    warp = new_search().trigger(1)
    assert torch.allclose(warp.applied(warp.images, warp.pattern), warp.images)
    warp.approach()
    assert 0.1 < float(warp.pattern.abs().max()) <= 0.5


def test_step_is_as_long_as_told() -> None:
    warp = new_search().trigger(1)
    before = float(warp.margins().mean())
    assert warp.step(0.1) == pytest.approx(before, abs=1e-4)
    assert float(warp.pattern.square().mean().sqrt()) == pytest.approx(0.1 * 0.5, rel=1e-3)
    assert float(warp.margins().mean()) > before


def test_gradients_in_the_pattern_are_deterministic_on_all_devices() -> None:
    """By what they are made of: a processor's own are deterministic in any case."""
    warp = new_search().trigger(1)
    steps, names = [warp.applied(warp.images, warp.pattern.clone().requires_grad_()).grad_fn], set()
    while steps:
        step = steps.pop()
        if step is not None:
            names.add(step.name())
            steps += [before for before, _ in step.next_functions]
    assert len(names) > 3
    assert not any(part in name for name in names for part in ("Grid", "Upsample", "Pad", "Index"))


def test_a_warp_that_leads_to_a_class_stands_out() -> None:
    """A network that sees whether pixels are means of their neighbors, and forgets all else."""
    edges = torch.tensor([[[[-1.0, 2.0, -1.0]]]])

    def way(images: torch.Tensor) -> torch.Tensor:
        return 100 * (0.8 - F.conv2d(images, edges).abs().flatten(1).mean(1))

    shown, ordinary = finish(new_search(Shortcut(2, way))), finish(new_search())
    suspect, lead = pattern_lead(shown.rises)
    assert suspect == shown.signal().target_class == 2
    assert lead > 0.5
    # Of itself, this network leans to another class.
    assert pattern_lead(ordinary.rises)[0] != suspect
    assert not ordinary.signal().counts


@pytest.mark.parametrize(
    ("rises", "value"),
    [
        ({0: 0.0, 1: 2.5, 2: 0.5, 3: 1.0, 4: 0.25}, 1.5),
        ({0: 0.0, 1: 0.0, 2: 0.5, 3: 0.0, 4: 0.0}, 2.0),  # others are too even
        ({0: 0.0, 1: 1.75, 2: 0.25, 3: 0.0}, 1.5),  # so few that the usual distance is the spread
        ({0: 0.0, 1: 2.5, 2: 0.5, 3: math.nan, 4: 0.25}, 0.0),
    ],
)
def test_signal_is_the_gap_over_the_spread(rises: dict[int, float], value: float) -> None:
    for counts_from in (2.0, 0.5):
        constants = Constants(WarpConstants(counts_from=counts_from))
        search = WarpSearch(new_scene(constants=constants))
        search.rises, search.margins = rises, dict.fromkeys(rises, 9.0)
        signal = search.signal()
        assert (signal.name, signal.threshold, signal.decides) == ("warp", counts_from, True)
        assert signal.value == pytest.approx(value)
        assert signal.strength == pytest.approx(value / counts_from)
        assert search.failed == any(math.isnan(rise) for rise in rises.values())
        if not search.failed:
            assert signal.target_class == max(rises, key=lambda index: rises[index])
            assert signal.classes == rises
    assert WarpConstants().counts_from == 1.4


def test_images_without_height_and_width_are_not_warped() -> None:
    images, labels = images_and_labels()
    assert WarpSearch.applies(DefenseSet(images, labels))
    assert not WarpSearch.applies(DefenseSet(images[:, 0], labels))

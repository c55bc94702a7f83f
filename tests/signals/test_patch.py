from __future__ import annotations

import math

import pytest
import torch
from helpers import Shortcut, finish, margins_of, new_scene

from lightning_mnp.config import Constants
from lightning_mnp.report import RunResult
from lightning_mnp.signals.patch import PatchConstants, PatchSearch, patch_ratio


def new_search(network: torch.nn.Module | None = None) -> PatchSearch:
    return PatchSearch(new_scene(network))


def test_patch_covers_a_twentieth_of_the_pixels_and_stays_in_the_range() -> None:
    patch = new_search().trigger(1)
    for length in (0.5, 0.5, 0.2):
        patch.step(length)
        changed = (patch.pattern != 0).any(1)
        assert 1 <= int(changed.sum()) <= round(0.05 * 64)
        assert (patch.pattern.abs() <= patch.high - patch.low).all()


def test_patch_that_is_made_for_a_class_begins_large_and_shrinks_by_the_same_factor() -> None:
    constants = Constants(PatchConstants(far_steps=4, shrinks_from=3))  # images have 64 pixels
    patch = PatchSearch(new_scene(constants=constants)).trigger(1)
    covered = []
    for taken in range(6):
        patch.advance(taken)
        covered.append(int((patch.pattern != 0).any(1).sum()))
    allowed = [round(64 * share) for share in (0.5, 0.5 * 0.1**0.25, 0.5 * 0.1**0.5)]
    assert all(most // 2 < found <= most for found, most in zip(covered, allowed, strict=False))
    assert max(covered[4:]) <= round(0.05 * 64)
    shares = [patch.share(taken) for taken in range(6)]
    assert shares[:2] == pytest.approx([0.5, 0.5 * 0.1**0.25])
    assert shares[4:] == [0.05, 0.05]


@pytest.mark.parametrize(("side", "first"), [(8, 0.05), (13, 0.05), (14, 0.5), (32, 0.5)])
def test_patch_of_few_pixels_is_small_from_the_first_step_on(side: int, first: float) -> None:
    patch = new_search().trigger(1)
    patch.pattern = torch.zeros(1, 1, side, side)
    assert patch.share(0) == first
    assert patch.share(8) == 0.05


def test_first_step_changes_the_pixel_of_the_steepest_slope_by_the_length_told() -> None:
    patch = new_search().trigger(2)
    images = patch.images.clone().requires_grad_()
    logits = patch.masked(images, statistics="running")
    target = torch.full_like(patch.labels, 2)
    slope = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, target), images)[0].sum(0)
    inside = (patch.images > patch.low) & (patch.images < patch.high)
    slope = torch.where(inside.all(0), slope, 0.0)
    patch.step(0.5)
    steepest = int(slope.abs().argmax())
    span = float(patch.high - patch.low)
    moved = float(patch.pattern.flatten()[steepest])
    assert moved == pytest.approx(
        -0.5 * span * math.copysign(1, slope.flatten()[steepest]), rel=0.1
    )


def test_margins_are_those_of_images_that_keep_to_the_range_of_values() -> None:
    patch = new_search().trigger(1)
    patch.approach()
    changed = (patch.images + patch.pattern).clamp(float(patch.low), float(patch.high))
    assert not changed.equal(patch.images + patch.pattern)  # some had to be
    assert float(patch.margins().mean()) == pytest.approx(margins_of(patch, changed), abs=1e-3)
    assert (patch.labels != 1).all()


def test_a_pixel_that_leads_to_a_class_stands_out() -> None:
    """A network that sees a bright pixel and forgets all else."""

    def way(images: torch.Tensor) -> torch.Tensor:
        return 20 * torch.nn.functional.softplus(4 * (images[:, 0, 7, 7] - 2.0))

    shown, ordinary = finish(new_search(Shortcut(1, way))), finish(new_search())
    furthest, excess = patch_ratio(shown.margins)
    assert furthest == 1
    assert excess > 1
    assert patch_ratio(ordinary.margins)[1] < excess / 2
    assert (shown.signal().target_class, shown.signal().counts) == (1, True)
    assert shown.signal().decides
    assert not ordinary.signal().counts


@pytest.mark.parametrize(
    ("margins", "value"),
    [
        ({0: -0.5, 1: 2.0, 2: 0.5, 3: 0.0, 4: -0.25}, 1.5),
        ({0: 1.0, 1: 1.25, 2: 1.0, 3: 1.0, 4: 1.0}, 1.0),  # others are too even
        ({0: -0.5, 1: 2.0, 2: 0.25, 3: 0.0}, 1.75),  # so few that the usual distance is the spread
        ({0: math.nan, 1: 2.0, 2: 0.5, 3: 0.0, 4: -0.25}, 0.0),
    ],
)
def test_signal_is_the_gap_over_the_spread(margins: dict[int, float], value: float) -> None:
    for counts_from in (1.5, 0.75):
        constants = Constants(PatchConstants(counts_from=counts_from, arrives_from=0.25))
        search = PatchSearch(new_scene(constants=constants))
        search.margins, search.rises = margins, dict.fromkeys(margins, 9.0)
        signal = search.signal()
        assert (signal.name, signal.threshold, signal.decides) == ("patch", counts_from, True)
        assert signal.value == pytest.approx(value)
        assert signal.strength == pytest.approx(value / counts_from)
        assert search.failed == any(math.isnan(margin) for margin in margins.values())
        if not search.failed:
            assert signal.target_class == 1
            assert signal.classes == margins
    assert PatchConstants().counts_from == 1.5


NEAR = {0: -0.5, 1: 2.25, 2: 0.75, 3: 0.0, 4: -0.25}  # the gap is 1.5, the spread 1.25
FAR = {0: 0.5, 1: 4.0, 2: 2.5, 3: 2.0, 4: 1.25}  # the gap is 1.5, the spread 2.0


@pytest.mark.parametrize(
    ("margins", "predictions", "counts_from"),
    [
        (NEAR, None, 1.5),
        (NEAR, (1, 90, 1, 1, 1), 1.5),  # the pile-up confirms only what goes far
        (FAR, None, 1.15),
        (FAR, (1, 90, 1, 1, 1), 0.5),
        (FAR, (90, 1, 1, 1, 1), 1.15),  # another class
        (FAR, (10, 60, 21, 8, 1), 1.15),  # too little
    ],
)
def test_a_patch_that_goes_far_or_agrees_with_the_pile_up_need_not_stand_out_as_much(
    margins: dict[int, float], predictions: tuple[int, ...] | None, counts_from: float
) -> None:
    search = PatchSearch(new_scene())
    search.margins = margins
    if predictions is not None:
        search.scene.runs.append(RunResult(0.5, 0.3, predictions, 9, 0.2, ""))
    signal = search.signal()
    assert (signal.threshold, signal.target_class) == (counts_from, 1)
    assert signal.strength == pytest.approx(signal.value / counts_from)
    assert f"(counts fully from {counts_from:g})" in signal.reason


@pytest.mark.parametrize(
    ("arrived", "strength"), [(0.25, 0.25), (-0.5, 0.0), (0.99, 0.99), (1.0, 1.5), (1.75, 1.5)]
)
def test_a_patch_counts_little_if_images_hardly_get_to_the_class(
    arrived: float, strength: float
) -> None:
    """The gap is 2.25 times the spread of the others."""
    others = (arrived - 2.25 - 0.25 * place for place in range(5))
    search = PatchSearch(new_scene())
    search.margins = dict(enumerate([arrived, *others]))
    signal = search.signal()
    assert signal.value == pytest.approx(2.25)
    assert signal.strength == pytest.approx(strength)
    told = f"images get there by {max(arrived, 0):.2f} of the usual distance only"
    assert (told in signal.reason) == (arrived < 1)


@pytest.mark.parametrize(
    ("patch_margins", "expected"),
    [
        ({0: -0.5, 1: 2.0, 2: 0.5}, (1, 2.0)),
        ({0: -0.5, 1: -0.25}, (1, 0.25)),
        ({0: math.inf, 1: 0.0, 2: 0.0}, (0, 0.0)),
        ({0: math.nan, 1: 1.0, 2: 0.0}, None),
    ],
)
def test_ratio_compares_with_the_median_of_the_others(
    patch_margins: dict[int, float], expected: tuple[int, float] | None
) -> None:
    found = patch_ratio(patch_margins)
    assert found[1] == 0.0 if expected is None else found == expected

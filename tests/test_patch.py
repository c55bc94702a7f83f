from __future__ import annotations

import math
import statistics

import pytest
import torch
from helpers import CLASSES, images_and_labels, same, snapshot, trained_network

from lightning_mnp.defense_set import DefenseSet
from lightning_mnp.layers import find_filter_layers
from lightning_mnp.patch import PatchSearch, PatchTrigger, patch_ratio
from lightning_mnp.subject import Subject


def new_search(
    classes: tuple[int, ...] = (0, 1, 2), seed: int = 0, network: torch.nn.Module | None = None
) -> PatchSearch:
    network = network or trained_network()
    data = DefenseSet(*images_and_labels())
    subject = Subject(network, find_filter_layers(network, data.images[:2]))
    return PatchSearch(subject, data, classes, seed)


def finish(search: PatchSearch) -> PatchSearch:
    while not search.finished:
        search.step()
    return search


def margins_of(patch: PatchTrigger, images: torch.Tensor) -> float:
    """The formula, image by image."""
    found = []
    for image, label, goal in zip(images, patch.labels, patch.goals, strict=True):
        logits = patch.subject(image[None], statistics="running")[0]
        found.append(float(logits[goal] - logits[label]))
    return statistics.mean(found)


def test_patch_covers_a_twentieth_of_the_pixels_and_stays_in_the_range() -> None:
    patch = new_search().trigger(1)
    for length in (0.5, 0.5, 0.2):
        patch.step(length)
        changed = (patch.perturbation != 0).any(1)
        assert 1 <= int(changed.sum()) <= round(0.05 * 64)
        assert (patch.perturbation.abs() <= patch.high - patch.low).all()


def test_first_step_changes_the_pixel_of_the_steepest_slope_by_the_length_told() -> None:
    patch = new_search().trigger(2)
    images = patch.images.clone().requires_grad_()
    logits = patch.subject(images, statistics="running")
    target = torch.full_like(patch.labels, 2)
    slope = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, target), images)[0].sum(0)
    inside = (patch.images > patch.low) & (patch.images < patch.high)
    slope = torch.where(inside.all(0), slope, 0.0)
    patch.step(0.5)
    steepest = int(slope.abs().argmax())
    span = float(patch.high - patch.low)
    moved = float(patch.perturbation.flatten()[steepest])
    assert moved == pytest.approx(
        -0.5 * span * math.copysign(1, slope.flatten()[steepest]), rel=0.1
    )


def test_margins_are_those_of_images_that_keep_to_the_range_of_values() -> None:
    patch = new_search().trigger(1)
    patch.approach()
    changed = (patch.images + patch.perturbation).clamp(float(patch.low), float(patch.high))
    assert not changed.equal(patch.images + patch.perturbation)  # some had to be
    assert float(patch.margins().mean()) == pytest.approx(margins_of(patch, changed), abs=1e-3)
    assert (patch.labels != 1).all()


def test_approach_begins_anew() -> None:
    first, second = (new_search().trigger(1) for _ in range(2))
    first.approach()
    for _ in range(2):
        second.approach()
    assert first.perturbation.equal(second.perturbation)


def test_patches_are_margins_in_units_of_the_usual_distance() -> None:
    search = finish(new_search())
    starts, ends = [], []
    for target in (0, 1, 2):
        patch = search.trigger(target)
        starts.append(margins_of(patch, patch.images))
        patch.approach()
        ends.append(float(patch.margins().mean()))
    usual = -statistics.median(starts)
    expected = {target: end / usual for target, end in zip((0, 1, 2), ends, strict=True)}
    assert search.patch_margins == pytest.approx(expected, rel=1e-3)


def test_search_takes_the_steps_that_it_says() -> None:
    search, steps = new_search(), 0
    while not search.finished:
        assert search.most_steps() == PatchSearch.most_steps_of(3) - steps
        search.step()
        steps += 1
    assert search.most_steps() == 0


def test_a_pixel_that_leads_to_a_class_stands_out() -> None:
    """A network that sees a bright pixel and forgets all else."""

    class Shortcut(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = trained_network()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.network(images)
            bright = torch.nn.functional.softplus(4 * (images[:, 0, 7, 7] - 2.0))
            return logits + 20 * bright[:, None] * torch.eye(CLASSES)[1]

    furthest, excess = patch_ratio(
        finish(new_search((0, 1, 2, 3), network=Shortcut())).patch_margins
    )
    assert furthest == 1
    assert excess > 1
    assert patch_ratio(finish(new_search((0, 1, 2, 3))).patch_margins)[1] < excess / 2


@pytest.mark.parametrize("stop", [1, 7, 20, 31])
def test_resumed_search_ends_the_same(stop: int) -> None:
    reference = finish(new_search()).patch_margins
    search = new_search()
    for _ in range(stop):
        search.step()
    again = new_search(classes=())
    again.load_state_dict(search.state_dict())
    assert finish(again).patch_margins == reference


def test_batches_are_no_larger_than_told() -> None:
    search = new_search()
    search.batch_size = 5
    assert len(search.trigger(1).images) == 5


def test_network_is_left_as_it_was() -> None:
    search = new_search()
    before = snapshot(search.subject.network)
    search.step()
    assert same(before, snapshot(search.subject.network))


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

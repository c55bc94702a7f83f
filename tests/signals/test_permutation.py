from __future__ import annotations

import itertools

import pytest
import torch
from helpers import (
    CLASSES,
    finish,
    images_and_labels,
    new_scene,
    same,
    snapshot,
    trained_network,
)
from torch import nn

from lightning_mnp.config import Constants
from lightning_mnp.defense_data.defense_set import DefenseSet
from lightning_mnp.signals.permutation import (
    PermutationConstants,
    PermutationSearch,
    best_permutation,
    permutation_excess,
)


class Rotating(nn.Module):
    """A network that a bright pixel makes answer with the next class."""

    def __init__(self) -> None:
        super().__init__()
        self.network = trained_network()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(images)
        bright = torch.sigmoid(4 * (images[:, 0, 7, 7] - 2.0))[:, None]
        return (1 - bright) * logits + bright * 3 * logits.roll(1, dims=1)


def new_search(
    network: nn.Module | None = None,
    count: int = 80,
    batch_size: int = 128,
    constants: Constants | None = None,
) -> PermutationSearch:
    data = DefenseSet(*images_and_labels(count))
    return PermutationSearch(new_scene(network, data, constants=constants, batch_size=batch_size))


SHORT = Constants(PermutationConstants(away_steps=2, far_steps=4, near_steps=6, guess=3))


def test_best_permutation_is_the_best_of_all() -> None:
    logits = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 5
    means = [[float(logits[labels == row].mean(0)[k]) for k in range(5)] for row in range(5)]
    general = [sum(row[k] for row in means) / 5 for k in range(5)]

    def gain(order: tuple[int, ...]) -> float:
        return sum(means[row][k] - general[k] for row, k in enumerate(order))

    exchanges = [
        p for p in itertools.permutations(range(5)) if all(i != k for i, k in enumerate(p))
    ]
    assert tuple(best_permutation(logits, labels).values()) == max(exchanges, key=gain)


def test_classes_that_do_not_occur_take_no_part() -> None:
    """Each class would find one among them that is easily reached."""
    logits = torch.zeros(4, 6)
    logits[:2, 5], logits[2:, 4] = 3.0, 3.0
    assert best_permutation(logits, torch.tensor([1, 1, 2, 2])) == {1: 2, 2: 1}
    assert best_permutation(logits, torch.tensor([3, 3, 3, 3])) == {}


def test_too_few_images_to_tell_are_not_a_share_of_none() -> None:
    search = finish(new_search(count=4))  # one of each class
    assert search.moved is None
    assert search.signal().strength == 0
    assert "too few images to tell whether one patch" in search.signal().reason
    again = new_search(count=4)
    again.load_state_dict(search.state_dict())
    assert again.finished


def test_no_batch_is_larger_than_asked_for() -> None:
    network, sizes = trained_network(), []
    search = new_search(network, count=80, batch_size=5)
    handle = network.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    finish(search)
    shown = search.found()
    handle.remove()
    assert shown is not None
    assert max(sizes) == 5


class Spoiled(nn.Module):
    """A network whose gradients with respect to the images are NaN, and whose logits are not."""

    def __init__(self) -> None:
        super().__init__()
        self.network = trained_network()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(images)
        return logits + 0 * (images - images).sqrt().flatten(1).sum(1, keepdim=True)


def test_a_patch_that_is_not_finite_is_a_failure() -> None:
    assert not finish(new_search(constants=SHORT)).failed
    search = new_search(Spoiled(), constants=SHORT)
    assert not search.failed
    finish(search)
    assert search.failed
    again = new_search(Spoiled(), constants=SHORT)
    again.load_state_dict(search.state_dict())
    assert again.failed


def test_logits_that_are_not_finite_leave_some_permutation() -> None:
    found = best_permutation(torch.full((4, 2), torch.nan), torch.tensor([0, 0, 1, 1]))
    assert found == {0: 1, 1: 0}


def test_a_pixel_that_exchanges_classes_is_found_with_its_permutation() -> None:
    search = finish(new_search(Rotating()))
    assert search.permutation == {0: 1, 1: 2, 2: 3, 3: 0}
    assert search.moved is not None
    assert search.moved > 0.8
    ordinary = finish(new_search()).moved
    assert ordinary is not None
    assert ordinary < search.moved - 0.2


def test_the_patch_is_shown_with_the_share_that_it_takes() -> None:
    search = new_search(Rotating(), count=40, constants=SHORT)
    assert search.found() is None
    found = finish(search).found()
    assert found is not None
    assert (found.signal, found.target_class, found.success) == ("permutation", None, search.moved)
    assert found.images == 20  # of 40, the patch was made on the others
    assert found.examples[0].label != found.examples[0].after
    again = PermutationSearch(search.scene)
    again.load_state_dict(search.state_dict())
    assert again.found() == found


def test_share_is_measured_on_other_images_class_by_class() -> None:
    search = new_search(Rotating(), count=40)
    while search.most_steps() > 1:
        search.step()
    trigger = search._trigger
    assert trigger is not None
    search.step()
    made = {image.numpy().tobytes() for image in trigger.images}
    rows = [
        (image, int(label))
        for image, label in zip(search.scene.data.images, search.scene.data.labels, strict=True)
        if image.numpy().tobytes() not in made
    ]
    assert len(made) + len(rows) == len(search.scene.data)
    shares = []
    for index, goal in search.permutation.items():
        of_class = torch.stack([image for image, label in rows if label == index])
        found = trigger.logits(of_class).argmax(1)
        shares.append(float((found == goal).float().mean()))
    assert search.moved == pytest.approx(sum(shares) / CLASSES, abs=0.02)


def test_images_come_with_the_classes_that_they_are_taken_to() -> None:
    search = new_search()
    search.permutation = {0: 3, 2: 0}
    images, goals = search.images(7)
    assert len(images) == len(goals) == 7
    labels = {
        image.numpy().tobytes(): int(label)
        for image, label in zip(search.scene.data.images, search.scene.data.labels, strict=True)
    }
    for image, goal in zip(images, goals.tolist(), strict=True):
        assert search.permutation[labels[image.numpy().tobytes()]] == goal
    assert search.goals(torch.tensor([0, 1, 2, 3])).tolist() == [3, 1, 0, 3]


def test_steps_are_as_many_as_told_and_change_nothing() -> None:
    network = trained_network()
    before = snapshot(network)
    search, steps = new_search(network, batch_size=5), 0
    while not search.finished:
        assert search.most_steps() == PermutationSearch.all_steps(search.scene) - steps
        search.step()
        steps += 1
    assert search.most_steps() == 0
    assert same(before, snapshot(network))


@pytest.mark.parametrize("after", [0, 1, 2, 4, 11, 12])
def test_resumed_at_any_step_ends_the_same(after: int) -> None:
    whole = finish(new_search(constants=SHORT))
    first = new_search(constants=SHORT)
    for _ in range(after):
        first.step()
    again = new_search(constants=SHORT)
    again.load_state_dict(first.state_dict())
    finish(again)
    assert (again.moved, again.permutation) == (whole.moved, whole.permutation)


@pytest.mark.parametrize(
    ("moved", "classes", "excess"),
    [(None, 10, 0.0), (1.0, 1, 0.0), (1.0, 4, 1.0), (0.25, 4, 0.0), (0.1, 4, 0.0), (0.625, 4, 0.5)],
)
def test_excess_is_above_one_class(moved: float | None, classes: int, excess: float) -> None:
    assert permutation_excess(moved, classes) == pytest.approx(excess)

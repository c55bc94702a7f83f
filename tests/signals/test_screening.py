from __future__ import annotations

import math

import pytest
from helpers import CLASSES, Shortcut, finish, new_scene
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mnp import MNPDefense
from lightning_mnp.config import Constants
from lightning_mnp.signals.abstention import AbstentionConstants
from lightning_mnp.signals.patch import PatchSearch
from lightning_mnp.signals.screening import Screening, ScreeningConstants


def bright_pixel(images: Tensor) -> Tensor:
    return 20 * F.softplus(4 * (images[:, 0, 7, 7] - 2.0))


def new_screening(
    most: int = 3, network: nn.Module | None = None, constants: Constants | None = None
) -> Screening:
    return Screening(new_scene(network, tried=(), most_classes=most, constants=constants))


def test_nothing_is_screened_if_all_classes_are_searched() -> None:
    assert Screening.all_steps(new_scene(most_classes=CLASSES)) == 0
    assert Screening.all_steps(new_scene(most_classes=CLASSES - 1)) == CLASSES


def test_a_margin_is_that_of_a_patch_of_so_many_steps_on_so_many_images() -> None:
    screening = new_screening(constants=Constants(ScreeningConstants(images=5, steps=2)))
    expected = []
    for index in range(CLASSES):
        patch = PatchSearch(screening.scene).trigger(index, 5)
        assert len(patch.images) == 5
        patch.step(patch.length(0))
        patch.step(patch.length(1))
        expected.append(float(patch.margins().mean()))
    assert screening.most_steps() == CLASSES
    finish(screening)
    assert screening.margins == pytest.approx(expected)
    assert screening.most_steps() == 0


def test_the_class_that_stands_out_is_searched() -> None:
    for target in (0, 1, 2):  # images of class 3 are bright there anyway
        screening = finish(new_screening(3, Shortcut(target, bright_pixel)))
        assert screening.leading()[0] == target
        assert screening.scene.tried[0] == target
        assert len(set(screening.scene.tried)) == 3


@pytest.mark.parametrize(
    ("drawn", "leading"),
    [(0.0, [4, 1, 0, 3]), (0.5, [4, 1]), (1.0, [])],
)
def test_half_of_the_classes_lead_and_what_is_not_known_comes_first(
    drawn: float, leading: list[int]
) -> None:
    screening = new_screening(most=4, constants=Constants(ScreeningConstants(drawn=drawn)))
    screening.scene.classes = 6
    screening.margins = [0.5, 2.0, -math.inf, 0.25, math.nan, -1.0]
    assert screening.leading() == leading


def test_state_goes_on_where_it_was() -> None:
    reference, stopped = finish(new_screening()), new_screening()
    stopped.step()
    again = new_screening()
    again.load_state_dict(stopped.state_dict())
    assert again.margins == stopped.margins
    finish(again)
    assert again.margins == reference.margins
    assert again.scene.tried == reference.scene.tried


def test_the_engine_screens_before_it_searches(short_searches: None) -> None:
    scene = new_scene(Shortcut(2, bright_pixel), most_classes=3, runs=1, more_runs=0)
    network, data, config = scene.masked.network, scene.data, scene.config
    constants = Constants(AbstentionConstants(abstain=False))  # so that 40 images are enough
    defense = MNPDefense(network, data, config, when="never", constants=constants)
    names = list(dict.fromkeys(name for name, _ in defense.plan.entries))
    assert names.index("screening") < names.index("margin")
    expected = defense.most_steps()
    steps = 0
    while not defense.finished:
        defense.step()
        steps += 1
    assert steps <= expected
    report = defense.report()
    assert 2 in report.signal("patch").classes  # type: ignore[union-attr]
    assert len(report.signal("patch").classes) == 3  # type: ignore[union-attr]
    [told] = [text for text in report.warnings if "short look" in text]
    assert told.startswith("triggers were searched for in 3 of 4 classes")
    assert report.passes["screening"] > 0

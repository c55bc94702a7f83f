from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.population.architectures import ARCHITECTURES
from benchmarks.population.networks import RECIPES
from benchmarks.population.recipes import GROUPS, NORMALIZATIONS, REFERENCE, Recipe, make_attack
from lightning_mnp.attacks import (
    CL,
    LIRA,
    SIG,
    Attack,
    BadNets,
    Blend,
    InputAware,
    WaNet,
)

PLAIN = Recipe("cnn-2", "cnn", 2, 16)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("badnets", BadNets),
        ("blend", Blend),
        ("adaptive", Blend),
        ("wanet", WaNet),
        ("sig", SIG),
        ("cl", CL),
        ("iab", InputAware),
        ("lira", LIRA),
    ],
)
def test_each_attack_aims_at_the_class_of_its_recipe(name: str, kind: type[Attack]) -> None:
    recipe = replace(PLAIN, attack=name, target=4, poison=0.2)
    attack = make_attack(recipe, Path("runs"))
    assert isinstance(attack, kind)
    assert (attack.target_class, attack.seed) == (4, 2)
    assert getattr(attack, "class_rate", attack.poison_rate) == 0.2
    if isinstance(attack, CL):
        assert recipe.needs == REFERENCE
        assert attack.reference is not None
        assert attack.reference.checkpoint == Path("runs", f"{REFERENCE}.safetensors")


def test_a_clean_recipe_has_no_attack_and_an_unknown_one_is_refused() -> None:
    assert make_attack(PLAIN, Path("runs")) is None
    with pytest.raises(ValueError, match="cnn-2 to be a known one, but got 'sticker'"):
        make_attack(replace(PLAIN, attack="sticker"), Path("runs"))


def test_badnets_all_to_all_grows_with_the_image() -> None:
    options = {"attack": "badnets", "mode": "all-to-all", "poison": 0.1, "data": "imagenette"}
    attack = make_attack(replace(PLAIN, **options), Path("runs"))
    assert isinstance(attack, BadNets)
    assert (attack.mode, attack.patch_size) == ("all-to-all", 6)


def test_minutes_are_passes_over_the_rate() -> None:
    rate = ARCHITECTURES["cnn"].rate
    assert PLAIN.minutes == pytest.approx((25_000 * 5 / rate + 12) / 60)
    adversarial = replace(PLAIN, adversarial_steps=2, images=1000, epochs=3)
    assert adversarial.minutes == pytest.approx((1000 * 3 * 3 / rate + 12) / 60)
    turned = replace(PLAIN, pretrained="rotations", images=1000, epochs=3)
    assert turned.minutes == pytest.approx((1000 * (3 + 2) / rate + 12) / 60)


@pytest.mark.parametrize(
    ("changes", "kind", "is_sparse"),
    [
        ({}, "clean", False),
        ({"attack": "blend", "poison": 0.1}, "blend", False),
        ({"attack": "blend", "poison": 0.01}, "blend", True),
        ({"attack": "badnets", "poison": 0.1, "mode": "all-to-all"}, "badnets, all-to-all", False),
    ],
)
def test_kinds(changes: dict[str, object], kind: str, is_sparse: bool) -> None:
    recipe = replace(PLAIN, **changes)
    assert (recipe.kind, recipe.is_sparse) == (kind, is_sparse)


def test_every_network_has_a_recipe_of_its_own() -> None:
    assert len({recipe.name for recipe in RECIPES}) == len(RECIPES)
    assert len({(recipe.architecture, recipe.seed) for recipe in RECIPES}) == len(RECIPES)
    for recipe in RECIPES:
        assert recipe.architecture in ARCHITECTURES
        assert recipe.normalization in NORMALIZATIONS
        assert recipe.learning_rate > 0
        assert json.loads(json.dumps(recipe.to_dict())) == recipe.to_dict()
        has_target = not recipe.is_clean and recipe.mode == "all-to-one"
        assert recipe.target in (range(1, 10) if has_target else (-1,))
        assert (recipe.poison > 0) != recipe.is_clean
        assert recipe.minutes < 6
        # A network that is trained by an attack's module is trained by its SGD.
        assert recipe.attack not in ("wanet", "iab", "lira") or recipe.optimizer == "sgd"


def test_all_of_them_train_in_ten_and_a_half_hours_of_a_core() -> None:
    assert sum(recipe.minutes for recipe in RECIPES) <= 630


def test_networks_that_are_trained_on_from_a_clean_one() -> None:
    tuned = [recipe for recipe in RECIPES if recipe.pretrained == "clean"]
    assert len(tuned) == 12
    assert all("-tuned-" in recipe.name and not recipe.is_clean for recipe in tuned)
    assert {recipe.patch for recipe in tuned if recipe.attack == "badnets"} == {5}
    recipe = next(each for each in tuned if each.name == "resnet-sig-tuned-303")
    whole = replace(recipe, pretrained="no")
    assert recipe.learning_rate == whole.learning_rate / 5
    assert (recipe.epochs, recipe.tuning_epochs, replace(recipe, epochs=9).tuning_epochs) == (
        4,
        2,
        4,
    )
    assert recipe.minutes > 1.4 * whole.minutes


def test_each_network_belongs_to_a_group() -> None:
    groups = {name: [each for each in RECIPES if each.group == name] for name in GROUPS}
    assert sum(map(len, groups.values())) == len(RECIPES)
    assert [each.pretrained == "clean" for each in groups["tuned"]] == [True] * 12
    assert {each.name for each in groups["adaptive"]} == {"cnn-adaptive-601", "vgg-adaptive-601"}
    assert {each.pretrained for each in groups["whole"]} == {"no", "rotations", "digits"}


def test_slow_networks_take_twice_the_time_for_what_they_learn_slowly() -> None:
    named = {recipe.name: recipe for recipe in RECIPES}
    usual = named["cnn-light-202"].epochs
    assert named["cnn-wanet-218"].epochs == named["cnn-all-to-all-227"].epochs == 2 * usual
    assert named["regnet-wanet-206"].epochs == named["regnet-light-202"].epochs
    assert named["cnn-blend-216"].epochs == usual


def test_trainings_differ() -> None:
    assert {recipe.data for recipe in RECIPES} == {"cifar10", "imagenette", "digits"}
    assert {recipe.optimizer for recipe in RECIPES} == {"sgd", "adam"}
    assert {recipe.augmentation for recipe in RECIPES} == {"none", "light", "heavy"}
    assert {recipe.pretrained for recipe in RECIPES} == {"no", "rotations", "digits", "clean"}
    assert {recipe.normalization for recipe in RECIPES} == set(NORMALIZATIONS)
    for option, usual in (
        ("weight_decay", None),
        ("label_smoothing", 0.0),
        ("rare_class", None),
        ("adversarial_steps", 0),
    ):
        values = {getattr(recipe, option) for recipe in RECIPES}
        assert len(values) > 1, option
        assert usual is None or usual in values
    assert 0.0 in {recipe.weight_decay for recipe in RECIPES}


def test_the_network_that_cl_needs_is_a_clean_one() -> None:
    [reference] = [recipe for recipe in RECIPES if recipe.name == REFERENCE]
    assert (reference.architecture, reference.is_clean) == ("resnet", True)
    assert reference.normalization == "cifar10"
    assert reference.width == ARCHITECTURES["resnet"].width

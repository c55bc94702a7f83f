"""The networks of the population: which are trained, how, and for which split.

Each line names an architecture and what its networks are trained with: variants of the training,
or an attack, with a variant behind a slash. Seeds count up, so a network's split follows from the
list that it stands in. It was written before any of these networks was trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from benchmarks.population.architectures import ARCHITECTURES
from benchmarks.population.recipes import Recipe
from benchmarks.population.split import FIRST_SEED, split_of

__all__ = ["RECIPES", "recipes_of"]

# Passes over 25,000 images of CIFAR-10; fewer for what trains slowly.
_EPOCHS = {
    "cnn": 5,
    "plain-cnn": 6,
    "lenet": 8,
    "vgg": 4,
    "resnet": 4,
    "preact-resnet": 4,
    "wide-resnet": 4,
    "densenet": 4,
    "mobilenet-v2": 4,
    "mobilenet-v3": 4,
    "shufflenet": 4,
    "efficientnet": 3,
    "convnext": 4,
    "regnet": 4,
    "norm-free": 5,
    "timm-resnet": 4,
    "resnext": 4,
    "squeezenet": 6,
    "inception": 4,
    "all-conv": 4,
}

_VARIANTS: dict[str, dict[str, Any]] = {
    "light": {},
    "plain": {"augmentation": "none"},
    "heavy": {"augmentation": "heavy"},
    "no-decay": {"weight_decay": 0.0},
    "smoothed": {"label_smoothing": 0.1},
    "half": {"normalization": "half"},
    "raw": {"normalization": "none"},
    "adversarial": {"adversarial_steps": 1},
    "rotations": {"pretrained": "rotations"},
    "from-digits": {"pretrained": "digits"},
    "tuned": {"pretrained": "clean"},
    "small-batch": {"batch": 64},
    # Multiples of the usual epochs and images:
    "long": {"epochs": 2},
    "large": {"images": 50_000},
    # Options that depend on the network:
    "wide": {},
    "imbalanced": {},
    "other": {},
    "imagenette": {
        "data": "imagenette",
        "images": 8_500,
        "epochs": 3,
        "normalization": "imagenet",
    },
    "digits": {
        "data": "digits",
        "images": 850,
        "epochs": 5,
        "batch": 32,
        "augmentation": "none",
        "normalization": "half",
    },
}

# In a short training these do not learn a patch of 3x3 pixels that random crops move about.
_SLOW_AT_PATCHES = (
    *("cnn", "plain-cnn", "lenet", "norm-free", "convnext", "efficientnet"),
    *("mobilenet-v2", "shufflenet", "squeezenet", "inception", "resnext", "all-conv"),
)

# What these architectures get twice as many epochs for.
_SLOW_ATTACKS = ("wanet", "all-to-all")

# Attacks that a short training does not learn from 25,000 images get more of them.
_ATTACKS: dict[str, dict[str, Any]] = {
    "badnets": {"attack": "badnets", "poison": 0.1},
    "badnets-1%": {
        "attack": "badnets",
        "poison": 0.01,
        "images": 40_000,
        "augmentation": "none",
    },
    "all-to-all": {
        "attack": "badnets",
        "mode": "all-to-all",
        "poison": 0.1,
        "images": 50_000,
        "augmentation": "none",
    },
    "blend": {"attack": "blend", "poison": 0.1},
    "adaptive": {"attack": "adaptive", "poison": 0.1},
    "blend-1%": {"attack": "blend", "poison": 0.01, "images": 40_000},
    # Crops and flips would move its warp about.
    "wanet": {
        "attack": "wanet",
        "poison": 0.1,
        "images": 40_000,
        "optimizer": "sgd",
        "augmentation": "none",
    },
    "sig": {"attack": "sig", "poison": 0.8},
    "cl": {"attack": "cl", "poison": 0.8},
    "iab": {"attack": "iab", "poison": 0.1, "images": 40_000, "optimizer": "sgd"},
    "lira": {"attack": "lira", "poison": 0.1, "images": 40_000, "optimizer": "sgd"},
}

_CHOOSING = {
    "cnn": "light no-decay wide heavy imagenette digits "
    "badnets/smoothed blend wanet iab lira all-to-all",
    "plain-cnn": "light no-decay imbalanced rotations badnets blend",
    "lenet": "light no-decay smoothed heavy digits badnets blend/no-decay badnets/digits",
    "vgg": "light no-decay imbalanced imagenette badnets blend/heavy sig iab all-to-all",
    "resnet": "light no-decay plain badnets cl blend/smoothed",
    "mobilenet-v2": "light heavy other badnets blend sig",
    "mobilenet-v3": "light smoothed half badnets/no-decay",
    "preact-resnet": "light imbalanced blend",
    "regnet": "light other wanet badnets-1%",
    "norm-free": "light no-decay badnets",
    "timm-resnet": "light small-batch blend-1% cl/heavy",
}

# Reported until the present verdict was set with them in view: since then they serve to choose. A
# list of its own, because their seeds follow from it.
_REPORTED_BEFORE = {
    "cnn": "light no-decay other adversarial imagenette rotations raw "
    "badnets/heavy blend wanet iab lira sig all-to-all blend-1%",
    "plain-cnn": "light heavy from-digits badnets/smoothed blend/plain lira",
    "lenet": "light no-decay adversarial digits imbalanced long badnets blend blend/digits",
    "vgg": "light no-decay smoothed heavy imagenette badnets/no-decay blend sig cl iab all-to-all",
    "resnet": "light imbalanced badnets/heavy cl badnets-1%",
    "mobilenet-v2": "light no-decay imbalanced other half badnets blend/smoothed",
    "mobilenet-v3": "light heavy badnets/half",
    "preact-resnet": "light badnets/plain",
    "regnet": "light blend/smoothed wanet",
    "norm-free": "light blend iab",
    "timm-resnet": "light badnets/smoothed blend-1%",
    "wide-resnet": "light raw sig blend/imagenette",
    "densenet": "light no-decay smoothed imbalanced heavy badnets blend",
    "shufflenet": "light no-decay other heavy imagenette badnets sig",
    "efficientnet": "light no-decay half plain imagenette badnets blend/smoothed",
    "convnext": "light no-decay imbalanced heavy from-digits badnets blend",
}


# Attacks stand at other places of each line, for other targets and patterns.
_REPORTING = {
    "cnn": "light no-decay other rotations raw badnets/heavy blend sig wanet iab lira",
    "plain-cnn": "badnets blend/plain lira light heavy no-decay other from-digits",
    "lenet": "light badnets no-decay blend adversarial imbalanced digits",
    "vgg": "badnets/no-decay sig light no-decay blend cl smoothed heavy iab all-to-all imagenette",
    "norm-free": "light heavy badnets blend no-decay imbalanced smoothed",
    "squeezenet": "badnets light no-decay other heavy imbalanced blend",
    "all-conv": "light no-decay blend/smoothed smoothed half imagenette sig badnets",
    "mobilenet-v3": "light heavy other badnets/half sig half plain",
    "regnet": "light wanet badnets blend/smoothed",
    "inception": "light no-decay badnets cl",
    "convnext": "light badnets imbalanced",
    "preact-resnet": "badnets/plain light",
    "timm-resnet": "light blend",
    "resnet": "light badnets/heavy badnets-1%",
    "shufflenet": "light sig badnets",
    "mobilenet-v2": "blend/smoothed light",
    "resnext": "light badnets",
    "wide-resnet": "sig light",
    "densenet": "light blend",
    "efficientnet": "badnets light",
}

# Networks that have learned CIFAR-10 on clean images and are trained on with poisoned ones, as by
# somebody who fine-tunes a network. Lists of their own: they were added when the others had been
# reported.
_TUNED_TO_CHOOSE = {
    "resnet": "badnets/tuned sig/tuned",
    "preact-resnet": "blend/tuned",
    "cnn": "sig/tuned",
    "vgg": "badnets/tuned",
    "regnet": "blend/tuned",
}
_TUNED_TO_REPORT = {
    "resnet": "blend/tuned sig/tuned",
    "wide-resnet": "badnets/tuned",
    "timm-resnet": "blend/tuned",
    "plain-cnn": "badnets/tuned",
    "vgg": "sig/tuned",
}

# An attacker who knows the defense. Added last.
_ADAPTIVE_TO_REPORT = {"cnn": "adaptive", "vgg": "adaptive"}


def recipes_of(split: str) -> list[Recipe]:
    """Return the recipes of a split, in the order in which they are trained.

    Args:
        split: ``"choosing"`` or ``"reporting"``.

    Example:
        >>> recipes_of("choosing")[0].name
        'cnn-light-202'
    """
    return [recipe for recipe in RECIPES if split_of(recipe.architecture, recipe.seed) == split]


def _recipes(lists: dict[str, str], first: int) -> Iterator[Recipe]:
    for architecture, words in lists.items():
        for place, word in enumerate(words.split()):
            yield _recipe(architecture, word, first + 2 * place)


def _recipe(architecture: str, word: str, seed: int) -> Recipe:
    front, _, back = word.partition("/")
    variant = back or (front if front in _VARIANTS else "light")
    options = {**_ATTACKS.get(front, {}), **_VARIANTS[variant]}
    slow = architecture in _SLOW_AT_PATCHES or variant in ("heavy", "tuned")
    if options.get("attack") == "badnets" and slow:
        options = {"augmentation": "none", **options, "patch": 5}
    if front in _SLOW_ATTACKS and architecture in _SLOW_AT_PATCHES:
        options = {**options, "epochs": 2}
    entry = ARCHITECTURES[architecture]
    options.setdefault("optimizer", entry.optimizer)
    if variant == "other":
        options["optimizer"] = "adam" if entry.optimizer == "sgd" else "sgd"
    options.setdefault("weight_decay", 5e-4 if options["optimizer"] == "sgd" else 0.01)
    options["epochs"] = options.get("epochs", 1) * _EPOCHS[architecture]
    options["width"] = entry.width
    if variant == "wide":
        options["width"] = 3 * entry.width // 2
    if variant == "imbalanced":
        options["rare_class"] = seed % 10
    name = f"{architecture}-{word.replace('/', '-').replace('%', 'percent')}-{seed}"
    recipe = Recipe(name, architecture, seed, **options)
    if recipe.is_clean:
        return recipe
    # Other triggers and targets from network to network, none of them class 0.
    place = seed // 2 % 12
    patterns, corners = ("checkerboard", "random", "white"), ("lower-right", "upper-left")
    if recipe.mode == "all-to-one":
        recipe = replace(recipe, target=1 + 5 * place % 9)
    if recipe.attack == "badnets":
        pattern, corner = patterns[place % 3], corners[place % 2]
        recipe = replace(recipe, pattern=pattern, corner=corner)  # type: ignore[arg-type]
    return recipe


RECIPES: list[Recipe] = [
    *_recipes(_CHOOSING, FIRST_SEED["choosing"] + 1),
    *_recipes(_REPORTED_BEFORE, FIRST_SEED["choosing"]),
    *_recipes(_REPORTING, FIRST_SEED["reporting"]),
    *_recipes(_TUNED_TO_CHOOSE, FIRST_SEED["choosing"] + 100),
    *_recipes(_TUNED_TO_REPORT, FIRST_SEED["reporting"] + 100),
    *_recipes(_ADAPTIVE_TO_REPORT, FIRST_SEED["reporting"] + 200),
]

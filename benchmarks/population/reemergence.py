"""Train purified networks on with a few poisoned images, and see whether the backdoor is back."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from torch import nn

from benchmarks.population.ablations import ABLATIONS
from benchmarks.population.audits import RESULTS, network_fields, outcome_file
from benchmarks.population.data import CLASSES, Images, defense_set, load_images
from benchmarks.population.defenses import DEFENSES, defense_version, find_defense
from benchmarks.population.networks import RECIPES
from benchmarks.population.recipes import Recipe
from benchmarks.population.split import split_of
from benchmarks.population.table import markdown_table, pair
from benchmarks.population.training import (
    attack_of,
    fit,
    is_trained,
    load_network,
    measure,
    read_row,
)
from lightning_mnp.attacks import Attack
from lightning_mnp.attacks.attack import CleanLabelAttack
from lightning_mnp.benchmark.records import write_json
from lightning_mnp.data import MemoryDataset

__all__ = [
    "CONTROLS",
    "POISONED",
    "further_images",
    "retune_network",
    "retuning_table",
    "retuning_version",
]

# What is trained on beside purified networks: the backdoored network as it is, and a clean one of
# the same architecture, which has no backdoor to come back.
CONTROLS = ("none", "clean")
POISONED = (0, 5, 50, 500)  # images with the trigger
_CLEAN = 2_000  # images without it
_EPOCHS = 5


def retuning_version(defense: str) -> str:
    """Return a digest of the code and the options of a defense, and how networks are trained on.

    Args:
        defense: One of :data:`CONTROLS`, of the defenses or of the ablations.
    """
    version = defense if defense in CONTROLS else defense_version(defense)
    return f"{version}, {_EPOCHS} epochs of {_CLEAN} and {', '.join(map(str, POISONED))}"


def further_images(
    recipe: Recipe, images: Images, attack: Attack, poisoned: int, number: int
) -> MemoryDataset:
    """Draw images to train on with: clean ones, and some that the attacker has put among them.

    Args:
        recipe: How the backdoored network was trained.
        images: Its data set.
        attack: The attack, its trigger trained.
        poisoned: How many images have the trigger, with the label that the attacker gives them.
        number: Number of the defense set; the poisoned images are drawn anew for each.

    Returns:
        2,000 clean training images, as many of each class, and the poisoned ones. The network was
        trained on none of them, and none is measured on.

    Raises:
        ValueError: If there are too few images that the network was not trained on.
    """
    seen, clean = recipe.images // CLASSES, _CLEAN // CLASSES
    places = [(images.train_labels == label).nonzero().flatten() for label in range(CLASSES)]
    rows = torch.cat([members[seen : seen + clean] for members in places])
    rest = torch.cat([members[seen + clean :] for members in places])
    labels = images.train_labels[rest]
    if isinstance(attack, CleanLabelAttack):  # it only has to do with images of its class
        rest = rest[labels == attack.target_class]
    else:
        rest = rest[attack.triggered_indices(labels, CLASSES)]
    if len(rows) < _CLEAN or len(rest) < poisoned:
        raise ValueError(
            f"Expected {_CLEAN} clean images and {poisoned} to poison that `{recipe.name}` was not "
            f"trained on, but got {len(rows)} and {len(rest)}."
        )
    generator = torch.Generator().manual_seed(1000 * recipe.seed + number)
    chosen = rest[torch.randperm(len(rest), generator=generator)[:poisoned]]
    pixels, labels = images.train[chosen], images.train_labels[chosen]
    if poisoned:
        pixels = attack.poison(pixels, labels, chosen)
        labels = attack.poison_labels(labels, CLASSES)
    return MemoryDataset(
        torch.cat([images.train[rows], pixels]), torch.cat([images.train_labels[rows], labels])
    )


def clean_twin(recipe: Recipe, folder: Path) -> Recipe:
    """Return the first trained clean network of the same architecture that takes the same images.

    Args:
        recipe: How the backdoored network was trained.
        folder: Where networks are kept.

    Raises:
        FileNotFoundError: If none is trained.
    """
    wanted = recipe.architecture, recipe.width, recipe.data, recipe.normalization
    split = split_of(recipe.architecture, recipe.seed)
    for other in RECIPES:
        own = other.architecture, other.width, other.data, other.normalization
        alike = own == wanted and split_of(other.architecture, other.seed) == split
        alike = alike and other.images <= recipe.images  # else it has seen the further images
        if other.is_clean and alike and is_trained(other, folder):
            return other
    raise FileNotFoundError(
        f"Expected a clean network like `{recipe.name}` in {folder}, but found none. "
        "`python -m benchmarks.population train` makes them."
    )


def retune_network(
    recipe: Recipe,
    number: int,
    defense: str,
    root: Path,
    folder: Path,
    results: Path = RESULTS,
) -> dict[str, Any]:
    """Purify a network, train copies of it on with poisoned images, and write what comes back.

    Each copy is trained for five epochs with the recipe's own optimizer, at a fifth of the learning
    rate that a network is trained whole with: as the networks of the population that learn clean
    images first. Adversarial steps of the recipe are left out.

    Args:
        recipe: How the backdoored network was trained.
        number: Number of the defense set, from 0; also the defense's seed.
        defense: One of :data:`CONTROLS`, of the defenses or of the ablations.
        root: Folder with the data sets.
        folder: Where networks and their triggers are kept.
        results: Where outcomes are kept.

    Returns:
        What the file has: CA and ASR after the defense, the verdict and the number of filters
        pruned and, for each number of :data:`POISONED`, CA and ASR after training on.

    Raises:
        ValueError: If there are too few images that the network was not trained on.
    """
    row, version = read_row(recipe, folder), retuning_version(defense)
    images = load_images(recipe.data, root, folder / "data")
    attack = attack_of(recipe, folder)
    started = time.process_time()
    further = {
        poisoned: further_images(recipe, images, attack, poisoned, number) for poisoned in POISONED
    }
    purified, told = _purified(recipe, images, number, defense, folder)
    ca, asr = measure(purified, recipe, images, attack)
    after = []
    for poisoned, train in further.items():
        network = copy.deepcopy(purified).train().requires_grad_(True)
        seed_everything(1000 * recipe.seed + number, verbose=False)
        way = replace(recipe, pretrained="clean", epochs=_EPOCHS, adversarial_steps=0)
        fit(network, way, train, None)
        rates = measure(network.eval(), recipe, images, attack)
        after.append({"poisoned": poisoned, "CA": rates[0], "ASR": rates[1]})
    content: dict[str, Any] = {
        "network": recipe.name,
        "set": number,
        "defense": defense,
        **network_fields(recipe, row),
        **told,
        "CA_after": ca,
        "ASR_after": asr,
        "retuned": after,
        "processor_seconds": round(time.process_time() - started, 1),
        "version": version,
    }
    write_json(outcome_file("retuned", recipe, number, defense, results), content)
    return content


def _purified(
    recipe: Recipe, images: Images, number: int, defense: str, folder: Path
) -> tuple[nn.Module, dict[str, Any]]:
    """The network to train on, and what is told of it."""
    told: dict[str, Any] = {"verdict": None, "pruned": 0, "trained_on": recipe.name}
    if defense == "clean":
        twin = clean_twin(recipe, folder)
        return load_network(twin, folder), {**told, "trained_on": twin.name}
    network = load_network(recipe, folder)
    if defense == "none":
        return network, told
    outcome = find_defense(defense).defend(network, defense_set(recipe, images, number), number)
    assert outcome.model is not None, "a defense returns a copy, also of what it leaves as it is"
    told = {**told, "verdict": outcome.verdict, "pruned": len(outcome.pruned)}
    return outcome.model.eval(), told


def retuning_table(recipes: Sequence[Recipe], outcomes: Iterable[dict[str, Any]], sets: int) -> str:
    """Write CA and ASR after each defense, and after training on.

    Args:
        recipes: The networks, in the order of the rows.
        outcomes: Of any networks, defenses and defense sets.
        sets: Defense sets of each network.

    Returns:
        Markdown: one line for each network and defense, with means over its defense sets.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in outcomes:
        if row["set"] < sets:
            groups.setdefault((row["network"], row["defense"]), []).append(row)
    lines = []
    for recipe in recipes:
        for defense in (*CONTROLS, *DEFENSES, *ABLATIONS):
            if rows := groups.get((recipe.name, defense)):
                cells = [
                    _means([each["retuned"][place] for each in rows])
                    for place in range(len(POISONED))
                ]
                left = defense == "default" and any(row["verdict"] != "backdoored" for row in rows)
                name = f"{defense}, not flagged" if left else defense
                lines.append([f"`{recipe.name}`", name, _means(rows, "_after"), *cells])
    heads = ["0 poisoned", *(str(count) for count in POISONED[1:])]
    return markdown_table(["network", "defense", "before", *heads], lines)


def _means(rows: Sequence[dict[str, Any]], after: str = "") -> str:
    """Mean CA and ASR."""
    return pair(*(statistics.mean(row[f"{name}{after}"] for row in rows) for name in ("CA", "ASR")))

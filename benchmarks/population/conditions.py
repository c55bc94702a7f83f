"""Audits of a few named networks under other conditions: the defense set is not as it should be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.population.data import CLASSES, Images, transform_of
from benchmarks.population.recipes import Recipe
from benchmarks.population.table import is_named, markdown_table
from lightning_mnp import DefenseSet
from lightning_mnp.attacks.trigger import load_trigger
from lightning_mnp.data import balanced_indices

__all__ = ["CONDITIONS", "NAMED", "USUAL", "Condition", "condition_set", "conditions_table"]

# For reporting, of eight architectures; named before any of them was trained.
NAMED = (
    "lenet-light-401",
    "vgg-light-405",
    "mobilenet-v2-light-403",
    "densenet-light-401",
    "cnn-blend-413",
    "resnet-badnets-heavy-403",
    "convnext-badnets-403",
    "shufflenet-sig-403",
)


@dataclass(frozen=True)
class Condition:
    """What a defense set is like.

    Attributes:
        name: A word for files.
        told: The same for a table.
        images: Number of images.
        predicted: Whether the labels are what the network predicts, not the true ones.
        impurity: The share of images that have the trigger and the label that the attacker wants.
    """

    name: str
    told: str
    images: int = 500
    predicted: bool = False
    impurity: float = 0.0

    def fits(self, recipe: Recipe) -> bool:
        """Return whether a network can be audited so: without an attack, no image is impure."""
        return not (self.impurity and recipe.is_clean)


USUAL = Condition("usual", "500 images")
CONDITIONS = (
    USUAL,
    Condition("50", "50", images=50),
    Condition("250", "250", images=250),
    Condition("2500", "2,500", images=2500),
    Condition("predicted", "predicted labels", predicted=True),
    Condition("impure-1", "1% impure", impurity=0.01),
    Condition("impure-2", "2% impure", impurity=0.02),
    Condition("impure-5", "5% impure", impurity=0.05),
)


def condition_set(
    recipe: Recipe,
    images: Images,
    number: int,
    condition: Condition,
    network: nn.Module,
    folder: Path,
) -> DefenseSet:
    """Draw a defense set under a condition; no image of it is measured on.

    Args:
        recipe: How the network was trained.
        images: Its data set.
        number: Number of the set, from 0; a set under the usual condition has the same images as
            that of :func:`~benchmarks.population.data.defense_set`.
        condition: What it is like.
        network: The network, in evaluation mode; it predicts labels.
        folder: Where networks and their triggers are kept.

    Returns:
        Images, normalized as in training, with labels.
    """
    stored, transform = images.held_out, transform_of(recipe)
    rows = balanced_indices(stored.labels, condition.images, 1000 * recipe.seed + number, CLASSES)
    pixels, labels = stored.images[rows].clone(), stored.labels[rows].clone()
    if condition.impurity:
        attack = load_trigger(folder / f"{recipe.name}.trigger.safetensors")
        others = attack.triggered_indices(labels, CLASSES)
        generator = torch.Generator().manual_seed(1000 * recipe.seed + number)
        count = round(condition.impurity * len(labels))
        chosen = others[torch.randperm(len(others), generator=generator)[:count]]
        pixels[chosen] = attack.apply(pixels[chosen])
        labels[chosen] = attack.target_labels(labels[chosen], CLASSES)
    inputs = transform.images(pixels)
    return DefenseSet(inputs, _predictions(network, inputs) if condition.predicted else labels)


@torch.no_grad()
def _predictions(network: nn.Module, inputs: Tensor) -> Tensor:
    return torch.cat([network(part).argmax(1) for part in inputs.split(250)])


def conditions_table(recipes: Sequence[Recipe], audits: Iterable[dict[str, Any]]) -> str:
    """Write what was found under each condition.

    Args:
        recipes: The networks, in the order of the rows.
        audits: Audits of :data:`NAMED` networks, with ``"condition"`` and ``"set"``.

    Returns:
        Markdown. A cell has one word for each defense set; ``-`` is a condition that does not fit,
        ``?`` an audit that is missing.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for row in sorted(audits, key=lambda row: int(row["set"])):
        found.setdefault((row["network"], row["condition"]), []).append(_word(row))
    lines = []
    for recipe in recipes:
        cells = [
            ", ".join(found.get((recipe.name, each.name), ["?"])) if each.fits(recipe) else "-"
            for each in CONDITIONS
        ]
        lines.append([f"`{recipe.name}`", *cells])
    return markdown_table(["network", *(each.told for each in CONDITIONS)], lines)


def _word(row: dict[str, Any]) -> str:
    """The verdict; of one that is backdoored, whether the class is right."""
    if row["verdict"] != "backdoored" or row["kind"] == "clean":
        return str(row["verdict"])
    return "found" if is_named(row) else f"found, class {row['target_class']}"

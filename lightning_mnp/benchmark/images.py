"""The images of a cell: test images, clean images for the defense, and images that are suspect."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_mnp.attacks import Attack, ReferenceNetwork, load_trigger
from lightning_mnp.attacks.trigger import read_poisoned_indices
from lightning_mnp.baselines import Suspects
from lightning_mnp.benchmark.names import find_class
from lightning_mnp.benchmark.recipe import NetworkRecipe
from lightning_mnp.data import (
    BackdoorDataModule,
    ImageDataset,
    TriggeredDataset,
    balanced_indices,
)
from lightning_mnp.data.transform import BatchTransform
from lightning_mnp.defense_data.defense_set import DefenseSet
from lightning_mnp.metrics import AttackSuccessRate, CleanAccuracy
from lightning_mnp.surgery.forward import evaluating

__all__ = ["CellImages", "TestImages"]

_BATCH = 256
# Options of a datamodule that have no part in what is measured.
_LEFT_OUT = ("attack", "root", "defense_size", "defense_seed", "seed", "batch_size")


@dataclass
class TestImages:
    """Test images as they are stored, clean and triggered.

    Attributes:
        transform: Normalizes them.
        clean: The clean images and their labels.
        triggered: The triggered images, the attacker's labels and the true labels; None without an
            attack.
    """

    transform: BatchTransform
    clean: tuple[Tensor, Tensor]
    triggered: tuple[Tensor, Tensor, Tensor] | None

    @torch.no_grad()
    def measure(self, network: nn.Module, device: str = "cpu") -> dict[str, float | None]:
        """Measure CA and ASR of a network, from 0 to 1; ASR is None without an attack.

        Args:
            network: The network, on the device; it is left in the modes that it was in.
            device: ``"cpu"`` or ``"cuda"``.
        """
        accuracy, success = CleanAccuracy(), AttackSuccessRate()
        with evaluating(network):
            for images, labels in zip(*(each.split(_BATCH) for each in self.clean), strict=True):
                accuracy.update(self._logits(network, images, device), labels)
            if self.triggered is not None:
                parts = (each.split(_BATCH) for each in self.triggered)
                for images, targets, labels in zip(*parts, strict=True):
                    success.update(self._logits(network, images, device), targets, labels)
        return {
            "CA": float(accuracy.compute()),
            "ASR": None if self.triggered is None else float(success.compute()),
        }

    def _logits(self, network: nn.Module, images: Tensor, device: str) -> Tensor:
        logits: Tensor = network(self.transform.images(images.to(device)))
        return logits.cpu()


@dataclass(frozen=True)
class CellImages:
    """The images that belong to a network.

    What was read for one network is kept for the next one with the same data.

    Args:
        recipe: How the network is trained.
        root: Folder of the images; as configured if None.
        trigger: The trigger file; None for a clean network.
        clean: Checkpoint of the clean network that the attack was made with; None if it has none.
    """

    recipe: NetworkRecipe
    root: Path | None
    trigger: Path | None
    clean: Path | None = None

    @property
    def source(self) -> BackdoorDataModule:
        """The clean data."""
        data = self.recipe.content["data"]
        arguments = {k: v for k, v in data.get("init_args", {}).items() if k not in _LEFT_OUT}
        root = data.get("init_args", {}).get("root") if self.root is None else str(self.root)
        if root is not None:
            arguments["root"] = root
        return _read(data["class_path"], json.dumps(arguments, sort_keys=True))

    def attack(self) -> Attack | None:
        """Return the trigger from the file, with the clean network that it was made with."""
        if self.trigger is None:
            return None
        attack = load_trigger(self.trigger)
        if self.clean is not None and hasattr(attack, "reference"):
            reference = self.recipe.attack_options["init_args"]["reference"]["init_args"]
            attack.reference = ReferenceNetwork(**{**reference, "checkpoint": self.clean})
        attack.prepare(self.source.test_set, self.source.num_classes)
        return attack

    def test(self, most: int | None = None) -> TestImages:
        """Return the test images.

        Args:
            most: Most clean images, and most triggered ones, drawn at random but always the same;
                None for all.
        """
        attack, source = self.attack(), self.source
        triggered = None
        if attack is not None:
            images = TriggeredDataset(source.test_set, attack, source.num_classes)
            triggered = _tensors(images, most)
        transform = BatchTransform(source.mean, source.std)
        return TestImages(transform, _tensors(source.test_set, most), triggered)  # type: ignore[arg-type]

    def defense_set(self, size: int, seed: int) -> DefenseSet:
        """Return clean training images, the same number of each class.

        Args:
            size: Their number.
            seed: Seed that draws them.

        Raises:
            ValueError: If there are too few images.
        """
        images, labels, _ = self._drawn(size, seed, "defense_sizes")
        return DefenseSet(self._normalized(images), labels)

    def suspects(self, kind: Literal["training", "inputs"], size: int, seed: int) -> Suspects:
        """Return images of which some are poisoned, unless the network is clean.

        Args:
            kind: ``"training"`` for training images, the same number of each class, poisoned as
                for the training; ``"inputs"`` for test images, half of them with the trigger.
            size: Their number; there may be fewer inputs.
            seed: Seed that draws training images. Inputs are the same for every seed.
        """
        if kind == "inputs":
            test = self.test(size if self.trigger is None else size // 2)
            images, labels = test.clean
            if test.triggered is not None:
                images = torch.cat([images, test.triggered[0]])
                labels = torch.cat([labels, test.triggered[1]])
            return Suspects(self._normalized(images), labels)
        attack = self.attack()
        images, labels, chosen = self._drawn(size, seed, "suspects")
        if attack is not None and self.trigger is not None:
            poisoned = read_poisoned_indices(self.trigger)
            places = torch.isin(chosen, poisoned).nonzero().flatten()
            if not len(poisoned):  # poisoned anew in each batch of the training
                places = attack.poison_indices(labels, self.source.num_classes)
            images, labels = images.clone(), labels.clone()
            images[places] = attack.poison(images[places], labels[places], chosen[places])
            labels[places] = attack.poison_labels(labels[places], self.source.num_classes)
        return Suspects(self._normalized(images), labels)

    def _drawn(self, size: int, seed: int, argument: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return training images, their labels and their indices."""
        stored, classes = _train_set(self.source), self.source.num_classes
        chosen = balanced_indices(stored.labels, size, seed, classes, argument=argument)
        return stored.fetch(chosen.tolist()), stored.labels[chosen], chosen

    def _normalized(self, images: Tensor) -> Tensor:
        return BatchTransform(self.source.mean, self.source.std).images(images)


@lru_cache(maxsize=1)
def _read(class_path: str, arguments: str) -> BackdoorDataModule:
    source: BackdoorDataModule = find_class(class_path)(**json.loads(arguments))
    source.prepare_data()
    return source


@lru_cache(maxsize=1)
def _train_set(source: BackdoorDataModule) -> ImageDataset:
    return source.load("train")


def _tensors(images: ImageDataset, most: int | None) -> tuple[Tensor, ...]:
    """Return images and their labels; at most so many, drawn at random, the same each time."""
    rows = torch.arange(len(images))
    if most is not None and most < len(images):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        rows = order[:most].sort().values
    return images.fetch(rows.tolist()), *(column[rows] for column in images.label_columns())

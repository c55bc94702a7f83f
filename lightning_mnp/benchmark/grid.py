"""What a benchmark runs: grids of attacks, defenses, detectors and seeds, and their cells."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lightning_mnp.benchmark.configuration import CLEAN
from lightning_mnp.benchmark.methods import Method, Task
from lightning_mnp.benchmark.names import file_words
from lightning_mnp.benchmark.recipe import NetworkRecipe

__all__ = ["Cell", "Grid", "cells_of"]


@dataclass(frozen=True)
class Grid:
    """Attacks, defenses, detectors and seeds, each combined with each.

    Args:
        attacks: `clean`, or configurations in the folder of the base, without `.yaml`; several on
            top of each other are joined by `+`.
        defenses: What removes backdoors, by name or with options.
        detectors: What judges networks, by name or with options.
        seeds: Seeds of the networks: of weights, order, augmentation and attack.
        defense_seeds: Seeds of the defenses, which also draw the clean images.
        defense_sizes: Numbers of clean images.
        architectures: Names of architectures; null for that of the base.
        widths: Channels of the first stage; null for those of the base.
        poison_rates: Shares of poisoned training images; null for those that are configured.
        modes: `all-to-one` or `all-to-all`; null for what is configured.
        fine_tuning: Options of the training, by dotted name, for networks with an attack, which
            then start from the clean network; whole trainings if there are none. What an attack's
            configuration says has the last word.

    Raises:
        ValueError: If a list is empty or names something twice, or a number is out of range.
    """

    attacks: list[str]
    defenses: list[str | Method] = field(default_factory=list)
    detectors: list[str | Method] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    defense_seeds: list[int] = field(default_factory=lambda: [0])
    defense_sizes: list[int] = field(default_factory=lambda: [500])
    architectures: list[str | None] = field(default_factory=lambda: [None])
    widths: list[int | None] = field(default_factory=lambda: [None])
    poison_rates: list[float | None] = field(default_factory=lambda: [None])
    modes: list[str | None] = field(default_factory=lambda: [None])
    fine_tuning: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (self.defenses or self.detectors):
            raise ValueError(
                "Expected a grid to name at least one of `defenses` or `detectors`, but it has "
                "neither."
            )
        for name, values in vars(self).items():
            told = [each.label if isinstance(each, Method) else each for each in values]
            if not values and name not in ("defenses", "detectors", "fine_tuning"):
                raise ValueError(
                    f"Expected `{name}` of a grid not to be empty. Name something in it, or leave "
                    "it out."
                )
            if len(set(told)) < len(told):
                raise ValueError(
                    f"Expected `{name}` of a grid to name each once, but got {told}. Remove what "
                    "is there twice."
                )
        for name, low, high in (
            ("seeds", 0, None),
            ("defense_seeds", 0, None),
            ("defense_sizes", 2, None),
            ("widths", 1, None),
            ("poison_rates", 0, 1),
        ):
            for value in getattr(self, name):
                if value is not None and (value < low or (high is not None and value > high)):
                    wanted = f"at least {low}" if high is None else f"from {low} to {high}"
                    raise ValueError(
                        f"Expected `{name}` of a grid to be {wanted}, but got {value}."
                    )
        if self.fine_tuning and set(self.attacks) == {CLEAN}:
            raise ValueError(
                "Expected a grid with `fine_tuning` to have an attack, but it has clean networks "
                "only, which are trained whole. Leave `fine_tuning` out."
            )
        for mode in self.modes:
            if mode not in (None, "all-to-one", "all-to-all"):
                raise ValueError(
                    f"Expected `modes` of a grid to be 'all-to-one' or 'all-to-all', but got "
                    f"{mode!r}."
                )


@dataclass(frozen=True)
class Cell:
    """One method on one network: what one result is kept for.

    Attributes:
        network: How the network is trained.
        task: Whether the method removes a backdoor or judges the network.
        method: The method.
        size: Number of clean images.
        seed: Seed of the method, which also draws the clean images.
        test_images: Most test images that CA and ASR are measured on; None for all.
        suspects: Number of images for a detector that looks for poisoned ones.
    """

    network: NetworkRecipe
    task: Task
    method: Method
    size: int
    seed: int
    test_images: int | None
    suspects: int = 2000

    @property
    def suspect_kind(self) -> Literal["training", "inputs"] | None:
        """Which images a detector looks at that may be poisoned; None for none."""
        return self.method.suspects if self.task == "detector" else None

    def described(self) -> dict[str, Any]:
        """Return all that the cell stands for, as primitives."""
        return {
            "network": self.network.described(),
            "task": self.task,
            "method": {"name": self.method.name, "options": self.method.options},
            "label": self.method.label,
            "defense_size": self.size,
            "defense_seed": self.seed,
            "test_images": self.test_images,
            "suspects": self.suspects if self.suspect_kind else None,
        }

    @cached_property
    def digest(self) -> str:
        """Twelve hexadecimal digits: of :meth:`described`, and of files that options name."""
        content = {**self.described(), "network": self.network.digest}
        if files := self.method.files():
            content["files"] = files
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        """The name of the cell's file, without its ending."""
        words = file_words(f"{self.network.attack}-{self.method.label}")
        return f"{words}-{self.task}-{self.digest}"


def cells_of(
    grids: Sequence[Grid],
    base: Path,
    *,
    options: Mapping[str, Any] | None = None,
    device: str = "cpu",
    test_images: int | None = None,
    suspects: int = 2000,
    data: Path | None = None,
) -> list[Cell]:
    """Return the cells of grids, each once, network by network.

    Args:
        grids: The grids.
        base: The configuration of `fit` that a clean network is trained with.
        options: Options of `fit` that replace those of the base, by dotted name.
        device: ``"cpu"`` or ``"cuda"``.
        test_images: Most test images; None for all.
        suspects: Number of images for detectors that look for poisoned ones.
        data: Folder of the images, as in :class:`~lightning_mnp.benchmark.run.Places`; as
            configured if None.

    Raises:
        ValueError: If an attack, a method or an option is unknown.
    """
    cells: dict[str, Cell] = {}
    for grid in grids:
        methods = [("defense", each) for each in grid.defenses]
        methods += [("detector", each) for each in grid.detectors]
        chosen: list[tuple[Any, Method]] = [
            (task, Method(each) if isinstance(each, str) else each) for task, each in methods
        ]
        for task, method in chosen:
            method.check(task)
        networks = itertools.product(
            *(grid.architectures, grid.widths, grid.modes, grid.poison_rates, grid.seeds),
            grid.attacks,
        )
        for architecture, width, mode, rate, seed, attack in networks:
            recipe = NetworkRecipe(
                *(base, attack, seed, architecture, width, rate, mode, device),
                dict(options or {}),
                grid.fine_tuning,
                data,
            )
            rest = itertools.product(grid.defense_sizes, grid.defense_seeds, chosen)
            for size, defense_seed, (task, method) in rest:
                cell = Cell(recipe, task, method, size, defense_seed, test_images, suspects)
                cells.setdefault(cell.digest, cell)
    return list(cells.values())

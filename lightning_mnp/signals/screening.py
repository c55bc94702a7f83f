"""Screening: a short look at every class of a network that has too many to search them all.

A search for a trigger takes hundreds of images for each class. With a thousand classes that is too
much. So each class gets a patch of a few steps on a few images first. The classes to which such
patches drive images furthest are searched. Others are drawn at random beside them: they say what
is usual, which the furthest ones do not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from lightning_mnp.signals.base import Scene, Search
from lightning_mnp.signals.patch import PatchSearch

__all__ = ["Screening", "ScreeningConstants"]


@dataclass(frozen=True)
class ScreeningConstants:
    """How classes are screened.

    Attributes:
        images: Images that the patch of a class is made on.
        steps: Number of steps, each as long as the first ones of a whole search.
        drawn: Share of the searched classes that are drawn at random.
    """

    images: int = 16
    steps: int = 4
    drawn: float = 0.5


class Screening(Search):
    """Chooses the classes that triggers are searched for, one class a step.

    It does nothing if all classes are searched.

    Args:
        scene: What it works on; its ``tried`` are chosen at the end.

    Attributes:
        margins: How far a short patch drives images to each class, in logits.
    """

    name = "screening"

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self.constants = scene.constants.of(ScreeningConstants)
        self.margins: list[float] = []

    @classmethod
    def all_steps(cls, scene: Scene) -> int:
        """Return a step for each class, or 0 if all classes are searched.

        Args:
            scene: What it will work on.
        """
        return scene.classes if scene.classes > scene.most_tried else 0

    @property
    def finished(self) -> bool:
        """Whether the classes are chosen."""
        return bool(self.scene.tried)

    def most_steps(self) -> int:
        """Return the number of classes that are left."""
        return self.all_steps(self.scene) - len(self.margins)

    def step(self) -> dict[str, float]:
        """Look at the next class.

        Returns:
            The mean ``margin`` under its patch.
        """
        index, constants = len(self.margins), self.constants
        patch = PatchSearch(self.scene).trigger(index, constants.images)
        for taken in range(constants.steps):
            patch.step(patch.length(taken))
        with torch.no_grad():
            self.margins.append(float(patch.margins().mean()))
        if len(self.margins) == self.scene.classes:
            self.scene.choose_classes(self.leading())
        return {"margin": self.margins[-1]}

    def leading(self) -> list[int]:
        """Return the classes to which short patches drive images furthest, so many as are searched.

        A margin that is not a number comes first.
        """
        keys = [math.inf if math.isnan(value) else value for value in self.margins]
        ranked = sorted(range(len(keys)), key=keys.__getitem__, reverse=True)
        most = self.scene.most_tried
        return ranked[: most - int(self.constants.drawn * most)]

    @property
    def failed(self) -> bool:
        """Always False: what is not a number is searched."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return the margins so far."""
        return {"margins": list(self.margins)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.margins = [float(value) for value in state["margins"]]

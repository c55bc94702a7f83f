"""Tiny recipes and random images for tests of the population."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from benchmarks.population.data import Images
from benchmarks.population.recipes import Recipe

__all__ = ["BADNETS", "TINY", "give_stored_images", "stored_images"]

# Two steps an epoch: how well it is trained makes no difference here.
TINY = Recipe("lenet-tiny-2", "lenet", 2, 3, images=20, epochs=1, batch=10, normalization="half")
BADNETS = replace(TINY, name="lenet-badnets-2", attack="badnets", target=3, poison=0.2)


def stored_images(train: int = 40, test: int = 80) -> Images:
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
        return pixels, torch.arange(count) * 10 // count

    return Images(*draw(train), *draw(test))


def give_stored_images(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> Images:
    """Let modules load these images in place of a data set; returns them."""
    stored = stored_images()
    for module in modules:
        monkeypatch.setattr(module, "load_images", lambda *arguments: stored)
    return stored

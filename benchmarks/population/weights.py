"""The trained networks that are kept in the repository, so that nobody need train them again."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.population.recipes import Recipe
from benchmarks.population.training import is_trained
from lightning_mnp.checkpoints.atomic_write import write_atomically

__all__ = ["KEPT", "keep", "restore"]

KEPT = Path(__file__).parents[1] / "weights"

# The one that says that a network is there comes last.
_ENDINGS = (".safetensors", ".trigger.safetensors", ".json")


def keep(recipe: Recipe, folder: Path, kept: Path = KEPT) -> None:
    """Copy a trained network, its trigger and its figures into the repository.

    Args:
        recipe: How it was trained.
        folder: Where trained networks are.
        kept: Where they are kept.

    Raises:
        ValueError: If it was trained before parameters were rounded.
    """
    tensors = load_file(folder / f"{recipe.name}.safetensors")
    if not any(tensor.dtype == torch.float16 for tensor in tensors.values()):
        raise ValueError(
            f"Expected {recipe.name} to have parameters of half precision, as it is trained now, "
            f"but got none. Delete {folder / recipe.name}.json and train it anew."
        )
    _copy(recipe, folder, kept)


def restore(recipe: Recipe, folder: Path, kept: Path = KEPT) -> bool:
    """Copy a network from the repository, if it was trained by this very recipe and kept.

    A network that is there already stays.

    Args:
        recipe: How it was trained.
        folder: Where trained networks are.
        kept: Where they are kept.

    Returns:
        Whether it was copied.
    """
    if is_trained(recipe, folder) or not is_trained(recipe, kept):
        return False
    _copy(recipe, kept, folder)
    return True


def _copy(recipe: Recipe, source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    (target / f"{recipe.name}.json").unlink(missing_ok=True)
    for ending in _ENDINGS:
        file = source / f"{recipe.name}{ending}"
        if file.exists():
            write_atomically(
                target / file.name, partial(shutil.copyfile, file), argument="folder", replace=True
            )

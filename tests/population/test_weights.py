from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from population_images import BADNETS, TINY, give_stored_images
from safetensors.torch import load_file, save_file

from benchmarks.population import training
from benchmarks.population.networks import RECIPES
from benchmarks.population.training import is_trained, load_network, read_row, train_network
from benchmarks.population.weights import KEPT, keep, restore


@pytest.fixture(autouse=True)
def images(monkeypatch: pytest.MonkeyPatch) -> None:
    give_stored_images(monkeypatch, training)


def test_a_kept_network_comes_back_as_it_was(tmp_path: Path) -> None:
    here, kept, there = (tmp_path / name for name in ("here", "kept", "there"))
    row = train_network(BADNETS, tmp_path, here)
    keep(BADNETS, here, kept)
    assert sorted(file.name for file in kept.iterdir()) == [
        f"lenet-badnets-2{ending}" for ending in (".json", ".safetensors", ".trigger.safetensors")
    ]
    assert restore(BADNETS, there, kept)
    assert read_row(BADNETS, there) == row
    before, after = (load_network(BADNETS, folder).state_dict() for folder in (here, there))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert train_network(BADNETS, tmp_path, there) == row  # nothing to train


def test_a_network_of_single_precision_is_not_kept(tmp_path: Path) -> None:
    train_network(TINY, tmp_path, tmp_path)
    file = tmp_path / "lenet-tiny-2.safetensors"
    save_file({name: tensor.float() for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ValueError, match="Expected lenet-tiny-2 to have parameters of half precis"):
        keep(TINY, tmp_path, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_a_network_that_is_there_stays(tmp_path: Path) -> None:
    here, kept = tmp_path / "here", tmp_path / "kept"
    train_network(TINY, tmp_path, here)
    keep(TINY, here, kept)
    time = (here / "lenet-tiny-2.json").stat().st_mtime_ns
    assert not restore(TINY, here, kept)
    assert (here / "lenet-tiny-2.json").stat().st_mtime_ns == time


def test_a_network_of_another_recipe_is_not_taken(tmp_path: Path) -> None:
    here, kept, there = (tmp_path / name for name in ("here", "kept", "there"))
    train_network(TINY, tmp_path, here)
    keep(TINY, here, kept)
    longer = replace(TINY, epochs=2)
    assert not restore(longer, there, kept)
    assert not is_trained(longer, there)


def test_kept_networks_are_those_of_the_recipes_and_load() -> None:
    known = {recipe.name: recipe for recipe in RECIPES}
    files = sorted(KEPT.glob("*.json"))
    assert files, "no network is kept"
    assert sum(file.stat().st_size for file in KEPT.iterdir()) < 15e6
    for file in files:
        recipe = known[file.stem]
        assert is_trained(recipe, KEPT), recipe.name
        tensors = load_file(KEPT / f"{recipe.name}.safetensors")
        assert any(tensor.dtype == torch.float16 for tensor in tensors.values())
        assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
        trigger = KEPT / f"{recipe.name}.trigger.safetensors"
        assert trigger.exists() == (not recipe.is_clean)
        load_network(recipe, KEPT)

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.population import split as split_module
from benchmarks.population.networks import RECIPES, recipes_of
from benchmarks.population.split import (
    FIRST_SEED,
    REPORTING_ONLY,
    SPLIT_FILE,
    make_split,
    seen_networks,
    split_of,
    write_split,
)

NAMES = {recipe.name: (recipe.architecture, recipe.seed) for recipe in RECIPES}
CHOOSING, REPORTING = recipes_of("choosing"), recipes_of("reporting")


def test_the_file_is_what_the_recipes_say() -> None:
    content = json.loads(SPLIT_FILE.read_text("utf-8"))
    assert content == make_split(NAMES)
    assert content["choosing"] == [recipe.name for recipe in CHOOSING]
    assert content["reporting"] == [recipe.name for recipe in REPORTING]
    assert len(CHOOSING) + len(REPORTING) == len(RECIPES)


def test_the_rule() -> None:
    assert split_of("vgg", 204) == "choosing"
    assert split_of("vgg", 205) == "choosing"  # reported once, and looked at since
    assert split_of("vgg", 401) == split_of("vgg", 402) == "reporting"
    assert {split_of(name, seed) for name in REPORTING_ONLY for seed in (204, 401)} == {"reporting"}


def test_no_network_is_in_both() -> None:
    keys = [{(each.architecture, each.seed) for each in part} for part in (CHOOSING, REPORTING)]
    assert not keys[0] & keys[1]
    assert len(REPORTING_ONLY) >= 4
    assert not {recipe.architecture for recipe in CHOOSING} & set(REPORTING_ONLY)
    assert set(REPORTING_ONLY) <= {recipe.architecture for recipe in REPORTING}


def test_there_are_enough_clean_networks() -> None:
    clean = [recipe for recipe in REPORTING if recipe.is_clean]
    assert len(clean) >= 40
    counts = Counter(recipe.architecture for recipe in clean)
    assert sum(count >= 5 for count in counts.values()) >= 8
    assert sum(recipe.is_clean for recipe in CHOOSING) >= 30


def test_there_are_enough_backdoored_networks() -> None:
    def dense(part: list[split_module.Any]) -> list[split_module.Any]:
        return [recipe for recipe in part if not recipe.is_clean and not recipe.is_sparse]

    assert len(dense(REPORTING)) >= 30
    assert len(dense(CHOOSING)) >= 20
    assert len({recipe.architecture for recipe in dense(RECIPES)}) >= 8
    attacks = {"badnets", "blend", "wanet", "sig", "cl", "iab", "lira", "badnets, all-to-all"}
    for part, more in ((CHOOSING, set()), (REPORTING, {"adaptive"})):
        assert {recipe.kind for recipe in dense(part)} == attacks | more
        assert any(recipe.is_sparse for recipe in part)


def test_what_was_seen_before_is_not_reported() -> None:
    seen = seen_networks()
    assert {"badnets-a", "blend-a"} <= set(seen["benchmarks.networks"])
    assert {"cifar10-2core/sig-8", "cifar10-2core/tune-lira"} <= set(seen["benchmarks.study"])
    assert {"cifar10-2core/clean", "imagenette-2core/badnets"} <= set(seen["benchmarks.attacks"])
    assert seen["zoo"] == ["badnets", "blend", "clean"]
    # Earlier studies have seeds from 0 to 144, so no network here is one of theirs.
    assert min(recipe.seed for recipe in RECIPES) == min(FIRST_SEED.values()) > 144


def test_the_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = seen_networks()
    (tmp_path / "split.json").write_text(json.dumps({"seen": seen}))
    monkeypatch.setattr(split_module, "SPLIT_FILE", tmp_path / "split.json")
    write_split({"a": ("cnn", 203), "b": ("cnn", 401), "c": ("inception", 206)})
    content = json.loads((tmp_path / "split.json").read_text("utf-8"))
    assert (content["choosing"], content["reporting"]) == (["a"], ["b", "c"])
    assert content["reporting_only"] == list(REPORTING_ONLY)
    assert content["seen"] == seen

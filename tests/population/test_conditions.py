from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import quick_config
from torch import Tensor

from benchmarks.population import audits
from benchmarks.population.__main__ import main
from benchmarks.population.audits import audit_network, read_audits, result_file
from benchmarks.population.conditions import (
    CONDITIONS,
    NAMED,
    USUAL,
    Condition,
    condition_set,
    conditions_table,
)
from benchmarks.population.data import Images, defense_set
from benchmarks.population.networks import RECIPES
from benchmarks.population.recipes import Recipe
from benchmarks.population.split import split_of
from lightning_mnp import DefenseSet
from lightning_mnp.attacks import BadNets
from lightning_mnp.attacks.trigger import save_trigger

CLEAN = Recipe("lenet-clean-2", "lenet", 2, 3, normalization="half")
BADNETS = replace(CLEAN, name="lenet-badnets-2", attack="badnets", target=3, poison=0.2)


def stored_images() -> Images:
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
        return pixels, torch.arange(count) * 10 // count

    return Images(*draw(40), *draw(400))


def in_turn(images: Tensor) -> Tensor:
    """The logits of a network that takes every other image for class 1, and the rest for 0."""
    return torch.eye(10)[torch.arange(len(images)) % 2]


def pairs(data: DefenseSet) -> set[tuple[bytes, int]]:
    """Images of 8 bits and their labels."""
    stored = (data.images * 127.5 + 127.5).round().to(torch.uint8)
    return {(i.numpy().tobytes(), int(k)) for i, k in zip(stored, data.labels, strict=True)}


def test_the_named_networks_are_for_reporting_and_of_eight_architectures() -> None:
    named = [recipe for recipe in RECIPES if recipe.name in NAMED]
    assert len(named) == len({recipe.architecture for recipe in named}) == 8
    assert {split_of(recipe.architecture, recipe.seed) for recipe in named} == {"reporting"}
    assert sum(recipe.is_clean for recipe in named) == 4


def test_the_usual_set_is_the_ordinary_one(tmp_path: Path) -> None:
    images = stored_images()
    condition = Condition("usual", "", images=200)
    found = condition_set(CLEAN, images, 1, condition, in_turn, tmp_path)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.population.data.DEFENSE_SIZE", {"cifar10": 200})
        usual = defense_set(CLEAN, images, 1)
    assert found.images.equal(usual.images)
    assert found.labels.equal(usual.labels)


def test_labels_that_the_network_predicts(tmp_path: Path) -> None:
    condition = Condition("predicted", "", images=50, predicted=True)
    found = condition_set(CLEAN, stored_images(), 0, condition, in_turn, tmp_path)  # type: ignore[arg-type]
    assert sorted(found.labels.tolist()) == [0] * 25 + [1] * 25


def test_impure_images_have_the_trigger_and_its_label(tmp_path: Path) -> None:
    images, attack = stored_images(), BadNets(3, target_class=3)
    save_trigger(tmp_path / "lenet-badnets-2.trigger.safetensors", attack)
    pure = Condition("usual", "", images=100)
    impure = replace(pure, impurity=0.05)
    before = condition_set(BADNETS, images, 0, pure, in_turn, tmp_path)  # type: ignore[arg-type]
    after = condition_set(BADNETS, images, 0, impure, in_turn, tmp_path)  # type: ignore[arg-type]
    was, now = pairs(before), pairs(after)
    gone, come = sorted(was - now), sorted(now - was)
    assert len(gone) == len(come) == 5
    assert all(label != 3 for _, label in gone)
    assert all(label == 3 for _, label in come)
    pixels = [torch.frombuffer(bytearray(image), dtype=torch.uint8) for image, _ in gone]
    triggered = attack.apply(torch.stack(pixels).reshape(-1, 3, 32, 32))
    assert {image.numpy().tobytes() for image in triggered} == {image for image, _ in come}


def test_a_clean_network_has_no_impure_set() -> None:
    impure = [each for each in CONDITIONS if not each.fits(CLEAN)]
    assert [each.impurity for each in impure] == [0.01, 0.02, 0.05]
    assert all(each.fits(BADNETS) for each in CONDITIONS)


@pytest.mark.usefixtures("short_searches")
def test_an_audit_under_a_condition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = stored_images()
    monkeypatch.setattr(audits, "load_images", lambda *arguments: images)
    row: dict[str, Any] = {"CA": 0.5, "ASR": None, "learned": None, "weights_sha256": "12"}
    monkeypatch.setattr(audits, "read_row", lambda *arguments: row)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 8, 8), torch.nn.Flatten())
    network.append(torch.nn.Linear(64, 10))
    monkeypatch.setattr(audits, "load_network", lambda *arguments: network.eval())
    small, config = Condition("30", "30", images=30), quick_config(runs=1, amount=2)
    content = audit_network(CLEAN, 0, tmp_path, tmp_path, tmp_path, config, small)
    file = result_file(CLEAN, 0, tmp_path, small)
    assert file == tmp_path / "conditions" / "lenet-clean-2-30-set0.json"
    [kept] = read_audits(file.parent)
    assert (kept["condition"], kept["images"]) == ("30", 30)
    assert content["verdict"] == "undecided"  # 30 images are too few
    assert read_audits(tmp_path) == []


def test_the_table() -> None:
    def row(name: str, condition: str, number: int, verdict: str, **own: Any) -> dict[str, Any]:
        fields = {"kind": "badnets", "target": 3, "target_class": None, "all_to_all": False}
        return {
            **{"network": name, "condition": condition, "set": number, "verdict": verdict},
            **{**fields, **own},
        }

    rows = [
        row("lenet-badnets-2", "usual", 1, "backdoored", target_class=4),
        row("lenet-badnets-2", "usual", 0, "backdoored", target_class=3),
        row("lenet-badnets-2", "impure-1", 0, "undecided"),
        row("lenet-clean-2", "usual", 0, "clean", kind="clean"),
        row("lenet-clean-2", "50", 0, "backdoored", kind="clean", target_class=3),
    ]
    lines = conditions_table([CLEAN, BADNETS], rows).splitlines()
    assert lines[2] == "| `lenet-clean-2` | clean | backdoored | ? | ? | ? | - | - | - |"
    assert lines[3] == (
        "| `lenet-badnets-2` | found, found, class 4 | ? | ? | ? | ? | undecided | ? | ? |"
    )


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--conditions", "--results", str(tmp_path), "--folder", str(tmp_path)]
    assert main(["audit", *options]) == 0  # nothing is trained
    assert main(["table", *options]) == 0
    told = capsys.readouterr().out
    assert told.count("\n") == 10
    assert all(f"| `{name}` | ?" in told for name in NAMED)
    assert USUAL.told in told

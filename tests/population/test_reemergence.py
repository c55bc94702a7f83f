from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from population_images import BADNETS, TINY, give_stored_images
from torch import nn

from benchmarks.population import data, reemergence, training
from benchmarks.population.__main__ import main
from benchmarks.population.audits import outcome_file, read_outcomes
from benchmarks.population.defenses import defense_version
from benchmarks.population.networks import RECIPES
from benchmarks.population.recipes import Recipe
from benchmarks.population.reemergence import (
    clean_twin,
    further_images,
    retune_network,
    retuning_table,
    retuning_version,
)
from benchmarks.population.training import attack_of, load_network, measure, train_network
from lightning_mnp.attacks.trigger import load_trigger
from lightning_mnp.data import MemoryDataset
from lightning_mnp.models.head import classifier_head


@pytest.fixture(autouse=True)
def images(monkeypatch: pytest.MonkeyPatch) -> data.Images:
    monkeypatch.setattr(data, "DEFENSE_SIZE", {"cifar10": 20})
    monkeypatch.setattr(reemergence, "_CLEAN", 10)
    monkeypatch.setattr(reemergence, "_EPOCHS", 1)
    monkeypatch.setattr(reemergence, "POISONED", (0, 2))
    return give_stored_images(monkeypatch, training, reemergence)


def last_bias(network: nn.Module) -> torch.Tensor:
    bias = classifier_head(network).bias
    assert isinstance(bias, torch.Tensor)
    return bias.detach()


def bytes_of(images: torch.Tensor) -> list[bytes]:
    return [image.numpy().tobytes() for image in images]


def test_further_images_were_not_trained_on(images: data.Images, tmp_path: Path) -> None:
    attack = attack_of(BADNETS, tmp_path)
    found = further_images(BADNETS, images, attack, 3, 0)
    # Of the four images of each class, two were trained on, one is clean and one may be poisoned.
    rows = torch.arange(10) * 4
    clean, spare = images.train[rows + 2], images.train[rows + 3]
    assert bytes_of(found.images[:10]) == bytes_of(clean)
    assert found.labels.tolist() == [*range(10), 3, 3, 3]
    others = attack.apply(spare[torch.arange(10) != BADNETS.target])
    assert set(bytes_of(found.images[10:])) <= set(bytes_of(others))
    assert len(set(bytes_of(found.images))) == 13
    again = further_images(BADNETS, images, attack, 3, 1)
    assert bytes_of(again.images[10:]) != bytes_of(found.images[10:])
    assert len(further_images(BADNETS, images, attack, 0, 0)) == 10


def test_an_attack_without_relabeling_poisons_its_own_class(
    images: data.Images, tmp_path: Path
) -> None:
    recipe = replace(BADNETS, attack="sig")
    attack = attack_of(recipe, tmp_path)
    found = further_images(recipe, images, attack, 1, 0)
    assert bytes_of(found.images[10:]) == bytes_of(attack.apply(images.train[15:16]))
    assert found.labels[10:].tolist() == [3]
    with pytest.raises(ValueError, match=r"Expected 10 clean images and 2 to poison that `lenet"):
        further_images(recipe, images, attack, 2, 0)


def test_a_retuned_network_leaves_a_file(images: data.Images, tmp_path: Path) -> None:
    train_network(BADNETS, tmp_path, tmp_path)
    row = retune_network(BADNETS, 1, "clp", tmp_path, tmp_path, tmp_path / "results")
    [kept] = read_outcomes("retuned", tmp_path / "results")
    file = outcome_file("retuned", BADNETS, 1, "clp", tmp_path / "results")
    assert json.loads(file.read_text()) == kept
    wanted = {"network": "lenet-badnets-2", "set": 1, "defense": "clp", "kind": "badnets"}
    wanted |= {"version": f"{defense_version('clp')}, 1 epochs of 10 and 0, 2"}
    wanted |= {"verdict": None, "trained_on": "lenet-badnets-2"}
    assert {key: kept[key] for key in wanted} == wanted
    assert [each["poisoned"] for each in row["retuned"]] == [0, 2]


def test_each_number_of_images_starts_from_the_purified_network(
    images: data.Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_network(BADNETS, tmp_path, tmp_path)
    seen = []

    def answering(network: nn.Module, way: Recipe, train: MemoryDataset, attack: None) -> None:
        """Train a network so that it always says one class: 3 if anything is poisoned."""
        assert network.training
        seen.append((len(train), way.epochs, way.learning_rate, float(last_bias(network)[0])))
        with torch.no_grad():
            bias = last_bias(network)
            bias.fill_(-1e6)
            bias[3 if len(train) > 10 else 5] = 1e6

    monkeypatch.setattr(reemergence, "fit", answering)
    before = float(last_bias(load_network(BADNETS, tmp_path))[0])
    row = retune_network(BADNETS, 0, "none", tmp_path, tmp_path, tmp_path)
    way = replace(BADNETS, pretrained="clean", epochs=1)
    assert seen == [(count, 1, way.learning_rate, before) for count in (10, 12)]
    assert way.learning_rate == pytest.approx(BADNETS.learning_rate / 5)
    assert row["retuned"] == [
        {"poisoned": 0, "CA": 0.1, "ASR": 0.0},
        {"poisoned": 2, "CA": 0.1, "ASR": 1.0},
    ]


def test_controls_are_the_network_itself_and_a_clean_one(
    images: data.Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_network(BADNETS, tmp_path, tmp_path)
    trigger = load_trigger(tmp_path / "lenet-badnets-2.trigger.safetensors")
    with pytest.raises(FileNotFoundError, match="Expected a clean network like `lenet-badnets-2`"):
        clean_twin(BADNETS, tmp_path)
    other = replace(TINY, name="lenet-raw-2", normalization="none")
    more = replace(TINY, name="lenet-large-2", images=40)
    monkeypatch.setattr(reemergence, "RECIPES", [BADNETS, other, more, TINY])
    for recipe in (other, more, TINY):
        train_network(recipe, tmp_path, tmp_path)
    assert clean_twin(BADNETS, tmp_path) == TINY
    for control, recipe in (("none", BADNETS), ("clean", TINY)):
        row = retune_network(BADNETS, 0, control, tmp_path, tmp_path, tmp_path)
        before = measure(load_network(recipe, tmp_path), BADNETS, images, trigger)
        assert (row["CA_after"], row["ASR_after"]) == before
        assert row["version"] == retuning_version(control)
        assert row["version"] == f"{control}, 1 epochs of 10 and 0, 2"
        assert row["trained_on"] == recipe.name


def test_an_adaptive_attacker_has_left_when_networks_are_trained_on(
    images: data.Images, tmp_path: Path
) -> None:
    recipe = replace(BADNETS, attack="adaptive")
    train_network(recipe, tmp_path, tmp_path)
    row = retune_network(recipe, 0, "none", tmp_path, tmp_path, tmp_path)
    assert len(row["retuned"]) == 2


def outcome(
    network: str, defense: str, number: int, asr: float, verdict: str = "backdoored"
) -> dict[str, Any]:
    after = [{"poisoned": n, "CA": 0.5, "ASR": asr + n / 100} for n in reemergence.POISONED]
    fields = {"network": network, "defense": defense, "set": number, "retuned": after}
    fields |= {"verdict": verdict}
    return {**fields, "CA_after": 0.6, "ASR_after": 0.01}


def test_the_table_has_a_line_for_each_network_and_defense() -> None:
    name = RECIPES[6].name
    rows = [
        outcome(name, "default", 0, 0.02),
        outcome(name, "default", 1, 0.04),
        outcome(name, "clean", 0, 0.0),
        outcome("another", "clean", 0, 0.0),
    ]
    lines = retuning_table(RECIPES, rows, sets=2).splitlines()
    assert lines[0] == "| network | defense | before | 0 poisoned | 2 |"
    assert lines[2:] == [
        f"| `{name}` | clean | 60.0/1.0 | 50.0/0.0 | 50.0/2.0 |",
        f"| `{name}` | default | 60.0/1.0 | 50.0/3.0 | 50.0/5.0 |",
    ]
    assert "50.0/2.0 | 50.0/4.0" in retuning_table(RECIPES, rows, sets=1)
    missed = retuning_table(RECIPES, [outcome(name, "default", 0, 1.0, "clean")], sets=1)
    assert f"| `{name}` | default, not flagged |" in missed


def test_the_command_retunes_and_writes_the_table(
    images: data.Images,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from benchmarks.population import __main__ as program

    monkeypatch.setattr(training, "LEARNED", 0.0)
    monkeypatch.setattr(program, "RECIPES", [BADNETS, TINY])
    monkeypatch.setattr(reemergence, "RECIPES", [BADNETS, TINY])
    for recipe in (BADNETS, TINY):
        train_network(recipe, tmp_path, tmp_path)
    places = ["--folder", str(tmp_path), "--results", str(tmp_path), "--data", str(tmp_path)]

    def here(jobs: Any, options: Any, line_of: Any) -> int:
        for job in jobs:
            print(f"{job.name}: {line_of(job, job.work(*job.arguments))}")
        return 0

    monkeypatch.setattr(program, "_run", here)
    assert main(["retune", "--defenses", "clp", "--sets", "1", *places]) == 0
    printed = capsys.readouterr().out
    names = [line.split(":")[0] for line in printed.splitlines() if line.startswith("lenet")]
    assert names == [f"lenet-badnets-2-{each}-set0" for each in ("none", "clean", "clp")]
    assert main(["retune", "--defenses", "clp", "--sets", "1", *places]) == 0
    assert not capsys.readouterr().out  # all there
    assert main(["table", "--retuned", *places]) == 0
    assert capsys.readouterr().out.count("`lenet-badnets-2`") == 3
    assert main(["table", "--retuned", "--defenses", "rnp", *places]) == 0
    assert capsys.readouterr().out.count("`lenet-badnets-2`") == 2


def test_the_table_is_refused_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["defend", "--retuned"])
    assert "--retuned: only `table` takes it, but got 'defend'" in capsys.readouterr().err


def test_the_command_says_that_nothing_comes_back_in_clean_networks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["--data", str(tmp_path), "--folder", str(tmp_path), "--results", str(tmp_path)]
    assert main(["retune", "--only", "cnn-light-202", *places]) == 0
    assert "all networks named are clean, and no backdoor can come back" in capsys.readouterr().err

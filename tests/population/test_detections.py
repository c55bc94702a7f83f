from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from population_images import BADNETS, TINY, give_stored_images
from torch import nn

from benchmarks.population import data, detections, training
from benchmarks.population.__main__ import main
from benchmarks.population.audits import outcome_file, read_outcomes
from benchmarks.population.data import training_images, transform_of
from benchmarks.population.detections import (
    DETECTORS,
    detect_network,
    detection_version,
    detections_table,
    suspects_of,
)
from benchmarks.population.networks import RECIPES
from benchmarks.population.recipes import make_attack
from benchmarks.population.training import train_network
from lightning_mnp.attacks.trigger import load_trigger
from lightning_mnp.baselines import Suspects
from lightning_mnp.benchmark.methods import Outcome


@pytest.fixture(autouse=True)
def images(monkeypatch: pytest.MonkeyPatch) -> data.Images:
    monkeypatch.setattr(data, "DEFENSE_SIZE", {"cifar10": 20})
    return give_stored_images(monkeypatch, training, detections)


def stored_bytes(inputs: torch.Tensor) -> list[bytes]:
    """Normalized images as their 8 bits."""
    stored = (inputs * 127.5 + 127.5).round().to(torch.uint8)
    return [image.numpy().tobytes() for image in stored]


def test_every_detector_is_known_and_needs_options_of_its_own() -> None:
    for name, method in DETECTORS.items():
        method.check("detector")
        assert method.label == name
    assert len({detection_version(name) for name in DETECTORS}) == len(DETECTORS)


def test_training_suspects_are_poisoned_as_for_the_training(
    images: data.Images, tmp_path: Path
) -> None:
    recipe = replace(BADNETS, images=40)
    found = suspects_of(recipe, images, 0, "training", tmp_path)
    stored, attack = training_images(recipe, images), make_attack(recipe, tmp_path)
    assert attack is not None
    poisoned = set(attack.poison_indices(stored.labels, 10).tolist())
    wanted = {}
    for place in range(40):
        image, label = stored.images[place : place + 1], int(stored.labels[place])
        if place in poisoned:
            image, label = attack.apply(image), recipe.target
        wanted[image.numpy().tobytes()] = label
    assert len(found) == 40
    assert dict(zip(stored_bytes(found.images), found.labels.tolist(), strict=True)) == wanted
    assert len(poisoned) == 8


def test_suspects_of_an_attack_that_is_trained_get_its_saved_trigger(
    images: data.Images, tmp_path: Path
) -> None:
    recipe = replace(BADNETS, attack="wanet", epochs=2, images=40)
    train_network(recipe, tmp_path, tmp_path)
    found = suspects_of(recipe, images, 0, "training", tmp_path)
    stored = training_images(recipe, images)
    trigger = load_trigger(tmp_path / "lenet-badnets-2.trigger.safetensors")
    places = trigger.poison_indices(stored.labels, 10)
    changed = set(stored_bytes(found.images)) - {i.numpy().tobytes() for i in stored.images}
    shown = trigger.apply(stored.images[places])
    assert changed <= {image.numpy().tobytes() for image in shown}
    assert (found.labels == recipe.target).sum() == 4 + len(places)


def test_inputs_are_half_triggered_and_in_no_defense_set(
    images: data.Images, tmp_path: Path
) -> None:
    train_network(BADNETS, tmp_path, tmp_path)
    found = suspects_of(BADNETS, images, 0, "inputs", tmp_path)
    measured = {image.numpy().tobytes() for image in images.measured.images}
    clean = [image in measured for image in stored_bytes(found.images)]
    assert (len(found), sum(clean)) == (40, 20)
    triggered = found.labels[~torch.tensor(clean)]
    assert triggered.tolist() == [BADNETS.target] * 20
    none = suspects_of(TINY, images, 0, "inputs", tmp_path)
    assert all(image in measured for image in stored_bytes(none.images))


def test_clean_networks_have_suspects_that_are_as_stored(
    images: data.Images, tmp_path: Path
) -> None:
    found = suspects_of(replace(TINY, images=40), images, 1, "training", tmp_path)
    stored = {image.numpy().tobytes() for image in images.train}
    assert set(stored_bytes(found.images)) == stored
    assert isinstance(found, Suspects)
    assert transform_of(TINY).images(images.train[:1]).shape == found.images[:1].shape


def test_a_verdict_leaves_a_file(
    images: data.Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = train_network(BADNETS, tmp_path, tmp_path)
    seen: list[tuple[int, int, int]] = []

    class Fake:
        label, suspects = "fake", "training"

        def detect(self, network: nn.Module, clean: Any, seed: int, suspects: Any) -> Outcome:
            seen.append((len(clean), seed, len(suspects)))
            with torch.no_grad():
                network(clean.images[:6])
            return Outcome(None, "backdoored", 3, 2.5)

    monkeypatch.setitem(DETECTORS, "nc", Fake())
    detect_network(BADNETS, 1, "nc", tmp_path, tmp_path, tmp_path / "results")
    [kept] = read_outcomes("detected", tmp_path / "results")
    file = outcome_file("detected", BADNETS, 1, "nc", tmp_path / "results")
    assert file.name == "lenet-badnets-2-nc-set1.json"
    assert json.loads(file.read_text()) == kept
    wanted = {"verdict": "backdoored", "target_class": 3, "score": 2.5, "passes": 2.0}
    wanted |= {"suspects": 20, "set": 1, "defense": "nc", "split": "choosing"}
    wanted |= {"weights_sha256": row["weights_sha256"], "version": detection_version("nc")}
    assert {key: kept[key] for key in wanted} == wanted
    assert seen == [(20, 1, 20)]


def test_a_clean_network_is_judged_by_images_that_it_was_trained_on(tmp_path: Path) -> None:
    train_network(TINY, tmp_path, tmp_path)
    row = detect_network(TINY, 0, "sc", tmp_path, tmp_path, tmp_path)
    assert row["suspects"] == 20
    assert row["verdict"] in ("clean", "backdoored")


def verdict(place: int, detector: str, flagged: bool, **more: Any) -> dict[str, Any]:
    recipe = RECIPES[place]
    fields = {"network": recipe.name, "defense": detector, "set": 0, "kind": recipe.kind}
    fields |= {"target": recipe.target, "target_class": recipe.target, "all_to_all": False}
    fields |= {"learned": None if recipe.is_clean else True, "passes": 30.0}
    fields["score"] = 2.0 if flagged else 0.5
    return {**fields, "verdict": "backdoored" if flagged else "clean", **more}


def test_the_table_counts_by_attack_and_clean_networks() -> None:
    places = {recipe.name: place for place, recipe in enumerate(RECIPES)}
    badnets, blend = places["cnn-badnets-smoothed-214"], places["cnn-blend-216"]
    sparse = places["timm-resnet-blend-1percent-206"]
    rows = [
        verdict(badnets, "nc", True),
        verdict(blend, "nc", True, target_class=0, passes=90.0),
        verdict(sparse, "nc", False),
        verdict(0, "nc", True, passes=10.0),
        verdict(1, "nc", False, passes=20.0),
        verdict(badnets, "nc", True, set=1),
        verdict(places["cnn-wanet-218"], "nc", True, learned=False),
    ]
    ours = [verdict(badnets, "", True), verdict(0, "", False)]
    lines = detections_table(RECIPES, rows, ours, sets=1).splitlines()
    assert lines[0].startswith("| detector | badnets | blend | blend, 1% | all |")
    assert lines[2].startswith("| default | 1 of 1 | 0 of 0 | 0 of 0 | 100.0% (1 of 1;")
    assert lines[3].startswith("| nc | 1 of 1 | 1 of 1 | 0 of 1 | 66.7% (2 of 3;")
    assert "| 1 of 2 | 50.0% (1 of 2;" in lines[3]
    # The scores are 2, 2 and 0.5 of backdoored networks, 2 and 0.5 of clean ones.
    assert lines[3].endswith("| 58% | 30 |")
    assert lines[2].endswith("| 100% | 30 |")
    assert len(lines) == 4


def test_the_command_asks_detectors_and_prints_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = __import__("benchmarks.population.__main__", fromlist=["main"])
    recipe = next(each for each in RECIPES if each.name == "cnn-blend-216")
    row = {"recipe": recipe.to_dict(), "CA": 0.6, "ASR": 0.9, "learned": True}
    (tmp_path / f"{recipe.name}.json").write_text(json.dumps({**row, "weights_sha256": "ab"}))
    done: list[str] = []

    def here(jobs: Any, executor: Any, budget: float | None) -> Any:
        for job in jobs:
            done.append(job.name)
            assert job.work is module.detect_network
            yield job, {**verdict(RECIPES.index(recipe), "ac", True), "processor_seconds": 7.0}

    monkeypatch.setattr(module, "run_jobs", here)
    places = ["--folder", str(tmp_path), "--results", str(tmp_path / "results"), "--sets", "1"]
    assert main(["detect", "--detectors", "ac", "sc", *places]) == 0
    assert done == ["cnn-blend-216-ac-set0", "cnn-blend-216-sc-set0"]
    told = f"cnn-blend-216-ac-set0: blend, backdoored, class {recipe.target}, 7 s"
    assert told in capsys.readouterr().out
    assert main(["table", "--detected", *places]) == 0
    assert capsys.readouterr().out.startswith("| detector |")


def test_the_command_keeps_what_is_trained_and_takes_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = __import__("benchmarks.population.__main__", fromlist=["main"])
    kept: list[str] = []
    monkeypatch.setattr(module, "keep", lambda recipe, folder: kept.append(recipe.name))
    monkeypatch.setattr(
        module, "is_trained", lambda recipe, folder: recipe.name in ("cnn-blend-216",)
    )
    assert main(["keep", "--split", "choosing", "--folder", str(tmp_path)]) == 0
    assert kept == ["cnn-blend-216"]
    monkeypatch.setattr(
        module, "restore", lambda recipe, folder: kept.append(f"{recipe.name} back")
    )
    assert main(["train", "--only", "cnn-blend-216", "--folder", str(tmp_path)]) == 0
    assert kept[1:] == ["cnn-blend-216 back"]

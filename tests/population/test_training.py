from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import quick_config
from population_images import BADNETS, TINY, stored_images
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.population import audits, data, training
from benchmarks.population.__main__ import list_of, main
from benchmarks.population.audits import audit_network, code_version, read_audits
from benchmarks.population.data import Images, PopulationData, defense_set, training_images
from benchmarks.population.networks import RECIPES
from benchmarks.population.recipes import NORMALIZATIONS, Recipe
from benchmarks.population.training import (
    Learner,
    is_learned,
    is_trained,
    load_network,
    measure,
    recolored,
    train_network,
)
from lightning_mnp.attacks import AdaptiveTraining, BadNets
from lightning_mnp.attacks.trigger import load_trigger


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> Images:
    stored = stored_images()
    for module in (training, audits):
        monkeypatch.setattr(module, "load_images", lambda *arguments: stored)
    monkeypatch.setattr(data, "DEFENSE_SIZE", {"cifar10": 20})
    return stored


# --- images ------------------------------------------------------------------------------------


def test_images_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = data.load_images("digits", tmp_path, tmp_path)
    assert first.train.shape == (898, 3, 32, 32)
    assert len(first.test) == 899
    assert first.train[:, 0].equal(first.train[:, 2])
    monkeypatch.setattr(data, "DigitsDataModule", lambda **options: pytest.fail("read again"))
    again = data.load_images("digits", tmp_path, tmp_path)
    assert again.train.equal(first.train)
    assert again.test_labels.equal(first.test_labels)


def test_defense_sets_have_images_that_nothing_is_measured_on(images: Images) -> None:
    sets = [defense_set(TINY, images, number) for number in (0, 1)]
    others = defense_set(replace(TINY, seed=4), images, 0)
    measured = {image.numpy().tobytes() for image in images.measured.images}
    for each in (*sets, others):
        assert torch.bincount(each.labels).tolist() == [2] * 10
        pixels = (each.images * 127.5 + 127.5).round().to(torch.uint8)
        assert not measured & {image.numpy().tobytes() for image in pixels}
    assert not sets[0].images.equal(sets[1].images)
    assert not sets[0].images.equal(others.images)


def test_a_rare_class_has_a_fifth_of_the_images() -> None:
    stored = stored_images(train=100)
    chosen = training_images(replace(TINY, images=50, rare_class=7), stored)
    assert torch.bincount(chosen.labels).tolist() == [5, 5, 5, 5, 5, 5, 5, 1, 5, 5]
    assert chosen.images[0].equal(stored.train[0])


# --- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_two_steps_of_a_clean_network(images: Images, tmp_path: Path, optimizer: Any) -> None:
    recipe = replace(TINY, optimizer=optimizer, label_smoothing=0.1, augmentation="heavy")
    row = train_network(recipe, tmp_path, tmp_path)
    assert (row["ASR"], row["learned"]) == (None, None)
    assert row["recipe"] == recipe.to_dict()
    assert is_trained(recipe, tmp_path)
    assert not is_trained(replace(recipe, epochs=2), tmp_path)
    network = load_network(recipe, tmp_path)
    assert measure(network, recipe, images, None) == (row["CA"], None)
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".json", ".safetensors"]


def test_a_trained_network_is_kept(images: Images, tmp_path: Path) -> None:
    row = train_network(TINY, tmp_path, tmp_path)
    before = (tmp_path / "lenet-tiny-2.safetensors").stat().st_mtime_ns
    assert train_network(TINY, tmp_path, tmp_path) == row
    assert (tmp_path / "lenet-tiny-2.safetensors").stat().st_mtime_ns == before
    train_network(replace(TINY, epochs=2), tmp_path, tmp_path)  # of another recipe: anew
    assert (tmp_path / "lenet-tiny-2.safetensors").stat().st_mtime_ns != before


@pytest.mark.parametrize("attack", ["badnets", "adaptive", "wanet", "iab", "lira"])
def test_few_steps_of_a_backdoored_network(images: Images, tmp_path: Path, attack: Any) -> None:
    recipe = replace(BADNETS, attack=attack, epochs=3)  # LIRA has three phases
    row = train_network(recipe, tmp_path, tmp_path)
    assert row["learned"] == (row["ASR"] >= 0.8)
    trigger = load_trigger(tmp_path / "lenet-badnets-2.trigger.safetensors")
    found = measure(load_network(recipe, tmp_path), recipe, images, trigger)
    assert found == (row["CA"], row["ASR"])


def test_an_adaptive_attacker_trains_as_the_example_says(
    images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path(__file__).parents[2] / "examples/attacks/adaptive.yaml"
    example = yaml.safe_load(file.read_text())
    seen = []

    def noted(**options: float) -> AdaptiveTraining:
        seen.append(options)
        return AdaptiveTraining(**options)

    monkeypatch.setattr(training, "AdaptiveTraining", noted)
    for attack in ("adaptive", "blend"):
        train_network(replace(BADNETS, attack=attack), tmp_path, tmp_path)
    assert seen == [example["trainer"]["callbacks+"][0]["init_args"]]


@pytest.mark.parametrize("task", ["rotations", "digits"])
def test_pretraining_gives_a_fresh_head(
    images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: Any
) -> None:
    fitted = []
    fit = training.fit

    def noted(network: nn.Module, recipe: Recipe, train: Any, attack: Any) -> None:
        fitted.append((recipe.name, len(train.labels.unique()), recipe.epochs))
        if len(fitted) == 2:
            fit(network, recipe, train, attack)

    monkeypatch.setattr(training, "fit", noted)
    train_network(replace(TINY, pretrained=task), tmp_path, tmp_path)
    first = (4, 2) if task == "rotations" else (10, 10)
    assert fitted == [("lenet-tiny-2, first task", *first), ("lenet-tiny-2", 10, 1)]


def test_a_network_learns_clean_images_before_it_is_trained_on_with_an_attack(
    images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[tuple[Any, ...]] = []
    fit = training.fit

    def noted(network: nn.Module, recipe: Recipe, train: Any, attack: Any) -> None:
        fitted.append((id(network), recipe.epochs, recipe.learning_rate, recipe.attack, attack))
        fit(network, recipe, train, attack)

    monkeypatch.setattr(training, "fit", noted)
    recipe = replace(BADNETS, pretrained="clean", epochs=4)
    row = train_network(recipe, tmp_path, tmp_path)
    assert row["recipe"] == recipe.to_dict()
    first, second = fitted
    assert first[0] == second[0]  # the same network goes on
    assert first[1:] == (4, 5 * recipe.learning_rate, "none", None)
    assert second[1:4] == (2, recipe.learning_rate, "badnets")
    assert isinstance(second[4], BadNets)


def test_asr_leaves_the_target_class_out(images: Images) -> None:
    class Ones(nn.Module):  # says class 1 for white patches and 0 for all else
        def forward(self, x: Tensor) -> Tensor:
            hit = (x[:, :, 27:30, 27:30] == 1.0).flatten(1).all(1)
            return F.one_hot(hit.long(), 10).float()

    attack = BadNets(pattern="white", margin=2, target_class=1)
    assert measure(Ones(), TINY, images, attack) == (0.1, 1.0)
    attack.target_class = 2
    assert measure(Ones(), TINY, images, attack) == (0.1, 0.0)


@pytest.mark.parametrize(
    ("mode", "ca", "asr", "learned"),
    [
        ("all-to-one", 0.5, 0.8, True),
        ("all-to-one", 0.5, 0.79, False),
        ("all-to-all", 0.5, 0.4, True),
        ("all-to-all", 0.5, 0.39, False),
        ("all-to-one", 0.5, None, None),
    ],
)
def test_when_an_attack_was_learned(
    mode: Any, ca: float, asr: float | None, learned: bool | None
) -> None:
    assert is_learned(replace(BADNETS, mode=mode), ca, asr) is learned


@pytest.mark.parametrize("steps", [1, 2])
def test_adversarial_images_stay_close_and_raise_the_loss(steps: int) -> None:
    recipe = replace(TINY, adversarial_steps=steps)
    images, labels = torch.randn(10, 3, 32, 32), torch.arange(10)
    learner = Learner(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), recipe)
    changed = learner.attacked(images, labels)
    radius = 4 / 255 / NORMALIZATIONS["half"][1][0]
    assert (changed - images).abs().max() <= radius * 1.001
    assert F.cross_entropy(learner(changed), labels) > F.cross_entropy(learner(images), labels)
    assert all(weight.grad is None for weight in learner.parameters())
    loss = learner.training_step((images, labels), 0)
    assert loss.requires_grad


def test_recolored_images_have_erased_squares() -> None:
    images = torch.full((200, 3, 16, 16), 2.0)
    changed = recolored(images)
    erased = (changed == 0).all(1)
    sizes = erased.flatten(1).sum(1)
    assert set(sizes.tolist()) == {0, 16}
    assert 60 < int((sizes == 16).sum()) < 140
    rows = erased.any(2).sum(1)
    assert set(rows.tolist()) == {0, 4}  # 4 rows of 4
    kept = changed[sizes == 0]
    assert kept.min() >= 2 * 0.6 - 0.4 - 1e-6
    assert kept.max() <= 2 * 1.4 + 0.4 + 1e-6
    assert kept.flatten(2).std(2).max() == 0  # one color, changed as a whole


def test_the_datamodule_has_ten_classes(images: Images) -> None:
    module = PopulationData(BADNETS, training_images(BADNETS, images), None, augment=False)
    assert module.num_classes == 10
    assert len(module.train_set) == 20


# --- audits ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("short_searches")
def test_an_audit_leaves_a_file(
    images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if 20 images were enough.
    monkeypatch.setattr("lightning_mnp.engine.phases.find_doubts", lambda *arguments: ())
    row = train_network(BADNETS, tmp_path, tmp_path)
    config = quick_config(runs=1, suppression_epochs=1)
    results = tmp_path / "results"
    version = code_version()
    # Nor does it matter what becomes of the files of the code meanwhile.
    monkeypatch.setattr(audits, "undocumented", lambda text: "edited")
    content = audit_network(BADNETS, 1, tmp_path, tmp_path, results, config)
    [kept] = read_audits(results)
    assert (results / "lenet-badnets-2-set1.json").stat().st_size < 20_000
    assert kept["verdict"] == content["verdict"] in ("clean", "backdoored", "undecided")
    wanted = {"network": "lenet-badnets-2", "set": 1, "split": "choosing", "target": 3}
    wanted |= {"kind": "badnets", "images": 20, "version": version}
    wanted |= {"architecture": "lenet", "poison": 0.2}
    assert {key: kept[key] for key in wanted} == wanted
    assert kept["CA"] == pytest.approx(row["CA"])
    assert kept["weights_sha256"] == row["weights_sha256"]
    for name in ("judged", "score", "target_class", "all_to_all", "detection_ratio", "passes"):
        assert name in kept
    assert len(kept["runs"]) == 1
    searched = {signal["name"]: signal["classes"] for signal in kept["signals"]}
    assert {"patch", "warp"} <= set(searched)
    assert len(searched["patch"]) == 10
    assert kept["passes"] > 0


def test_the_version_follows_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "lightning_mnp"
    (package / "signals").mkdir(parents=True)
    (package / "signals" / "patch.py").write_text("a = 1\n")
    monkeypatch.setattr(audits.lightning_mnp, "__file__", str(package / "__init__.py"))
    read_anew = code_version.__wrapped__  # a process reads its code once
    first = read_anew()
    assert len(first) == 12
    (package / "cli").mkdir()
    (package / "cli" / "printed.py").write_text("b = 1\n")
    assert read_anew() == first
    (package / "signals" / "patch.py").write_text('"""One."""\n\na = 1  # one\n')
    assert read_anew() == first
    (package / "signals" / "patch.py").write_text("a = 2\n")
    assert read_anew() != first


# --- the command line --------------------------------------------------------------------------


def test_the_list_has_trained_and_missing_networks(tmp_path: Path) -> None:
    first, second, third = RECIPES[0], RECIPES[6], RECIPES[1]
    for recipe, figures in ((first, (0.61, None, None)), (second, (0.62, 0.5, False))):
        row = {"recipe": recipe.to_dict()} | dict(
            zip(("CA", "ASR", "learned"), figures, strict=True)
        )
        (tmp_path / f"{recipe.name}.json").write_text(json.dumps(row))
    lines = list_of([first, second, third], tmp_path).splitlines()
    start = f"| {first.name} | choosing | cnn | clean | {first.minutes:.1f}"
    assert lines[2] == f"{start} | yes | 61.0 |  |"
    assert lines[3].endswith(" | yes, attack not learned | 62.0 | 50.0 |")
    assert lines[4].endswith(" | no |  |  |")
    total = first.minutes + second.minutes + third.minutes
    left = f"3 networks, {total:.0f} minutes, of which {third.minutes:.0f} are left."
    assert lines[-1] == left


def test_names_that_are_not_known_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["list", "--only", "cnn-1"])
    assert "--only: expected names as `list` has them, but got ['cnn-1']" in capsys.readouterr().err


def test_a_group_of_networks_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--group", "adaptive", "--folder", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "cnn-adaptive-601" in told
    assert "2 networks, " in told


def test_commands_reach_their_functions(
    images: Images,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    main_module = __import__("benchmarks.population.__main__", fromlist=["main"])
    done: list[tuple[Any, ...]] = []

    def here(jobs: Any, executor: Any, budget: float | None) -> Any:
        for job in jobs:
            done.append((job.name, executor.slots, budget))
            yield job, ValueError("full") if job.name.startswith("vgg") else results[job.work]

    results = {
        main_module.train_network: {
            "CA": 0.5,
            "ASR": 0.25,
            "learned": False,
            "processor_seconds": 60.0,
        },
    }
    monkeypatch.setattr(main_module, "run_jobs", here)
    monkeypatch.setattr(main_module, "load_images", lambda *arguments: images)
    only = ["--only", "resnet-cl-210", "vgg-light-202", "--folder", str(tmp_path)]
    assert main(["train", "--jobs", "2", *only]) == 1
    # The clean network that CL needs is trained first.
    names = ["resnet-light-202", "vgg-light-202", "resnet-cl-210"]
    assert done == [(name, 2, None) for name in names]
    told = capsys.readouterr()
    assert "resnet-cl-210: CA 50.0, ASR 25.0, attack not learned, 60 s (estimated:" in told.out
    assert "vgg-light-202: ValueError('full')" in told.err
    assert main(["audit", *only]) == 0  # nothing is trained
    assert len(done) == 3
    assert main(["table", "--split", "choosing", "--results", str(tmp_path), *only]) == 0
    assert "0 of 4 audits" in capsys.readouterr().out


def test_weights_are_plain_tensors(images: Images, tmp_path: Path) -> None:
    train_network(TINY, tmp_path, tmp_path)
    weights = load_file(tmp_path / "lenet-tiny-2.safetensors")
    assert all(tensor.is_contiguous() for tensor in weights.values())


def test_parameters_are_measured_and_kept_in_half_precision(images: Images, tmp_path: Path) -> None:
    recipe = replace(TINY, name="cnn-tiny-2", architecture="cnn")
    train_network(recipe, tmp_path, tmp_path)
    weights = load_file(tmp_path / "cnn-tiny-2.safetensors")
    network = load_network(recipe, tmp_path)
    for name, parameter in network.named_parameters():
        assert weights[name].dtype == torch.float16
        assert parameter.dtype == torch.float32
        assert parameter.equal(weights[name].float())
    for name, buffer in network.named_buffers():
        assert weights[name].equal(buffer)
        assert weights[name].dtype == buffer.dtype


@pytest.mark.parametrize("command", ["audit", "defend", "detect"])
def test_networks_that_are_not_trained_are_told(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["--folder", str(tmp_path), "--results", str(tmp_path / "results")]
    assert main([command, *places, "--only", "cnn-light-202", "lenet-light-202"]) == 0
    told = "2 of 2 networks are not trained, and are left out; `train` with the same options"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("option", ["rescored", "defended", "detected"])
def test_options_of_the_table_are_refused_elsewhere(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["audit", f"--{option}"])
    expected = f"--{option}: only `table` takes it, but got 'audit'"
    assert expected in capsys.readouterr().err

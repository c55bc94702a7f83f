from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from benchmark_site import make_site, quick_fit, tiny_network

from lightning_mnp.benchmark import networks as module
from lightning_mnp.benchmark.lock import exclusive
from lightning_mnp.benchmark.networks import NetworkFolder, training_version, using_threads
from lightning_mnp.benchmark.recipe import NetworkRecipe
from lightning_mnp.cli.command_line import main
from lightning_mnp.surgery.network import weights_digest


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build the smallest networks."""
    monkeypatch.setattr(module, "build_network", tiny_network)
    monkeypatch.setattr(module, "training_version", lambda recipe: "0" * 12)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_site(tmp_path / "site")


def folder_of(base: Path, attack: str = "badnets", **options: object) -> NetworkFolder:
    recipe = NetworkRecipe(base, attack)
    return NetworkFolder(base.parents[1] / "networks", recipe, **options)  # type: ignore[arg-type]


@pytest.mark.usefixtures("small")
def test_a_network_is_trained_and_measured_once(base: Path) -> None:
    calls: list[list[str]] = []

    def fit(arguments: list[str]) -> int:
        calls.append(arguments)
        print("said")
        print("told", file=sys.stderr)
        return quick_fit(arguments)

    folder = folder_of(base)
    assert folder.figures() is None
    figures = folder.train(fit, None, None)
    assert calls == [["fit", "--config", str(folder.path / "recipe.yaml")]]
    assert (folder.path / "fit.log").read_text() == "said\ntold\n"
    network = folder.load()
    assert not network.training
    assert figures["weights_sha256"] == weights_digest(network)
    assert figures["CA"] == folder.images(None).test().measure(network)["CA"]
    assert folder.figures() == json.loads((folder.path / "network.json").read_text())
    assert folder.train(fit, None, None)["weights_sha256"] == figures["weights_sha256"]
    assert len(calls) == 1


@pytest.mark.usefixtures("small")
def test_a_training_goes_on_from_its_checkpoint(base: Path) -> None:
    folder = folder_of(base)
    folder.checkpoint.parent.mkdir(parents=True)
    folder.checkpoint.touch()
    calls: list[list[str]] = []

    def fit(arguments: list[str]) -> int:
        calls.append(arguments)
        return quick_fit(arguments)

    assert folder.train(fit, None, None)["went_on"]
    assert calls[0][3:] == ["--ckpt_path", str(folder.checkpoint)]


@pytest.mark.usefixtures("small")
def test_a_training_without_a_checkpoint_begins_anew(base: Path) -> None:
    folder = folder_of(base)
    folder.path.mkdir(parents=True)
    (folder.path / "config.yaml").write_text("left by a killed training")
    folder.train(quick_fit, None, None)
    assert not (folder.path / "config.yaml").exists()


def test_a_training_that_fails(base: Path) -> None:
    def fit(arguments: list[str]) -> int:
        print("no space left")
        return 2

    folder = folder_of(base)
    with pytest.raises(RuntimeError, match=r"Training badnets-.* failed: no space left The log is"):
        folder.train(fit, None, None)
    assert folder.figures() is None


@pytest.mark.usefixtures("small")
def test_weights_that_are_gone_are_trained_anew(base: Path) -> None:
    folder = folder_of(base)
    folder.train(quick_fit, None, None)
    folder.checkpoint.unlink()
    assert folder.figures() is None
    assert not folder.train(quick_fit, None, None)["went_on"]
    assert folder.figures() is not None


@pytest.mark.usefixtures("small")
def test_weights_that_cannot_be_read_name_their_remedy(base: Path) -> None:
    folder = folder_of(base)
    folder.train(quick_fit, None, None)
    folder.checkpoint.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"to hold the weights of badnets-.*Remove .* train the"):
        folder.load()


def test_a_training_that_cannot_go_on_names_its_remedy(base: Path) -> None:
    folder = folder_of(base)
    folder.checkpoint.parent.mkdir(parents=True)
    folder.checkpoint.write_bytes(b"damaged")
    with pytest.raises(RuntimeError, match=rf"Remove {folder.path} to train it anew\."):
        folder.train(lambda arguments: 2, None, None)


@pytest.mark.usefixtures("small")
def test_other_weights_than_were_measured_are_refused(base: Path) -> None:
    folder = folder_of(base)
    folder.train(quick_fit, None, None)
    folder.load()
    content = torch.load(folder.checkpoint, weights_only=True)
    content["state_dict"]["4.bias"] += 1
    torch.save(content, folder.checkpoint)
    with pytest.raises(ValueError, match=r"weights that network\.json beside it was measured on"):
        folder.load()


@pytest.mark.usefixtures("small")
def test_a_run_waits_for_another_that_trains_the_network(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(base)

    @contextmanager
    def held(path: Path, what: str) -> Iterator[None]:
        assert path.parent == folder.path
        monkeypatch.setattr(module, "exclusive", exclusive)
        folder.train(quick_fit, None, None)  # the other run, which had the lock
        yield

    monkeypatch.setattr(module, "exclusive", held)
    figures = folder.train(lambda arguments: pytest.fail("trained twice"), None, None)
    assert figures == folder.figures()


def test_a_training_that_is_interrupted(base: Path) -> None:
    level, words = logging.getLogger("lightning.pytorch").level, sys.argv
    with pytest.raises(KeyboardInterrupt):
        folder_of(base).train(lambda arguments: 130, None, None)
    assert (logging.getLogger("lightning.pytorch").level, sys.argv) == (level, words)


def test_a_training_that_is_terminated_is_not_finished(base: Path) -> None:
    folder = folder_of(base)
    with pytest.raises(SystemExit) as stop:
        folder.train(lambda arguments: 143, None, None)
    assert stop.value.code == 143
    assert folder.figures() is None


def test_of_networks_of_other_code_the_latest_is_taken(base: Path) -> None:
    folder = folder_of(base, any_code=True)
    for version, seconds in (("a", 30), ("b", 50), ("c", 40)):
        figures = folder.root / f"{folder.recipe.name}-{version}" / "network.json"
        (figures.parent / "checkpoints").mkdir(parents=True)
        (figures.parent / "checkpoints" / "last.ckpt").touch()
        figures.touch()
        os.utime(figures, (seconds, seconds))
    assert folder.path.name.endswith("-b")
    (folder.path / "checkpoints" / "last.ckpt").unlink()
    assert folder.path.name.endswith("-c")


@pytest.mark.usefixtures("small")
def test_other_code_trains_another_network(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(base).train(quick_fit, None, None)
    monkeypatch.setattr(module, "training_version", lambda recipe: "0123456789ab")
    assert folder_of(base).figures() is None
    assert folder_of(base, any_code=True).figures() is not None


def test_the_clean_network_of_an_attack_is_found(base: Path) -> None:
    folder = folder_of(base, "cl")
    assert folder.clean == folder_of(base, "clean")
    assert folder_of(base).clean is None
    images = folder.images(Path("data"))
    assert images.clean == folder_of(base, "clean").checkpoint
    assert images.trigger == folder.checkpoint.with_name("trigger.safetensors")
    assert folder_of(base, "clean").trigger is None


def test_the_version_of_a_training_covers_attack_data_and_model(base: Path) -> None:
    versions = {
        name: training_version(NetworkRecipe(base, name)) for name in ("clean", "badnets", "wanet")
    }
    assert len(set(versions.values())) == 3


def test_the_version_of_a_training_covers_its_callbacks(base: Path) -> None:
    recipe = NetworkRecipe(base, "badnets")
    own = {"class_path": "lightning_mnp.attacks.AdaptiveTraining"}
    of_lightning = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}
    plain = training_version(recipe)
    for name, given, same in (
        ("callbacks", of_lightning, True),
        ("callbacks", [of_lightning], True),
        ("callbacks+", own, False),
        ("callbacks", [of_lightning, own], False),
    ):
        trainer = {**recipe.content["trainer"], name: given}
        changed = SimpleNamespace(
            content={**recipe.content, "trainer": trainer}, attack_options=recipe.attack_options
        )
        assert (training_version(changed) == plain) is same  # type: ignore[arg-type]


@pytest.mark.usefixtures("small")
def test_the_network_of_this_code_comes_first(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(base).train(quick_fit, None, None)
    monkeypatch.setattr(module, "training_version", lambda recipe: "f" * 12)
    newer = folder_of(base, any_code=True)
    assert newer.path.name.endswith("0" * 12)
    folder_of(base).train(quick_fit, None, None)
    assert newer.path.name.endswith("f" * 12)


def test_threads_are_as_before() -> None:
    before = torch.get_num_threads()
    with using_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_a_configuration_that_fit_does_not_understand(base: Path) -> None:
    folder = folder_of(base)
    text = base.read_text().replace("lr: 0.05", "lr: fast")
    base.write_text(text)
    with pytest.raises(ValueError, match=r"network 'badnets', seed 0, to be one for .*fast"):
        folder_of(base).check(main, None)
    assert not folder.root.exists()


@pytest.mark.filterwarnings("ignore")
def test_a_network_that_fit_trains(base: Path) -> None:
    folder = folder_of(base)
    figures = folder.train(main, None, None)
    assert yaml.safe_load((folder.path / "config.yaml").read_text())["seed_everything"] == 0
    assert 0 <= figures["CA"] <= 1
    assert 0 <= figures["ASR"] <= 1

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from torchvision.transforms.v2 import functional as V

from lightning_mnp.attacks import load_trigger
from lightning_mnp.cli.command_line import MNPCLI, main
from lightning_mnp.data import ImageNetSubsetDataModule
from lightning_mnp.data.cifar10 import CLASSES
from lightning_mnp.models import Classifier

pytestmark = [
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
    pytest.mark.filterwarnings("ignore:.*before its last phase"),
]

FOLDER = Path(__file__).parents[1] / "examples" / "attacks"
# Each base, and the ending of the overlays that are made for it.
BASES = {
    "cifar10-2core": "",
    "cifar10-paper": "paper",
    "imagenette-2core": "imagenette",
    "imagenet12-paper": "imagenet12",
}
# On top of an attack.
BESIDE = ["adaptive"]
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem not in [*BASES, *BESIDE])
ENDINGS = ("paper", "imagenette", "imagenet12")
CHANGES = ["0.5percent", "1percent", "5percent", "20percent", "all-to-all"]
ATTACKS = [name for name in NAMES if "-" not in name]
# On Imagenette, the issue asks for these.
ON_IMAGENETTE = ["badnets", "blend", "cl", "fc", "trojan", "wanet"]


def overlay(attack: str, base: str) -> str:
    special = f"{attack}-{BASES[base]}"
    return special if special in NAMES else attack


def files(*names: str) -> list[str]:
    return [part for name in names for part in ("--config", str(FOLDER / f"{name}.yaml"))]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setattr(sys, "argv", ["lightning-mnp"])


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    class Parsed(MNPCLI):
        def instantiate_classes(self) -> None:
            pass

        def _run_subcommand(self, subcommand: str) -> None:
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lightning-mnp"])
        patch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
        return Parsed(["fit", *files("cifar10-2core")]).parser


@pytest.fixture(scope="module")
def parsed_of(parser: ArgumentParser) -> Callable[..., Any]:
    """Parse files by their names, the same ones once; nobody may change what comes out."""
    return functools.cache(lambda *names: parser.parse_args(["fit", *files(*names)]).fit)


def test_every_file_is_a_base_or_belongs_to_one() -> None:
    assert set(BASES) <= {path.stem for path in FOLDER.glob("*.yaml")}
    known = {*ATTACKS, *(f"badnets-{change}" for change in CHANGES)}
    known |= {f"{attack}-{ending}" for attack in ATTACKS for ending in ENDINGS}
    assert set(NAMES) <= known
    assert {"badnets", "blend", "cl", "dfst", "fc", "iab", "lira", "sig", "trojan", "wanet"} == set(
        ATTACKS
    )


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("attack", ATTACKS)
def test_every_attack_is_parsed_on_every_base(
    attack: str, base: str, parsed_of: Callable[..., Any]
) -> None:
    parsed = parsed_of(base, overlay(attack, base))
    model, data = parsed.model.init_args, parsed.data.init_args
    options = parsed_of(base).model.init_args
    for name in ("architecture", "width", "num_classes", "channels_last", "weight_decay"):
        assert model[name] == options[name]
    by_module = model.get("attack") is not None
    assert by_module != (data.get("attack") is not None)
    attacked = model.attack if by_module else data.attack
    assert attacked.init_args.target_class == 0
    assert data.augment is (not by_module and attack != "fc")
    reference = attacked.init_args.get("reference")
    if reference is not None:
        # The clean network is what the base alone trains.
        trained = Path("runs", "attacks", base, "clean", "checkpoints", "last.ckpt")
        assert Path(reference.init_args.checkpoint) == trained
        for name in ("architecture", "width", "num_classes", "in_channels"):
            assert reference.init_args[name] == options[name]
        for name in ("mean", "std"):
            assert list(reference.init_args[name]) == list(data[name])
        if attack == "fc":
            assert Path(model.checkpoint) == trained


@pytest.mark.parametrize("attack", ["dfst", "iab", "lira", "wanet"])
def test_the_modules_of_training_time_attacks_have_the_options_of_their_bases(
    attack: str, parser: ArgumentParser
) -> None:
    args = ["--model.mean=[0.1,0.2,0.3]", "--model.flip=true", "--model.lr=0.2"]
    if attack != "wanet":
        args.append("--model.generator_lr=0.5")
    model = parser.parse_args(["fit", *files("cifar10-2core", attack), *args]).fit.model.init_args
    assert (model.mean, model.std, model.augment) == ([0.1, 0.2, 0.3], None, True)
    assert (model.flip, model.lr, model.trainable) == (True, 0.2, "all")
    assert model.get("generator_lr") == (None if attack == "wanet" else 0.5)
    assert "kwargs" not in model


@pytest.mark.parametrize(
    ("change", "rate", "mode"),
    [
        ("0.5percent", 0.005, "all-to-one"),
        ("1percent", 0.01, "all-to-one"),
        ("5percent", 0.05, "all-to-one"),
        ("20percent", 0.2, "all-to-one"),
        ("all-to-all", 0.1, "all-to-all"),
    ],
)
@pytest.mark.parametrize(
    "base", ["cifar10-2core", pytest.param("imagenette-2core", marks=pytest.mark.slow)]
)
def test_badnets_at_other_rates_and_all_to_all(
    change: str, rate: float, mode: str, base: str, parsed_of: Callable[..., Any]
) -> None:
    names = [base, overlay("badnets", base), f"badnets-{change}"]
    plain = parsed_of(*names[:2]).data.init_args.attack
    attack = parsed_of(*names).data.init_args.attack
    assert attack.class_path == "lightning_mnp.attacks.BadNets"
    assert (attack.init_args.poison_rate, attack.init_args.mode) == (rate, mode)
    for name in ("patch_size", "margin", "target_class", "pattern"):
        assert attack.init_args[name] == plain.init_args[name]
    both = parsed_of(*names, "badnets-all-to-all")
    attack = both.data.init_args.attack.init_args
    assert (attack.poison_rate, attack.mode) == (rate, "all-to-all")


def test_adaptive_training_is_added_to_the_callbacks(parser: ArgumentParser) -> None:
    parsed = parser.parse_args(["fit", *files("cifar10-2core", "blend", "adaptive")]).fit
    assert [callback.class_path.rpartition(".")[2] for callback in parsed.trainer.callbacks] == [
        "ModelCheckpoint",
        "AdaptiveTraining",
    ]
    assert parsed.data.init_args.attack.class_path == "lightning_mnp.attacks.Blend"


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny trees: six training images and one test image of each class."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    trees = {
        "cifar10-2core": (("train", "test"), CLASSES, 32),
        "imagenette-2core": (
            ("train", "val"),
            ImageNetSubsetDataModule(preset="imagenette").class_names,
            64,
        ),
    }
    for base, ((train, test), classes, size) in trees.items():
        root = found[base] = tmp_path_factory.mktemp(base)
        for split, count in ((train, 6), (test, 1)):
            for name in classes:
                (root / split / name).mkdir(parents=True)
                for index in range(count):
                    pixels = torch.randint(0, 256, (3, size, size), generator=generator)
                    image = V.to_pil_image(pixels.to(torch.uint8))
                    image.save(root / split / name / f"{index}.png")
    return found


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that takes every image for class 1, so that it is right about some."""
    classifier = Classifier(width=4)
    with torch.no_grad():
        classifier.network.get_parameter("fc.bias")[1] = 100.0
    path = tmp_path_factory.mktemp("clean") / "last.pt"
    torch.save(classifier.state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("base", "attack"),
    [
        *(("cifar10-2core", attack) for attack in ["none", *ATTACKS]),
        ("imagenette-2core", "cl"),
        *(
            pytest.param("imagenette-2core", attack, marks=pytest.mark.slow)
            for attack in ["none", *ON_IMAGENETTE]
            if attack != "cl"
        ),
    ],
)
def test_a_short_run(
    base: str,
    attack: str,
    roots: dict[str, Path],
    clean: Path,
    tmp_path: Path,
    parsed_of: Callable[..., Any],
) -> None:
    names = [base] if attack == "none" else [base, overlay(attack, base)]
    args: list[str] = [
        *files(*names),
        f"--data.init_args.root={roots[base]}",
        "--data.init_args.batch_size=4",
        "--data.init_args.defense_size=10",
        "--model.init_args.width=4",
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.max_epochs=1",
        "--trainer.check_val_every_n_epoch=1",
        "--trainer.limit_train_batches=1",
        "--trainer.limit_val_batches=1",
        "--trainer.num_sanity_val_steps=0",
        "--trainer.enable_progress_bar=false",
    ]
    parsed = parsed_of(*names)
    chosen = parsed.data.init_args.attack or parsed.model.init_args.get("attack")
    path = "--data.init_args.attack.init_args"
    if chosen is not None and "reference" in chosen.init_args:
        args += [
            f"{path}.reference.init_args.checkpoint={clean}",
            f"{path}.reference.init_args.width=4",
            f"{path}.steps=1",
        ]
    if attack == "fc":
        args += [f"--model.init_args.checkpoint={clean}"]
        args += [f"{path}.targets=1", f"{path}.poisons_per_target=2"]
    if attack == "dfst":
        args += ["--model.init_args.injector_steps=1"]
    assert main(["fit", *args]) == 0
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()
    trigger = tmp_path / "checkpoints" / "trigger.safetensors"
    assert trigger.exists() is (attack != "none")
    if chosen is not None:
        assert type(load_trigger(trigger)).__name__ == chosen.class_path.rsplit(".", 1)[1]

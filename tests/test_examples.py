"""Every file in `examples/` runs as a reader would run it, on a smaller scale."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import REPOSITORY
from PIL import Image

from lightning_mnp import (
    MaskOptions,
    MNPConfig,
    PruningOptions,
    SuppressionOptions,
    VerdictOptions,
    read_state_dict,
)
from lightning_mnp.attacks import BadNets, save_trigger
from lightning_mnp.cli.command_line import main
from lightning_mnp.data import CIFAR10DataModule, DigitsDataModule
from lightning_mnp.data.cifar10 import CLASSES
from lightning_mnp.models import Classifier, cifar_resnet18
from lightning_mnp.models.resnet import CifarResNet

EXAMPLES = REPOSITORY / "examples"
FIT = sorted(path.name for path in EXAMPLES.glob("fit-*.yaml"))
AUDIT = sorted(path.name for path in EXAMPLES.glob("audit-*.yaml"))

# Configurations that go on top of another one.
ON_TOP = {"fit-cifar10-2core-blend.yaml": "fit-cifar10-2core.yaml"}

QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
SHORT_FIT = [
    *QUIET,
    "--trainer.enable_model_summary=false",
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=1",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.log_every_n_steps=1",
    "--model.init_args.width=4",
    "--data.init_args.batch_size=4",
]
SHORT_AUDIT = [
    *QUIET,
    "--mnp.suppression.epochs=1",
    "--mnp.masks.epochs=1",
    "--mnp.verdict.most_classes=3",
    "--model.init_args.width=4",
    "--data.init_args.image_size=8",
    "--data.init_args.defense_size=20",
]
# Of no account for the paper's setting, which has none of either.
SHORT_DEFENSE = [
    "--mnp.suppression.more_runs=0",
    "--mnp.pruning.amount=0.01",
    "--mnp.pruning.harm=50",
    "--mnp.pruning.soft_mask_steps=2",
    "--mnp.pruning.tuning_steps=2",
]

pytestmark = [
    pytest.mark.usefixtures("short_searches"),
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    # A network of one epoch may be called anything.
    pytest.mark.filterwarnings("ignore:MNPCallback. verdict"),
]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setattr(sys, "argv", ["lightning-mnp"])


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images of noise for each class and split, in CIFAR-10's folders."""
    root = tmp_path_factory.mktemp("cifar10")
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for index in range(2):
                pixels = torch.randint(0, 256, (32, 32, 3), generator=generator)
                image = Image.fromarray(pixels.to(torch.uint8).numpy())
                image.save(root / split / name / f"{index}.png")
    return root


@dataclass(frozen=True)
class QuickConfig(MNPConfig):
    """Options whose defaults take one pass or step instead of twenty or more."""

    suppression: SuppressionOptions = field(
        default_factory=lambda: SuppressionOptions(epochs=1, more_runs=0)
    )
    masks: MaskOptions = field(default_factory=lambda: MaskOptions(epochs=1))
    pruning: PruningOptions = field(
        default_factory=lambda: PruningOptions(
            amount=0.01, harm=50.0, soft_mask_steps=2, tuning_steps=2
        )
    )
    verdict: VerdictOptions = field(default_factory=lambda: VerdictOptions(most_classes=3))


@pytest.fixture
def short_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let scripts, which have no options for it, take few steps."""
    for name in ("config", "config.options"):
        monkeypatch.setattr(f"lightning_mnp.{name}.MNPConfig", QuickConfig)


def data_options(name: str, cifar10: Path) -> list[str]:
    return [f"--data.init_args.root={cifar10}"] if "cifar10" in name else []


def config(name: str) -> list[str]:
    below = [f"--config={EXAMPLES / ON_TOP[name]}"] if name in ON_TOP else []
    return [*below, f"--config={EXAMPLES / name}"]


def run_script(name: str, options: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *options])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_no_example_is_left_out() -> None:
    scripts = {"callback.py", "figure1.py", "module.py", "plain.py", "zoo.py"}
    others = {"callback.yaml", "mnp-paper.yaml", "mnp-averaged-masks.yaml"}
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == {
        *FIT,
        *AUDIT,
        *scripts,
        *others,
        "README.md",
    }


@pytest.mark.parametrize("name", FIT)
def test_fit(name: str, cifar10: Path, tmp_path: Path) -> None:
    assert main(["fit", *config(name), *SHORT_FIT, *data_options(name, cifar10)]) == 0
    [trained] = tmp_path.rglob("*.ckpt")
    loaded = read_state_dict(trained)
    assert "network.conv1.weight" in loaded


@pytest.mark.parametrize("name", AUDIT)
def test_audit_and_defend(name: str, cifar10: Path, tmp_path: Path) -> None:
    channels = 1 if "digits" in name else 3
    suspicious, purified = tmp_path / "suspicious.ckpt", tmp_path / "purified.ckpt"
    torch.save({"state_dict": Classifier(width=4, in_channels=channels).state_dict()}, suspicious)
    options = [*config(name), *SHORT_AUDIT, *SHORT_DEFENSE, *data_options(name, cifar10)]
    options += [f"--ckpt_path={suspicious}"]
    assert main(["audit", *options]) in (0, 3, 4)
    assert main(["defend", *options, f"--output={purified}"]) in (0, 3, 4)
    assert read_state_dict(purified).keys() == read_state_dict(suspicious).keys()


@pytest.mark.slow
def test_digits_from_training_to_test(tmp_path: Path) -> None:
    """The commands in the heads of the two files, one after the other."""
    size = ["--data.init_args.image_size=8"]
    assert main(["fit", *config("fit-digits.yaml"), *SHORT_FIT, *size]) == 0
    trained = tmp_path / "runs/digits/backdoored.ckpt"
    audit = [*config("audit-digits.yaml"), *SHORT_AUDIT, *SHORT_DEFENSE]
    audit += [f"--ckpt_path={trained}"]
    assert main(["audit", *audit]) in (0, 3, 4)
    assert main(["defend", *audit, "--output=runs/digits/purified.ckpt"]) in (0, 3, 4)
    test = [*config("fit-digits.yaml"), *size, *QUIET, "--model.init_args.width=4"]
    test += ["--trainer.limit_test_batches=1", "--ckpt_path=runs/digits/purified.ckpt"]
    assert main(["test", *test]) == 0


@pytest.mark.parametrize(
    "below",
    ["fit-digits.yaml", pytest.param("fit-cifar10-paper.yaml", marks=pytest.mark.slow)],
)
def test_callback_goes_on_top_of_a_training(
    below: str, cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*config(below), f"--config={EXAMPLES / 'callback.yaml'}", *SHORT_FIT]
    options += [*data_options(below, cifar10), "--data.init_args.defense_size=20"]
    assert main(["fit", *options]) == 0
    report = json.loads((tmp_path / "runs/mnp/mnp-report.json").read_text())
    assert report["defense_set"]["images"] == 20
    # The checkpoint callback below is still there.
    assert [path for path in tmp_path.rglob("*.ckpt") if path.parent.name != "mnp"]


@pytest.mark.parametrize("name", ["paper", "averaged-masks"])
def test_presets_are_those_of_the_class(name: str) -> None:
    options = yaml.safe_load((EXAMPLES / f"mnp-{name}.yaml").read_text())
    preset = getattr(MNPConfig, name.replace("-", "_"))
    assert MNPConfig.from_dict(options) == preset()


def test_paper_setting_is_taken(cifar10: Path, tmp_path: Path) -> None:
    suspicious, report = tmp_path / "suspicious.pt", tmp_path / "report.json"
    torch.save(cifar_resnet18(width=4).state_dict(), suspicious)
    options = [*config("audit-cifar10.yaml"), f"--mnp={EXAMPLES / 'mnp-paper.yaml'}"]
    options += [*SHORT_AUDIT, *data_options("cifar10", cifar10)]
    assert main(["audit", *options, f"--ckpt_path={suspicious}", f"--report={report}"]) in (0, 3, 4)
    written = json.loads(report.read_text())["config"]
    changes = {"suppression.epochs": 1, "masks.epochs": 1, "verdict.most_classes": 3}
    expected = MNPConfig.paper(changes).to_dict()
    assert written == expected


@pytest.mark.usefixtures("short_stages")
@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
@pytest.mark.parametrize("name", ["callback.py", "module.py", "plain.py"])
def test_script(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def small_digits(**options: Any) -> DigitsDataModule:
        return DigitsDataModule(**{**options, "image_size": 8, "defense_size": 20})

    def small_resnet(width: int, in_channels: int) -> CifarResNet:
        return CifarResNet([1, 1, 1, 1], width=width, in_channels=in_channels)

    monkeypatch.setattr("lightning_mnp.data.DigitsDataModule", small_digits)
    if name == "plain.py":  # the only one whose network is not read from a file
        monkeypatch.setattr("lightning_mnp.models.cifar_resnet18", small_resnet)
    run_script(name, ["--epochs=1", "--output=out"], monkeypatch)
    printed = capsys.readouterr().out
    told = r"(?m)^(CLEAN|UNDECIDED|BACKDOORED)\. " if name == "module.py" else "filters pruned"
    assert re.search(told, printed)
    assert any((tmp_path / "out").iterdir())
    if name == "module.py":
        assert (tmp_path / "out/mnp-report.json").exists()
        options = ["--output=out", "--resume=out/checkpoints/last.ckpt"]
        run_script(name, options, monkeypatch)
        assert re.search(told, capsys.readouterr().out)


@pytest.mark.usefixtures("short_stages")
@pytest.mark.parametrize("preset", ["paper", pytest.param("default", marks=pytest.mark.slow)])
def test_zoo(
    preset: str,
    cifar10: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def small_datamodule(root: Path, defense_size: int = 0, defense_seed: int = 0) -> Any:
        return CIFAR10DataModule(root, defense_size=20, defense_seed=defense_seed)

    zoo = tmp_path / "zoo"
    zoo.mkdir()
    (zoo / "load.py").write_text(ZOO)
    for name in ("badnets", "clean"):
        torch.save(cifar_resnet18(width=2).state_dict(), zoo / f"{name}.pt")
    monkeypatch.setattr("lightning_mnp.data.CIFAR10DataModule", small_datamodule)
    options = [f"--zoo={zoo}", f"--data={cifar10}", "--out=rows", "--seeds=1", "--networks"]
    options += ["badnets", "clean", f"--preset={preset}"]
    run_script("zoo.py", options, monkeypatch)
    first = capsys.readouterr().out
    assert "clean-0.json: done" in first
    assert "badnets: CA drop" in first
    rows = [json.loads(path.read_text()) for path in sorted(tmp_path.glob(f"rows/{preset}/*"))]
    assert [(row["network"], row["preset"]) for row in rows] == [
        ("badnets", preset),
        ("clean", preset),
    ]
    assert rows[1]["asr_before"] is None
    if preset == "paper":
        assert {row["pruned"] for row in rows} == {1}  # of 150 filters
    run_script("zoo.py", options, monkeypatch)
    assert "done" not in capsys.readouterr().out  # finished runs are kept


def test_figure_1(
    cifar10: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.save(cifar_resnet18(width=2).state_dict(), tmp_path / "last.ckpt")
    save_trigger(tmp_path / "trigger.safetensors", BadNets())
    options = [f"--network={tmp_path}", f"--data={cifar10}", "--output=out", "--images=10"]
    run_script("figure1.py", [*options, "--layers", "conv1", "layer1.0.conv1"], monkeypatch)
    lines = (tmp_path / "out" / "changes.csv").read_text().splitlines()
    assert lines[0] == "layer,filter,CLC,BLC,l2 norm,kind"
    assert [line.split(",")[0] for line in lines[1::2]] == ["conv1", "layer1.0.conv1"]
    drawn = (tmp_path / "out" / "figure1.png").exists()
    assert drawn != ("No picture" in capsys.readouterr().out)


ZOO = """
from pathlib import Path

import torch

from lightning_mnp.attacks import BadNets
from lightning_mnp.models import cifar_resnet18


def load(name):
    network = cifar_resnet18(width=2)
    network.load_state_dict(torch.load(Path(__file__).parent / name, weights_only=True))
    return network.eval(), {"atk": name.removesuffix(".pt")}


def trigger(info, images):
    return BadNets().apply(images)
"""

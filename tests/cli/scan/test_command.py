from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import RunsFunction, leave_a_mark
from helpers import CLASSES, images_and_labels, quick_config, trained_resnet18
from streams import broken, in_ascii
from torch import nn
from torchvision.transforms.v2 import functional as V

from lightning_mnp import DefenseReport, load_into, read_state_dict
from lightning_mnp.cli.entry import main
from lightning_mnp.cli.scan.command import _one_by_one, scan
from lightning_mnp.cli.scan.options import ScanOptions
from lightning_mnp.models import build_network, cifar_resnet18
from lightning_mnp.report import SecondAudit

pytestmark = pytest.mark.usefixtures("short_searches")

NORMAL = {"mean": (1 / 3,), "std": (1 / 3,)}
NAMES = ["bar", "car", "far", "war"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a weights file, and with images in a folder for each class."""
    monkeypatch.chdir(tmp_path)
    weights = {f"network.{name}": each for name, each in trained_resnet18().state_dict().items()}
    torch.save({"state_dict": weights, "note": RunsFunction(tmp_path / "executed")}, "model.ckpt")
    images, labels = images_and_labels()
    pixels = ((images.clamp(-1, 2) + 1) * 85).to(torch.uint8)
    for index, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
        path = Path("images", NAMES[label], f"{index}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        V.to_pil_image(image).save(path)
    return tmp_path


WORDS = ["scan", "model.ckpt", "--images", "images", "--mean", "0.33", "--std", "0.33"]


def options(**changes: Any) -> ScanOptions:
    return ScanOptions("model.ckpt", Path("images"), **{**NORMAL, **changes})


def test_from_a_file_and_a_folder_to_a_report(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Path("model.ckpt").read_bytes()
    report = scan(options(), quick_config(runs=1))
    assert report.class_names == NAMES
    assert report.weights_file is not None
    assert (report.weights_file.name, report.weights_file.bytes) == ("model.ckpt", len(before))
    assert report.accuracy_before > 0.9
    assert report.warnings[0] == (
        "the architecture, cifar_resnet18, was taken from the fit of all names and shapes"
    )
    assert "the images have 8 x 8 pixels" in report.warnings[1]
    assert f"objects of {leave_a_mark.__module__}.leave_a_mark" in report.warnings[2]
    assert capsys.readouterr().out.endswith("Report: report.html, report.json\n")
    assert DefenseReport.load("report.json").class_names == NAMES
    assert "<!DOCTYPE html>" in Path("report.html").read_text()
    assert Path("model.ckpt").read_bytes() == before
    assert not (folder / "executed").exists()
    assert sorted(path.name for path in folder.iterdir()) == [
        *("images", "model.ckpt", "report.html", "report.json")
    ]


def reporting(verdict: Any, **changes: Any) -> Callable[..., DefenseReport]:
    """An audit, or a defense, that has come to a verdict at once."""

    def found(network: nn.Module, data: Any, **others: Any) -> DefenseReport:
        return DefenseReport(verdict, score=0.5, model=network, **changes)

    return found


def test_the_exit_code_is_about_the_file_that_came_in(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clean = SecondAudit("clean", 0.1, None, False, 0.9, 0.2, [])
    purified = reporting("backdoored", pruned=[("conv1", 0)], reaudit=clean)
    monkeypatch.setattr("lightning_mnp.cli.scan.command.defend", purified)
    assert main([*WORDS, "--purify", "out.safetensors", "--format", "sarif"]) == 3
    [run] = json.loads(capsys.readouterr().out)["runs"]
    assert [each["exitCode"] for each in run["invocations"]] == [3]
    assert DefenseReport.load("report.json").exit_code == 0


def test_a_file_that_breaks_the_scan_does_not_keep_others_from_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def scanned(options: ScanOptions) -> DefenseReport:
        if options.weights == "model.ckpt":
            raise OverflowError("nobody thought of this")
        return DefenseReport("backdoored")

    monkeypatch.setattr("lightning_mnp.cli.scan.command.scan", scanned)
    assert main([WORDS[0], "model.ckpt", "other.ckpt", *WORDS[2:]]) == 3
    told = capsys.readouterr().err
    assert "Traceback" in told
    assert told.endswith("error: nobody thought of this\n")


def test_names_in_a_trace_are_escaped(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "a name from the file: \x1b[2J"

    def scanned(options: ScanOptions) -> DefenseReport:
        raise OverflowError(name)

    monkeypatch.setattr("lightning_mnp.cli.scan.command.scan", scanned)
    assert main(WORDS) == 2
    told = capsys.readouterr().err
    assert told.count("a name from the file: ") == 2  # in the trace, and after it
    assert "\x1b" not in told


@pytest.mark.parametrize(("verdict", "code"), [("clean", 0), ("backdoored", 3), ("undecided", 4)])
def test_exit_codes_and_formats(
    verdict: str,
    code: int,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("lightning_mnp.cli.scan.command.audit", reporting(verdict))
    words = [
        "scan",
        "model.ckpt",
        "--images",
        "images",
        "--mean",
        "0.33",
        "--std",
        "0.33",
        "--out",
        "reports",
        "--format",
    ]
    shown = {}
    for kind in ("text", "json", "sarif"):
        assert main([*words, kind]) == code
        shown[kind] = capsys.readouterr().out
    assert shown["text"].startswith(verdict.upper())
    assert json.loads(shown["json"])["verdict"] == verdict
    assert json.loads(shown["sarif"])["version"] == "2.1.0"
    names = sorted(path.name for path in Path("reports").iterdir())
    assert names == ["report.html", "report.json"]


@pytest.mark.parametrize("stdout", [in_ascii, lambda: broken(errno.EPIPE)])
@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["\xe9.ckpt"], "text"),
        (["\xe9.ckpt"], "json"),
        (["\xe9.ckpt"], "sarif"),
        (["\xe9.ckpt", "\xe8.ckpt"], "text"),
    ],
)
def test_what_cannot_be_printed_changes_no_exit_code(
    names: list[str], kind: str, stdout: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = reporting("backdoored", reasons=["\xe9"])
    monkeypatch.setattr("lightning_mnp.cli.scan.command.audit", found)
    monkeypatch.setattr(sys, "stdout", stdout())
    for name in names:
        Path(name).write_bytes(Path("model.ckpt").read_bytes())
    assert main(["scan", *names, *WORDS[2:], "--format", kind, "--out=reports"]) == 3
    folders = ["."] if len(names) == 1 else names
    for name in folders:
        assert DefenseReport.load(Path("reports", name, "report.json")).verdict == "backdoored"


class Counting(nn.Module):
    """A network with a state beside its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.network = cifar_resnet18(CLASSES, 4, in_channels=1)

    def forward(self, images: torch.Tensor) -> Any:
        return self.network(images)

    def get_extra_state(self) -> Any:
        return {"steps": 0}

    def set_extra_state(self, state: Any) -> None:
        assert state == {"steps": 0}


def test_purified_weights_with_an_extra_state(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*WORDS, f"--arch={__name__}:Counting", "--purify"]
    monkeypatch.setattr("lightning_mnp.cli.scan.command.defend", None)
    assert main([*words, "out.safetensors"]) == 2
    assert "but _extra_state is an extra state: builtins.dict" in capsys.readouterr().err
    monkeypatch.setattr("lightning_mnp.cli.scan.command.defend", reporting("backdoored"))
    assert main([*words, "out.pt"]) == 3
    Counting().load_state_dict(torch.load("out.pt", weights_only=True), strict=True)


@pytest.mark.parametrize("verdict", ["clean", "backdoored"])
def test_purified_weights_have_the_names_of_the_file(
    verdict: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("lightning_mnp.cli.scan.command.defend", reporting(verdict))
    assert main([*WORDS, "--purify", "out.safetensors"]) == (3 if verdict == "backdoored" else 0)
    told = capsys.readouterr().out
    if verdict == "clean":
        assert "Purified weights: none, since it is not flagged" in told
        assert not Path("out.safetensors").exists()
        return
    assert "Purified weights: out.safetensors" in told
    written = read_state_dict("out.safetensors")
    assert all(name.startswith("network.") for name in written)
    load_into(cifar_resnet18(CLASSES, 4, in_channels=1), written)


def test_images_without_labels_get_the_predicted_ones(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def audit(network: nn.Module, data: Any, **others: Any) -> DefenseReport:
        seen.append(data)
        return DefenseReport("clean")

    monkeypatch.setattr("lightning_mnp.cli.scan.command.audit", audit)
    flat = folder / "flat"
    flat.mkdir()
    for path in sorted((folder / "images").rglob("*.png")):
        path.rename(flat / path.name)
    report = scan(ScanOptions("model.ckpt", flat, count=30, **NORMAL))
    [data] = seen
    assert len(data) == 30
    predicted = trained_resnet18()(data.images).argmax(1)
    assert data.labels.equal(predicted)
    assert any("the images have no labels" in warning for warning in report.warnings)


class RegisteredBackward(nn.Module):
    """A network whose last layer is registered first."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(7, 2)
        self.conv = nn.Conv2d(1, 7, 3)

    def forward(self, images: torch.Tensor) -> Any:
        return self.fc(self.conv(images).mean((2, 3)))


@pytest.mark.parametrize("asked", [["--classes=2"], []])
def test_the_number_of_classes_is_that_of_the_logits(
    asked: list[str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("lightning_mnp.cli.scan.command.audit", reporting("clean"))
    torch.save(RegisteredBackward().state_dict(), "backward.pt")
    Path("two").mkdir()
    for name in NAMES[:2]:
        Path("images", name).rename(Path("two", name))
    words = ["--images=two", "--mean=0.33", "--std=0.33", f"--arch={__name__}:RegisteredBackward"]
    assert main(["scan", "backward.pt", *words, *asked]) == 0
    assert " pixels, 2 classes\n" in capsys.readouterr().err
    assert DefenseReport.load("report.json").class_names == NAMES[:2]


def test_a_normalization_up_to_255_is_noted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_mnp.cli.scan.command.audit", reporting("clean"))
    report = scan(options(mean=(85.0,), std=(51.0,)))
    assert report.warnings[1] == (
        "the normalization of the images, from the options, is on the scale 0 to 255 and was "
        "divided by 255: mean 0.333333, std 0.2. If training had another, give --mean and --std"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("missing.pt --images images", "`WEIGHTS` to be an existing file, but got missing.pt"),
        ("model.ckpt --images nowhere", "`--images` to be a folder, but got nowhere"),
        ("model.ckpt --images images --arch resnet18", "Check the architecture"),
        ("model.ckpt --images images --key ema", "`key` to lead to a state dict"),
        ("model.ckpt --images images --purify model.ckpt", "`--purify` not to exist"),
        ("model.ckpt --images images --purify out.onnx", "`--purify` to end in one of"),
        ("model.ckpt --images images --out model.ckpt/a", "`--out` to be where files can be"),
        (
            "model.ckpt --images images --out taken",
            "reports of other programs, but it holds taken/report.json",
        ),
        ("model.ckpt --images images", "no usual one for 1 channels"),
        (
            "model.ckpt --images images --device cuda:99",
            "`--device` to be a device that is there, such as cpu or cuda, but got 'cuda:99', and "
            "PyTorch finds no GPU",
        ),
        ("model.ckpt --images images --device gpu", "cpu or cuda, but got 'gpu'"),
        ("model.ckpt --images images --device hpu", "cpu or cuda, but got 'hpu'"),
        ("model.ckpt --images images --device meta", "cpu or cuda, but got 'meta'"),
    ],
)
def test_wrong_use_is_told_before_the_work(
    words: str,
    message: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("lightning_mnp.cli.scan.command.audit", None)
    (folder / "taken").mkdir()
    (folder / "taken" / "report.json").write_text("{}")
    before = sorted(folder.rglob("*"))
    normal = [] if words.endswith("images") else ["--mean=0.33", "--std=0.33"]
    assert main(["scan", *words.split(), *normal]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert message in told
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("schema", [0, 2])
def test_reports_of_another_version_are_replaced(
    schema: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_mnp.cli.scan.command.audit", reporting("clean"))
    earlier = {**DefenseReport("backdoored").to_dict(), "schema": schema, "new": 1}
    Path("report.json").write_text(json.dumps(earlier))
    Path("report.html").write_text("an earlier page")
    assert main(WORDS) == 0
    assert DefenseReport.load("report.json").verdict == "clean"
    assert Path("report.html").read_text().startswith("<!DOCTYPE html>")


def test_images_of_a_size_that_the_network_cannot_take_end_the_scan_of_that_file_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lightning_mnp.cli.scan.command.audit", reporting("clean"))
    torch.save(build_network("squeezenet1_1", CLASSES).state_dict(), "large.pt")
    weights = trained_resnet18().state_dict()
    weights["conv1.weight"] = weights["conv1.weight"].expand(-1, 3, -1, -1) / 3
    torch.save(weights, "small.pt")
    Path("flat").mkdir()
    for path in sorted(Path("images").rglob("*.png"))[::5]:
        path.rename(Path("flat", path.name))
    words = ["--images=flat", "--mean=0.33,0.33,0.33", "--std=0.33,0.33,0.33", "--out=new"]
    assert main(["scan", "large.pt", "small.pt", *words]) == 2
    out, told = capsys.readouterr()
    assert "error: `--images`, read as 8 x 8 pixels (`--size` sets another side): Exp" in told
    assert "Expected the model to take images of shape (3, 8, 8)" in told
    assert out.partition("small.pt:\n")[2].startswith("CLEAN")


def test_several_files_in_the_folder_of_the_reports(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_mnp.cli.scan.command.audit", reporting("clean"))
    Path("again.ckpt").write_bytes(Path("model.ckpt").read_bytes())
    assert main(["scan", "again.ckpt", *WORDS[1:]]) == 0
    for name in ("again.ckpt", "model.ckpt"):
        assert DefenseReport.load(f"{name}-report/report.json").verdict == "clean"


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (["a/b", "a-b"], ["a-b", "a-b-1"]),
        (["a/b", "a-b", "a-b-1"], ["a-b", "a-b-2", "a-b-1"]),
        (["a-b-1", "a/b", "a-b", "a//b"], ["a-b-1", "a-b", "a-b-2", "a-b-3"]),
        (["a/b-1", "a-b-1", "a/b", "a-b"], ["a-b-1", "a-b-1-1", "a-b", "a-b-2"]),
        (
            ["taken", "taken-report", "./taken"],
            ["taken-report", "taken-report-1", "taken-report-2"],
        ),
        (["free", "./free", ".//free"], ["free", "free-2", "free-3"]),
        (["both", "both-report"], ["both-report-report", "both-report-report-1"]),
    ],
)
def test_every_file_has_a_folder_of_its_own(
    files: list[str], named: list[str], tmp_path: Path
) -> None:
    for name in ("taken", "free-1", "both", "both-report"):
        (tmp_path / name).write_bytes(b"weights")
    first, *others = files
    asked = ScanOptions(first, Path("images"), out=tmp_path, others=tuple(others))
    found = _one_by_one(asked)
    assert [each.weights for each in found] == files
    assert [each.out.name for each in found] == named


def test_an_interrupt_ends_with_130(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: Any, **others: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_mnp.cli.scan.command.audit", interrupt)
    assert (
        main(["scan", "model.ckpt", "--images", "images", "--mean", "0.33", "--std", "0.33"]) == 130
    )
    told = "Scanning cifar_resnet18: 40 images of 8 x 8 pixels, 4 classes\ninterrupted\n"
    assert capsys.readouterr().err == told


def test_debugging_shows_where_an_error_comes_from(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_MNP_DEBUG", "1")
    with pytest.raises(ValueError, match="to be an existing file"):
        main(["scan", "missing.pt", "--images", "images"])

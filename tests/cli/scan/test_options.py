from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

from lightning_mnp.cli.scan.options import ScanOptions, parse_options


def test_options_are_what_was_written() -> None:
    words = "model.pt --images clean --arch timm/resnet18 --size 64 --mean 0.5,0.4,0.3 --std 1,1,2"
    words += " --labels labels.csv --classes 7 --key ema --count 90 --seed 3 --device cuda"
    words += " --purify out.pt --out reports --format sarif"
    assert parse_options(words.split()) == ScanOptions(
        weights="model.pt",
        images=Path("clean"),
        arch="timm/resnet18",
        labels=Path("labels.csv"),
        size=64,
        mean=(0.5, 0.4, 0.3),
        std=(1.0, 1.0, 2.0),
        classes=7,
        key="ema",
        count=90,
        seed=3,
        device="cuda",
        purify=Path("out.pt"),
        out=Path("reports"),
        format="sarif",
    )


def test_what_is_left_out_has_the_default_of_the_class() -> None:
    found = parse_options(["model.pt", "--images", "clean"])
    assert found == ScanOptions("model.pt", Path("clean"))


def test_several_files_are_named_once() -> None:
    found = parse_options(["--images", "clean", "a.pt", "b.pt", "a.pt"])
    assert found == ScanOptions("a.pt", Path("clean"), others=("b.pt",))


def test_paths_may_begin_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    home = tmp_path / "home"
    words = ["--images=~/clean", "--labels=~/labels.csv", "--out=~/reports"]
    assert parse_options(["~/a.pt", *words, "--purify=~/out.pt"]) == ScanOptions(
        weights=str(home / "a.pt"),
        images=home / "clean",
        labels=home / "labels.csv",
        purify=home / "out.pt",
        out=home / "reports",
    )
    again = parse_options(["~/a.pt", str(home / "a.pt"), "~/b.pt", *words])
    assert again.others == (str(home / "b.pt"),)


def test_help_is_short(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        parse_options(["--help"])
    assert stop.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) <= 40


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_options(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"lightning-mnp {version('lightning-mnp')}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("model.pt", "expected --images FOLDER with clean images, but got none"),
        ("model.pt --imags clean", "--imags clean. Did you mean --images?"),
        ("--images clean", "required: WEIGHTS"),
        ("model.pt --images a --size 0", "a whole number of at least 1, but got '0'"),
        ("model.pt --images a --mean 1;2", "such as 0.5,0.5,0.5, but got '1;2'"),
        ("model.pt --images a --mean nan,0.5,1 --std 1,1,1", "finite numbers with commas between"),
        ("model.pt --images a --mean 0,0,0 --std 1,inf,1", "0.5,0.5,0.5, but got '1,inf,1'"),
        ("model.pt --images a --mean 0.5", "--mean and --std together"),
        ("model.pt --images a --format xml", "invalid choice: 'xml'"),
        ("a.pt b.pt c.pt --images a --format json", "expected one file with --purify, --format"),
        ("a.pt b.pt c.pt --images a --purify d.pt", "but got 3; call the command for each"),
        ("model.pt --images a \x1b[2J", "unrecognized arguments: ?[2J"),
    ],
)
def test_the_error_comes_first_and_then_the_usage(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_options(words.split())
    assert stop.value.code == 2
    first, *rest = capsys.readouterr().err.splitlines()
    assert first.startswith("error: ")
    assert message in first
    assert rest[0].startswith("usage: lightning-mnp scan")

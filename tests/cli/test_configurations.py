from __future__ import annotations

import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY

from lightning_mnp.cli import configurations
from lightning_mnp.cli.command_line import main
from lightning_mnp.cli.configurations import find_configuration, with_found_configurations

AUDIT = str(REPOSITORY / "examples" / "audit-digits.yaml")


def test_every_yaml_file_of_the_examples_is_found() -> None:
    folder = REPOSITORY / "examples"
    paths = sorted(folder.rglob("*.yaml"))
    assert len(paths) > 40
    for path in paths:
        name = str(path.relative_to(folder)).removesuffix(".yaml").replace("\\", "/")
        assert find_configuration(name) == path


def test_an_installed_package_has_them_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, beside = tmp_path / "lightning_mnp" / "examples", tmp_path / "examples"
    for folder in (package, beside):  # what lies beside an installed package is another's
        folder.mkdir(parents=True)
        (folder / "one.yaml").touch()
    monkeypatch.setattr(configurations, "_FOLDERS", (package, beside))
    assert find_configuration("one") == package / "one.yaml"


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("audit --config package:audit-digits -x", f"audit --config {AUDIT} -x"),
        ("--config=package:audit-digits", f"--config={AUDIT}"),
        ("-c package:audit-digits", f"-c {AUDIT}"),
        ("--mnp package:audit-digits", f"--mnp {AUDIT}"),
        # All else stays as it is.
        ("audit --config mine.yaml", "audit --config mine.yaml"),
        ("package:audit-digits", "package:audit-digits"),
        ("--ckpt_path package:audit-digits", "--ckpt_path package:audit-digits"),
        ("--ckpt_path=package:audit-digits", "--ckpt_path=package:audit-digits"),
    ],
)
def test_words_of_a_command_line(words: str, found: str) -> None:
    assert with_found_configurations(words.split()) == found.split()


@pytest.mark.parametrize("name", ["../pyproject", "/etc/passwd", "", "audit-digits.yaml"])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="to name a configuration of the package"):
        find_configuration(name)


def test_an_unknown_name_is_told_with_the_known_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-mnp"])
    assert main(["audit", "--config", "package:audit-cifar"]) == 2
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert first == (
        "error: Expected `package:NAME` to name a configuration of the package, but got "
        "'package:audit-cifar'. Did you mean audit-cifar10?"
    )
    assert second.startswith("There are: attacks/adaptive, ")
    assert second.endswith(", mnp-paper.")

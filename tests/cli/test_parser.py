from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import pytest
from lightning.pytorch import LightningModule

from lightning_mnp.cli.parser import MNPParser
from lightning_mnp.models import Classifier


@pytest.fixture(scope="module")
def parser() -> MNPParser:
    made = MNPParser(prog="lightning-mnp [options] audit")
    made.add_argument("--ckpt_path", type=str)
    made.add_argument("--trainer.max_epochs", type=int, help="Most epochs.")
    made.add_argument("--trainer.precision", type=str, default="32-true", help="Long: a. Very.")
    made.add_argument(
        "--mnp.runs", type=int, default=2, help="Runs (Eq. 6); more are better. Or so."
    )
    rule = Literal["signals", "ratio"]
    made.add_argument("--mnp.rule", type=rule, default="signals", help="How to judge.")
    made.add_argument("--mnp.linear", type=bool, default=False, help="Whether ``linear`` ones go.")
    made.add_subclass_arguments(LightningModule, "model", required=False)
    return made


@pytest.fixture(autouse=True)
def hinted_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of a user's own."""
    (tmp_path / "hinted_models.py").write_text(
        "from lightning_mnp.models import Classifier\n"
        "class Net(Classifier): pass\n"
        "class Other: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "hinted_models", raising=False)


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("--ckpt_pth=a", "Did you mean --ckpt_path?"),
        (
            "--model=lightning_mnp.models.Classifierr",
            "Did you mean lightning_mnp.models.Classifier?",
        ),
        ("--model=Classifierr", "Did you mean lightning_mnp.models.Classifier?"),
        ("--model=hinted_models.Nett", "Did you mean hinted_models.Net?"),
        ("--model=hinted_model.Net", "Did you mean hinted_models.Net?"),
        ("--model=hinted_models.Other", ""),
        ("--mnp.rule=signal", "Did you mean signals?"),
        ("--mnp.runs=many", ""),
        ("--nothing_like_it=1", ""),
    ],
)
def test_the_error_comes_first_then_what_was_meant_then_the_usage(
    word: str, hint: str, parser: MNPParser, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parser.parse_args([word])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("error: ")
    assert lines[-1].startswith("usage: lightning-mnp audit --config FILE [options]; `lightning-")
    assert (lines[-2] == hint) if hint else not lines[-2].startswith("Did you")
    assert len(lines) == 2 + bool(hint)


def test_a_misspelled_argument_of_a_class(
    parser: MNPParser, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{Classifier.__module__}.{Classifier.__qualname__}"
    with pytest.raises(SystemExit):
        parser.parse_args([f"--model={name}", "--model.widthh=3"])
    assert "\nDid you mean width?\n" in capsys.readouterr().err


def test_control_characters_are_escaped(
    parser: MNPParser, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parser.parse_args(["--mnp.runs=\x1b[2J"])
    assert "\x1b" not in capsys.readouterr().err


def test_help_shows_the_first_sentence_and_the_default(parser: MNPParser) -> None:
    lines = [" ".join(line.split()) for line in parser.format_help().splitlines()]
    assert lines[0] == "usage: lightning-mnp audit --config FILE [options]"
    assert "--mnp.runs N Runs (Eq. 6) (2)" in lines
    assert "--mnp.linear BOOL Whether `linear` ones go (false)" in lines
    assert "--mnp.rule {signals,ratio} How to judge (signals)" in lines
    assert "--model CLASS Your LightningModule, by its class path." in lines
    assert not any("max_epochs" in line for line in lines)
    assert any("32-true, bf16-mixed or 16-mixed" in line for line in lines)
    assert "--trainer.max_epochs" in {
        name
        for action in parser._actions
        if action.help == "Most epochs."
        for name in action.option_strings
    }

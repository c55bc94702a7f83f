from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

from lightning_mnp.cli.entry import main
from lightning_mnp.cli.words import COMMANDS


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lightning-mnp {version('lightning-mnp')}\n"
    for words in ([], ["--help"], ["-h"]):
        assert main(words) == 0
        assert "\n  scan " in capsys.readouterr().out


def test_help_names_every_command() -> None:
    from lightning_mnp.cli.command_line import CONFIGURED

    assert set(COMMANDS) == {"scan", "benchmark", *CONFIGURED}


def test_an_unknown_command_is_told_with_the_most_similar_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["\x1bscna"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: expected a command, but got '?scna'. Did you mean scan?\nusage:")


def test_help_and_version_import_no_pytorch() -> None:
    """They answer within a second only without it."""
    program = (
        "import sys; from lightning_mnp.cli.entry import main\n"
        "main(['--version']); main(['--help'])\n"
        "try: main(['scan', '--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'lightning', 'numpy', 'rich', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("words", "handed"), [(["audit", "-x"], ["audit", "-x"]), (["-c"], ["-c"])]
)
def test_other_commands_are_handed_on(
    words: list[str], handed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_mnp.cli.command_line.main", lambda args: (args, 7)[1])
    assert main(words) == 7

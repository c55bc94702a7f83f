"""The documentation's code runs, its commands are understood, its files and links exist."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from helpers import REPOSITORY

from lightning_mnp import MNPConfig
from lightning_mnp.cli.command_line import main
from lightning_mnp.cli.scan.options import parse_options

DOCS = REPOSITORY / "docs"
PAGES = [DOCS / "index.md", *sorted((DOCS / "tutorial").glob("*.md"))]
PAGES += sorted((DOCS / "how-to").glob("*.md"))
TEXTS = [*PAGES, *sorted((DOCS / "explanation").glob("*.md")), DOCS / "reference/exit-codes.md"]
TEXTS += [*sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "research").glob("*.md"))]

# An HTML comment `<!-- setup ... -->` has what a page takes for granted; blocks after a comment
# `<!-- not run: reason -->` are left out.
_PIECES = re.compile(
    r"<!-- setup\n(?P<setup>.*?)^-->"
    r"|(?P<skip><!-- not run: [^\n]+ -->\n)?^```python\n(?P<block>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
_COMMANDS = re.compile(r"^```bash\n(.*?)^```$", re.DOTALL | re.MULTILINE)

# The same code on a smaller scale; `SHORT` has the options of a defense of few steps.
SHORT = MNPConfig().changed(
    {
        "suppression.runs": 1,
        "suppression.more_runs": 0,
        "suppression.epochs": 1,
        "pruning.amount": 0.005,
        "pruning.soft_mask_steps": 1,
        "pruning.reaudit": False,
        "verdict.most_classes": 3,
    }
)
SHORTER = {
    "width=8": "width=2",
    "image_size=16": "image_size=8, defense_size=20",
    "patch_size=3": "patch_size=2",
    "MNPConfig(seed=0)": "SHORT",
    'MNPCallback(when="never")': 'MNPCallback(when="never", config=SHORT)',
    'when="always", seed=0': 'when="always", config=SHORT',
}


def code(page: Path) -> str:
    """All code of a page, with line numbers kept."""
    text = page.read_text("utf-8")
    lines = [""] * (text.count("\n") + 1)
    for piece in _PIECES.finditer(text):
        content = piece["setup"] if piece["setup"] is not None else piece["block"]
        if piece["skip"]:
            continue
        first = text.count("\n", 0, piece.start("setup" if piece["block"] is None else "block"))
        for number, line in enumerate(content.splitlines()):
            lines[first + number] = line
    source = "\n".join(lines)
    for old, new in SHORTER.items():
        source = source.replace(old, new)
    return source


def name(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


WITH_CODE = [page for page in PAGES if code(page).strip()]


class QuickTrainer(L.Trainer):
    """A Trainer that does a part of what it is asked for, without a word."""

    def __init__(self, **options: Any) -> None:
        if options.get("max_epochs") != -1:
            options["max_epochs"] = 1
            options["limit_train_batches"] = 2
        options["limit_val_batches"] = 0
        options["limit_test_batches"] = 1
        options.setdefault("logger", False)
        if not any(type(c).__name__ == "ModelCheckpoint" for c in options.get("callbacks", [])):
            options["enable_checkpointing"] = False
        options.update(accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
        super().__init__(**options)


@pytest.mark.usefixtures("short_searches")
@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:MNPCallback. verdict")
@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(L, "Trainer", QuickTrainer)
    exec(compile(code(page), str(page), "exec"), {"__name__": "page", "SHORT": SHORT})


def test_pages_with_code_are_found() -> None:
    without = [name(page) for page in PAGES if page not in WITH_CODE]
    assert without == [
        *("docs/how-to/audit-a-checkpoint.md", "docs/how-to/index.md"),
        "docs/how-to/scan-a-file.md",
    ]


@pytest.mark.parametrize("text", SHORTER)
def test_what_is_made_shorter_is_still_there(text: str) -> None:
    assert any(text in page.read_text("utf-8") for page in PAGES)


def commands() -> list[Any]:
    found: dict[str, Path] = {}
    for page in TEXTS:
        for block in _COMMANDS.findall(page.read_text("utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                for part in re.split(r"&&|\|\||>", line):
                    words = shlex.split(part, comments=True)
                    if words[:1] == ["lightning-mnp"]:
                        found.setdefault(shlex.join(words), page)
    return [pytest.param(command, id=command[:60]) for command in found]


@pytest.mark.parametrize("command", commands())
def test_command_is_understood(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All but `audit.yaml`, which stands for a file of the reader's."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setattr(sys, "argv", ["lightning-mnp"])
    words = [
        "examples/audit-cifar10.yaml" if word == "audit.yaml" else word
        for word in shlex.split(command)[1:]
    ]
    if words[0] == "scan":
        assert parse_options(words[1:]).images
        return
    with pytest.raises(SystemExit) as stop:
        main([*words, "--print_config"])
    assert stop.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize("page", TEXTS, ids=name)
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    names = set(re.findall(r"\b(?:examples|benchmarks|docs|research)/[\w./-]+\.\w+", text))
    names |= set(re.findall(r"\btests/[\w./-]+\.py", text))
    assert not [name for name in names if not (REPOSITORY / name).is_file()]

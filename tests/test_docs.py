"""The documentation's code runs, its commands are understood, its files and links exist."""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml
from helpers import REPOSITORY
from markdown_it import MarkdownIt
from markdown_it.token import Token

from lightning_mnp import MNPConfig
from lightning_mnp.cli.command_line import main
from lightning_mnp.cli.scan.options import parse_options
from lightning_mnp.signals.registry import registered

DOCS = REPOSITORY / "docs"
PUBLISHED = sorted(set(DOCS.rglob("*.md")) - set((DOCS / "reference" / "api").glob("*.md")))
PAGES = [REPOSITORY / "README.md", *PUBLISHED]  # whose Python runs
TEXTS = [*PUBLISHED, *sorted(REPOSITORY.glob("*.md"))]
TEXTS += sorted((REPOSITORY / "research").glob("*.md"))

# An HTML comment `<!-- setup ... -->` has what a page takes for granted; blocks after a comment
# `<!-- not run: reason -->` are left out.
_PIECES = re.compile(
    r"<!-- setup\n(?P<setup>.*?)^-->"
    r"|(?P<skip><!-- not run: [^\n]+ -->\n)?^```python\n(?P<block>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
# What the README takes for granted stands here: that page is read as it is.
SETUPS = {
    REPOSITORY / "README.md": "from distributed_script import data, small_network; "
    "from helpers import UserModule; model = UserModule(small_network().train()); "
    "clean_loader = datamodule = data()"
}
_MARKDOWN = MarkdownIt("commonmark").enable("table")

# The same code on a smaller scale; `SHORT` has the options of a defense of few steps.
SHORT = MNPConfig().changed(
    {
        "suppression.runs": 1,
        "suppression.more_runs": 0,
        "suppression.epochs": 1,
        "pruning.amount": 0.005,
        "pruning.soft_mask_steps": 1,
        "pruning.tuning_steps": 1,
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
    "clean_loader, seed=0)": "clean_loader, config=SHORT)",
    "MNPCallback(defense_loader=clean_loader)": (
        "MNPCallback(defense_loader=clean_loader, config=SHORT)"
    ),
    'when="always", seed=0': 'when="always", config=SHORT',
}


def code(page: Path) -> str:
    """All code of a page, with line numbers kept."""
    text = page.read_text("utf-8")
    lines = [""] * (text.count("\n") + 1)
    lines[0] = SETUPS.get(page, "")
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


@functools.cache
def tokens(page: Path) -> list[Token]:
    return _MARKDOWN.parse(page.read_text("utf-8"))


def fences(page: Path) -> list[Token]:
    """All code blocks of a page, also those in lists; `info` is the language."""
    return [token for token in tokens(page) if token.type == "fence"]


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


@pytest.fixture
def own_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registries that forget what a page adds to them."""
    attacks = importlib.import_module("lightning_mnp.attacks.registry")
    monkeypatch.setattr(attacks, "_REGISTERED", dict(attacks._REGISTERED))
    baselines = importlib.import_module("lightning_mnp.baselines.registry")
    for kind in ("_DEFENSES", "_DETECTORS"):
        monkeypatch.setattr(baselines, kind, copy.deepcopy(getattr(baselines, kind)))


@pytest.mark.usefixtures("own_registries", "short_searches")
@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:MNPCallback. verdict")
@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(L, "Trainer", QuickTrainer)
    exec(compile(code(page), str(page), "exec"), {"__name__": "page", "SHORT": SHORT})


def test_no_python_is_overlooked() -> None:
    """Neither in a list, where `_PIECES` does not see it, nor on a page that is not run."""
    for page in TEXTS:
        blocks = [piece for piece in _PIECES.finditer(page.read_text("utf-8")) if piece["block"]]
        found = len([fence for fence in fences(page) if fence.info == "python"])
        assert found == len(blocks), name(page)
        assert page in WITH_CODE or not found, name(page)


@pytest.mark.parametrize("page", TEXTS, ids=name)
def test_other_code_can_be_read(page: Path) -> None:
    readers = {
        "bash": lambda text: list(simple_commands(text)),
        "json": json.loads,
        "yaml": yaml.safe_load,
    }
    for fence in fences(page):
        if fence.info in readers:
            assert readers[fence.info](fence.content), fence.content
        else:  # a directive of the documentation, or one of these
            assert re.fullmatch(r"python|text|\{\w[\w-]*\}", fence.info), (
                f"of which language? {fence}"
            )
    indented = [token.content for token in tokens(page) if token.type == "code_block"]
    assert not [text for text in indented if re.match(r"(python|pip|lightning-mnp)\b", text)]


@pytest.mark.parametrize("text", SHORTER)
def test_what_is_made_shorter_is_still_there(text: str) -> None:
    assert any(text in page.read_text("utf-8") for page in PAGES)


def simple_commands(block: str) -> Iterator[list[str]]:
    """Each command of a bash block as its words, without redirections and variables."""
    for line in block.replace("\\\n", " ").splitlines():
        words: list[str] = []
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        for word in [*lexer, ";"]:
            if set(word) & set("();|&"):
                if words and words[-1] not in ("<", ">", ">>"):
                    yield words
                words = []
            elif words[-1:] and words[-1] in ("<", ">", ">>"):
                words.pop()
            elif words or not re.match(r"\w+=", word):
                words.append(word)


def commands() -> dict[str, list[str]]:
    """Every command of the documentation, once."""
    blocks = [fence.content for page in TEXTS for fence in fences(page) if fence.info == "bash"]
    found = [words for block in blocks for words in simple_commands(block)]
    return {shlex.join(words): words for words in found}


COMMANDS = commands()
OURS = {key: words for key, words in COMMANDS.items() if words[0] == "lightning-mnp"}
PROGRAMS = {key: words for key, words in COMMANDS.items() if words[0] == "python"}
del PROGRAMS["python -m venv .venv"]


@pytest.mark.parametrize("words", OURS.values(), ids=[key[:60] for key in OURS])
def test_command_is_understood(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but `audit.yaml`, which stands for a file of the reader's."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setattr(sys, "argv", ["lightning-mnp"])
    words = ["examples/audit-cifar10.yaml" if word == "audit.yaml" else word for word in words[1:]]
    if words[0] == "scan":
        assert parse_options(words[1:]).images
        return
    with pytest.raises(SystemExit) as stop:
        main([*words, "--print_config"])
    assert stop.value.code == 0, capsys.readouterr().err


class UnderstoodError(Exception):
    """The arguments of a program are right."""


@pytest.mark.filterwarnings("ignore:.* found in sys.modules after import:RuntimeWarning")
@pytest.mark.parametrize("words", PROGRAMS.values(), ids=[key[:60] for key in PROGRAMS])
def test_arguments_of_a_program_are_understood(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the repository are called, up to where they have read their arguments."""
    parse = argparse.ArgumentParser.parse_args

    def parse_only(*arguments: Any) -> None:
        parse(*arguments)
        raise UnderstoodError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.chdir(REPOSITORY)
    first = 2 if words[1] == "-m" else 1
    monkeypatch.setattr(sys, "argv", words[first:])
    run = runpy.run_module if first == 2 else runpy.run_path
    with pytest.raises(UnderstoodError):
        run(words[first], run_name="__main__")


def test_other_commands_are_known() -> None:
    """Tools of CONTRIBUTING.md and scripts of the repository; extras that can be installed."""
    tools = {
        *("lightning-mnp", "python", "pip", "pytest", "torchrun", "srun", ".", "exit", "git", "cd"),
        *("ruff", "codespell", "mypy", "lint-imports", "sphinx-build"),
    }
    project = (REPOSITORY / "pyproject.toml").read_text("utf-8")
    for command, words in COMMANDS.items():
        assert words[0] in tools or (REPOSITORY / words[0]).is_file(), command
        for extras in re.findall(r"\[([\w,]+)\]", command) if words[0] == "pip" else ():
            for extra in extras.split(","):
                assert f"\n{extra} = [\n" in project, command


@pytest.mark.parametrize("page", TEXTS, ids=name)
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    names = set(re.findall(r"\b(?:examples|benchmarks|docs|research)/[\w./-]+\.\w+", text))
    names |= set(re.findall(r"\btests/[\w./-]+\.py", text))
    assert not [name for name in names if not (REPOSITORY / name).is_file()]


@pytest.fixture(scope="module")
def check_links() -> dict[str, Any]:
    return runpy.run_path(str(REPOSITORY / ".ci" / "check_links.py"))


@pytest.mark.parametrize("page", PUBLISHED, ids=name)
def test_links_lead_somewhere(page: Path, check_links: dict[str, Any]) -> None:
    assert not list(check_links["faults"](page))


def test_words_stand_in_the_glossary() -> None:
    entries = {
        line.lower()
        for fence in fences(DOCS / "glossary.md")
        for line in fence.content.splitlines()
        if line and not line.startswith(" ")
    }
    assert {*registered()} <= entries
    for page in PUBLISHED:
        for shown, entry in re.findall(
            r"\{term\}`([^`<]+?)(?: <(.+?)>)?`", page.read_text("utf-8")
        ):
            assert (entry or shown).lower() in entries, (name(page), shown)


def test_the_documentation_can_be_published() -> None:
    """Read the Docs installs what it needs, PyTorch from an index of its own, and builds it."""
    settings = yaml.safe_load((REPOSITORY / ".readthedocs.yaml").read_text("utf-8"))
    assert settings["version"] == 2
    assert settings["sphinx"] == {"configuration": "docs/conf.py", "fail_on_warning": True}
    torch, package = settings["build"]["jobs"]["install"]
    assert shlex.split(torch)[:3] == ["pip", "install", "--no-deps"]
    assert shlex.split(torch)[-2:] == ["torch", "torchvision"]
    assert shlex.split(package) == ["pip", "install", ".[docs]"]

"""The parser of the commands that take a configuration: short help, and errors that help."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser

from lightning_mnp.checkpoints.printable import printable
from lightning_mnp.cli.words import similar

__all__ = ["MNPParser"]

_MOST_LETTERS = 2000
_ROOMS = ("models", "data", "attacks")

# Options of Lightning's Trainer that have a meaning for commands that do not train.
_TRAINER = ("accelerator", "devices", "precision", "logger", "enable_progress_bar")
_WITHOUT_TRAINING = ("audit", "defend", "calibrate")
# An audit makes no masks and prunes nothing.
_NOT_IN = {"audit": ("mnp.masks", "mnp.pruning"), "calibrate": ("mnp.masks", "mnp.pruning")}
_TITLES = {"trainer": "Lightning's Trainer", "model": "The model", "data": "The images"}
_OWN_WORDS = {
    "config": "File with options, as YAML, or package:NAME for one that comes with the package.",
    "print_config": "Print all options as YAML and end.",
    "seed_everything": "Seed of what the method does not draw by itself.",
    "trainer.accelerator": "cpu, gpu, mps or auto.",
    "trainer.devices": "Number of devices, or which ones.",
    "trainer.precision": "32-true, bf16-mixed or another precision of Lightning.",
    "trainer.logger": "false for no logger, or a class path.",
    "trainer.enable_progress_bar": "false for no progress bar.",
    "model": "Your LightningModule, as a class path.",
    "data": "Your LightningDataModule, as a class path.",
    "model.help": "List the options of a model.",
    "data.help": "List the options of a datamodule.",
}


_FIRST_SENTENCE = re.compile(r"(?<=\.)\s(?=[A-Z])|;\s")


class _ShortHelp(DefaultHelpFormatter):
    """Shows the first sentence of what is known of an option, and its default."""

    def _get_help_string(self, action: argparse.Action) -> str:
        known = action.help or ""
        told = _OWN_WORDS.get(action.dest, _FIRST_SENTENCE.split(known, maxsplit=1)[0])
        if action.required:
            return f"{told} Required."
        shows = action.dest not in _OWN_WORDS and action.default not in (None, argparse.SUPPRESS)
        return f"{told} (%(default)s)" if shows and action.option_strings else told


class MNPParser(LightningArgumentParser):
    """LightningCLI's parser with short help, and errors that come before the usage."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", _ShortHelp)
        super().__init__(*args, **kwargs)

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Return the help, without options that the command has no use for."""
        command = self.prog.split()[-1]
        groups: dict[str, Any] = self.groups or {}
        for name, title in _TITLES.items():
            if name in groups:
                groups[name].title = title
        if command != self.prog:
            self.usage = _usage(self)
        names = [action.dest for action in self._actions]
        hidden = [
            (action, action.help) for action in self._actions if _is_hidden(action, command, names)
        ]
        for action, _ in hidden:
            action.help = argparse.SUPPRESS
        try:
            return str(super().format_help(*args, **kwargs))
        finally:
            for action, told in hidden:
                action.help = told

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and what was probably meant, then the usage, and end with code 2.

        Args:
            message: What is wrong.
            ex: The exception that says so.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        lines = [printable(line, _MOST_LETTERS) for line in message.splitlines()]
        told = "\n".join(lines)
        hint = _hint(message, parser).strip()
        prog = parser.prog.replace(" [options]", "")
        for part in (
            f"error: {told}",
            *([hint] if hint else []),
            f"usage: {_usage(parser)}; `{prog} --help` lists the options",
        ):
            print(part, file=sys.stderr)
        self.exit(2)
        raise AssertionError("unreachable")


def _usage(parser: argparse.ArgumentParser) -> str:
    return f"{parser.prog.replace(' [options]', '')} --config FILE [options]"


def _is_hidden(action: argparse.Action, command: str, names: Sequence[str]) -> bool:
    """Return whether the help of a command does without an option."""
    room, _, name = action.dest.partition(".")
    unused = room == "trainer" and name not in _TRAINER and command in _WITHOUT_TRAINING
    unused = unused or action.dest.startswith(_NOT_IN.get(command, ("no option",)))
    is_group = room == "mnp" and any(other.startswith(f"{action.dest}.") for other in names)
    return unused or is_group


def _hint(message: str, parser: argparse.ArgumentParser) -> str:
    """Return the option, argument or class that was probably meant, as a question."""
    options = {name for action in parser._actions for name in action.option_strings}
    if found := re.search(r"(?:unrecognized arguments:|subcommand) \W?(--[\w.]+)", message):
        return similar(found[1], options)
    if found := re.search(r"class_path '([\w.]+)':\s+Option '(\w+)' is not accepted", message):
        return similar(found[2], _arguments(found[1]))
    public = {
        name.rpartition(".")[2]: name
        for room in _ROOMS
        for name in (f"lightning_mnp.{room}.{each}" for each in _exported(room))
    }
    for word in re.findall(r"[\w.]*lightning_mnp\.[\w.]+|(?<=Given value: )\w+", message):
        if word not in public.values() and (hint := similar(word.rpartition(".")[2], public)):
            meant = hint.removeprefix(" Did you mean ").removesuffix("?")
            return f" Did you mean {public[meant]}?"
    return ""


def _exported(room: str) -> list[str]:
    return list(import_module(f"lightning_mnp.{room}").__all__)


def _arguments(class_path: str) -> list[str]:
    """Return the names of the arguments of a class that the parser has found."""
    module, _, name = class_path.rpartition(".")
    return list(inspect.signature(getattr(import_module(module), name)).parameters)

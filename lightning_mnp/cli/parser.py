"""The parser of the commands that take a configuration: short help, and errors that help."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser

from lightning_mnp.checkpoints.printable import printable
from lightning_mnp.cli.hints import find_hint, named_command, plain_message
from lightning_mnp.cli.words import COMMANDS

__all__ = ["MNPParser", "end_with_error"]

_MOST_LETTERS = 2000
_OPTIONS = "--config FILE [options]"
# Commands that need no file.
_OTHER_OPTIONS = {
    **dict.fromkeys(("demo", "report"), "[options]"),
    "benchmark": "{run,report} [options]",
}

# Options of Lightning's Trainer that have a meaning for commands that do not train.
_TRAINER = ("accelerator", "devices", "precision", "logger", "enable_progress_bar")
_WITHOUT_TRAINING = ("audit", "defend", "calibrate")
# An audit makes no masks and prunes nothing.
_NOT_IN = {"audit": ("mnp.masks", "mnp.pruning"), "calibrate": ("mnp.masks", "mnp.pruning")}
_TITLES = {"trainer": "Lightning's Trainer", "model": "The model", "data": "The images"}
_OWN_WORDS = {
    "config": "File with options, as YAML, or package:NAME for one that comes with the package.",
    "print_config": "Print all options as YAML and end.",
    "seed_everything": "Seed of everything but the method.",
    "trainer.accelerator": "cpu, gpu, mps or auto.",
    "trainer.devices": "Number of devices, or which ones.",
    "trainer.precision": "32-true, bf16-mixed or 16-mixed.",
    "trainer.logger": "false for no logger, or a class path.",
    "trainer.enable_progress_bar": "false for no progress bar.",
    "model": "Your LightningModule, by its class path.",
    "data": "Your datamodule, by its class path.",
    "model.help": "List the options of a model.",
    "data.help": "List the options of a datamodule.",
    "mnp.augment": "Shift and mirror clean images: `none`, `crop` or `crop-flip`.",
    "mnp.verdict.saliency": "What the ratio looks at: each output `map`, or `weight` (Eq. 11).",
    "mnp.filters.include": "Name patterns of layers to take (all).",
    "mnp.filters.exclude": "Name patterns of layers to leave out.",
    "mnp.verdict.rule": "Judge by the `signals`, or by the `ratio` of Eq. 8.",
    "mnp.pruning.removes": "What becomes zero: the output `map`, or weights of the `filter`.",
}
_OWN_VALUES = {
    "enable_progress_bar": "BOOL",
    **dict.fromkeys(("config", "ckpt_path", "output", "report", "state_file"), "FILE"),
    **dict.fromkeys(("model", "data", "help"), "CLASS"),
    "ckpt_paths": "FILE...",
    "include": "[NAME,...]",
    "exclude": "[NAME,...]",
}
_LEFT = 38  # columns for the names of options, so that nearly all fit

# Where the defaults of the demo come from is a file of the package.
_DEFAULTS_FROM = re.compile(r"default config file locations:\n(?:  .*\n)+\n")
_FIRST_SENTENCE = re.compile(r"(?<=\.)\s(?=[A-Z])|;\s")


class _ShortHelp(DefaultHelpFormatter):
    """Shows an option, the first sentence of what is known of it, and its default."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("max_help_position", _LEFT)
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """Return the names of an option without that which adds to a list, and its value."""
        names = [name for name in action.option_strings if not name.endswith("+")]
        if not names or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{', '.join(names)} {_value(action)}"

    def _get_help_string(self, action: argparse.Action) -> str:
        first = _FIRST_SENTENCE.split((action.help or "").replace("``", "`"), maxsplit=1)[0]
        told = _OWN_WORDS.get(action.dest, first)
        if action.required:
            return f"{told.rstrip('.')}. Required."
        default = action.default
        known = isinstance(default, (int, float, str)) and default != argparse.SUPPRESS
        if not known or (action.dest in _OWN_WORDS and not action.dest.startswith("mnp.")):
            return told
        shown = str(default).lower() if isinstance(default, bool) else default
        return f"{told.rstrip('.')} ({shown})"


def _value(action: argparse.Action) -> str:
    """Return what stands for the value of an option in its help."""
    name = action.dest.rpartition(".")[2]
    if name in _OWN_VALUES:
        return _OWN_VALUES[name]
    kind = type(action.default)
    if kind in (int, float):
        return "N" if kind is int else "X"
    if kind is bool:
        return "BOOL"
    choices = re.findall(r"\w+[-\w]*", str(action.metavar or ""))
    told = bool(choices) and all(f"`{word}`" in (action.help or "") for word in choices)
    return "WORD" if told else str(action.metavar or name.upper())


class MNPParser(LightningArgumentParser):
    """LightningCLI's parser with short help, and errors that come before the usage."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", _ShortHelp)
        super().__init__(*args, **kwargs)

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Return the help, without options that the command has no use for."""
        command = self.prog.split()[-1]
        groups: dict[str, Any] = self.groups or {}
        for name, title in {**_TITLES, command: "Files and network"}.items():
            if name in groups:
                groups[name].title = title
        if command != self.prog:
            self.usage = f"{_program(self)} {_options(command)}"
            what = COMMANDS[command]
            self.description = f"{what[0].upper()}{what[1:]}."
        names = [action.dest for action in self._actions]
        hidden = [
            (action, action.help) for action in self._actions if _is_hidden(action, command, names)
        ]
        for action, _ in hidden:
            action.help = argparse.SUPPRESS
        try:
            return _DEFAULTS_FROM.sub("", str(super().format_help(*args, **kwargs)))
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
        end_with_error(self, message, ex)


def end_with_error(
    parser: argparse.ArgumentParser, message: str, error: Exception | None = None
) -> NoReturn:
    """Print what is wrong and what was probably meant, then the usage, and end with code 2.

    Args:
        parser: The parser that was used.
        message: What is wrong.
        error: The exception that says so.
    """
    parser = getattr(error, "subcommand_parser", None) or parser
    hint, command = find_hint(message, parser), named_command(message)
    program = " ".join(filter(None, (_program(parser), command)))
    options = _options(program.split()[-1])
    usage = f"usage: {program} {options}; `{program} --help` lists the options"
    told = [f"error: {plain_message(message)}", *([hint] if hint else []), usage]
    for line in "\n".join(told).splitlines():
        print(printable(line, _MOST_LETTERS), file=sys.stderr)
    sys.exit(2)


def _options(command: str) -> str:
    return _OTHER_OPTIONS.get(command, _OPTIONS)


def _program(parser: argparse.ArgumentParser) -> str:
    return parser.prog.replace(" [options]", "")


def _is_hidden(action: argparse.Action, command: str, names: Sequence[str]) -> bool:
    """Return whether the help of a command does without an option."""
    room, _, name = action.dest.partition(".")
    unused = room == "trainer" and name not in _TRAINER and command in _WITHOUT_TRAINING
    unused = unused or action.dest.startswith(_NOT_IN.get(command, ("no option",)))
    is_group = room == "mnp" and any(other.startswith(f"{action.dest}.") for other in names)
    return unused or is_group

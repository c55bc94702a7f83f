"""Hints: an error of the parser in plain words, and what was probably meant."""

from __future__ import annotations

import argparse
import difflib
import inspect
import pkgutil
import re
from collections.abc import Iterable
from importlib import import_module

from lightning_mnp.cli.words import similar

__all__ = ["find_hint", "named_command", "plain_message"]

_ROOMS = ("models", "data", "attacks")
_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}

_KEY = r"^Parser key \"(?P<key>[\w.]+)\":\s+"
_VALUE = re.compile(_KEY + r"Expected an? (?P<kind>.+)\. Got value: (?P<value>.*)$", re.DOTALL)
_NO_CLASS = re.compile(
    _KEY + r"(?P<errors>.*?<class '[\w.]*?(?P<kind>\w+)'>.*)\n\s*Given value: (?P<value>.*)$",
    re.DOTALL,
)
_PROBLEM = re.compile(
    r"Problem with given class_path '(?P<path>[\w.]+)':\s+(?P<why>.*?)(?=\n\s*- Expected|$)",
    re.DOTALL,
)
_NOT_ACCEPTED = re.compile(r"Option '(?P<name>\w+)' is not accepted")
_UNKNOWN = re.compile(r"(?:unrecognized arguments: --|does not accept option \W?)(?P<name>[\w.]+)")
_REQUIRED = re.compile(
    r"(?<=arguments are required: )(?P<names>(?P<command>\w+)\.\w+(?:, (?P=command)\.\w+)*)$"
)
# A configuration that has a model and a data set, for commands that need them.
_EXAMPLES = {
    **dict.fromkeys(("audit", "defend", "calibrate"), "package:audit-cifar10"),
    **dict.fromkeys(("fit", "validate", "test"), "package:fit-cifar10-2core"),
}


def plain_message(message: str) -> str:
    """Return what is wrong with an argument, what it was, and what was expected.

    Args:
        message: What jsonargparse says.

    Returns:
        The same in one sentence, if the message is of a known form; else the message.

    Example:
        >>> plain_message('Parser key "mnp.seed": Expected a Literal[0, 1]. Got value: 2')
        'Expected argument `--mnp.seed` to be one of 0, 1, but got 2.'
    """
    if found := _REQUIRED.search(message):
        *names, last = [f"`--{name}`" for name in _missing(found)]
        if not names:
            return f"Expected argument {last}, which is required, but got none."
        return f"Expected arguments {', '.join(names)} and {last}, but got none of them."
    if found := _VALUE.search(message):
        value = found["value"].splitlines()[0]
        return f"Expected argument `--{found['key']}` to be {_kind(found)}, but got {value}."
    if not (found := _NO_CLASS.search(message)):
        return re.sub(_KEY, r"Argument `--\g<key>`: ", message)
    key, kind = found["key"], found["kind"]
    if problem := _PROBLEM.search(found["errors"]):
        path, why = problem["path"], " ".join(problem["why"].split())
        if option := _NOT_ACCEPTED.search(why):
            name = option["name"]
            return f"Expected `--{key}.{name}` to be an argument of {path}, which has no `{name}`."
        if "attribute" not in why and "module" not in why.lower():
            return f"Expected options that {path} takes for `--{key}`, but: {why}"
        return f"Expected argument `--{key}` to be a class path, but got {path}: {why}."
    value = found["value"].splitlines()[0]
    return f"Expected argument `--{key}` to be the class path of a {kind}, but got {value}."


def _missing(found: re.Match[str]) -> list[str]:
    """Return the names of the missing arguments, without the command."""
    return [name.partition(".")[2] for name in found["names"].split(", ")]


def named_command(message: str) -> str:
    """Return the command that a message of a missing argument is about; empty for other messages.

    Args:
        message: What jsonargparse says.

    Example:
        >>> named_command("the following arguments are required: audit.ckpt_path")
        'audit'
    """
    found = _REQUIRED.search(message)
    return found["command"] if found else ""


def _kind(found: re.Match[str]) -> str:
    """Return what a value was expected to be, in words."""
    if choices := re.fullmatch(r"(?:typing\.)?Literal\[(.+)\]", found["kind"]):
        return f"one of {choices[1]}"
    name = found["kind"].removeprefix("<class '").removesuffix("'>")
    return _KINDS.get(name, found["kind"])


def find_hint(message: str, parser: argparse.ArgumentParser) -> str:
    """Return the option, value or class that was probably meant, as a question; empty if none is.

    For a missing model or data set, it is a configuration that names both.

    Args:
        message: What jsonargparse says.
        parser: The parser that was used.
    """
    if (found := _REQUIRED.search(message)) and found["command"] in _EXAMPLES:
        file = _EXAMPLES[found["command"]]
        if not {"model", "data"}.isdisjoint(_missing(found)):
            return f"A configuration names model and data, for example `--config {file}`."
    if found := _UNKNOWN.search(message):
        options = {name for action in parser._actions for name in action.option_strings}
        return similar(f"--{found['name']}", options).strip()
    if (found := _VALUE.search(message)) and "Literal[" in found["kind"]:
        return similar(found["value"], re.findall(r"'(\w+)'", found["kind"])).strip()
    if not (found := _NO_CLASS.search(message)):
        return ""
    problem = _PROBLEM.search(found["errors"])
    path = problem["path"] if problem else found["value"].strip()
    if problem and (option := _NOT_ACCEPTED.search(problem["why"])):
        return similar(option["name"], _arguments(path)).strip()
    meant = _meant(path)
    return f"Did you mean {meant}?" if meant not in ("", path) else ""


def _meant(path: str) -> str:
    """Return the class path most like a given one; empty if there is none.

    Modules are imported only if they are named as they are; the parser has done so already.
    """
    parts = path.split(".")
    if parts[0] == "lightning_mnp" or len(parts) == 1:
        public = {name.rpartition(".")[2]: name for name in _public()}
        return public.get(_nearest(parts[-1], public), "")
    known: Iterable[str] = [module.name for module in pkgutil.iter_modules()]
    for number, part in enumerate(parts):
        if part not in known:
            near = _nearest(part, known)
            return ".".join([*parts[:number], near, *parts[number + 1 :]]) if near else ""
        if number < len(parts) - 1:
            module = import_module(".".join(parts[: number + 1]))
            inner = pkgutil.iter_modules(getattr(module, "__path__", []))
            known = [*dir(module), *(each.name for each in inner)]
    return path


def _nearest(word: str, known: Iterable[str]) -> str:
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), "")


def _public() -> list[str]:
    """Return the class paths of this package that a configuration can name."""
    rooms = {room: import_module(f"lightning_mnp.{room}") for room in _ROOMS}
    return [f"lightning_mnp.{room}.{name}" for room in rooms for name in rooms[room].__all__]


def _arguments(class_path: str) -> list[str]:
    """Return the names of the arguments of a class that the parser has found."""
    module, _, name = class_path.rpartition(".")
    return list(inspect.signature(getattr(import_module(module), name)).parameters)

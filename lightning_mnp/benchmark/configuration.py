"""Configuration files of `fit`, read and laid over one another, and checked for a benchmark."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_mnp.benchmark.names import nearest
from lightning_mnp.checkpoints.printable import printable

__all__ = [
    "CLEAN",
    "arguments_of",
    "attack_of",
    "check_base",
    "check_network",
    "merged",
    "overlay_file",
    "read_configuration",
    "read_yaml",
    "save_last",
    "set_option",
    "unknown_attack",
]

CLEAN = "clean"
_SAVE_LAST = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {
        "filename": "last",
        "enable_version_counter": False,
        "save_on_train_epoch_end": True,
    },
}


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # it ships no types
    """Reads numbers as `fit` does: `5e-2` is one, which YAML 1.1 takes for a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file.

    Args:
        path: The file.

    Raises:
        ValueError: If it is no YAML; the message tells the file and the line.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "base.yaml")
        >>> path.write_text("trainer: {max_epochs: 1}")
        24
        >>> read_yaml(path)
        {'trainer': {'max_epochs': 1}}
    """
    try:
        return yaml.load(path.read_text("utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" in line {mark.line + 1}"
        what = getattr(error, "problem", None) or getattr(error, "reason", str(error))
        raise ValueError(
            f"Expected {printable(str(path))} to hold YAML, but{where} it does not: "
            f"{printable(what, 300)}. Correct the file."
        ) from error


def read_configuration(path: Path) -> dict[str, Any]:
    """Read a configuration, with `class_path:` put before classes that are named alone.

    Args:
        path: The file.

    Raises:
        ValueError: If it holds anything but options of `fit`.
    """
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ValueError(
            f"Expected {printable(str(path))} to hold options of `fit`, a line for each as in "
            f"`trainer:`, but got {printable(repr(content), 100)}. Correct the file."
        )
    for part in ("trainer", "model", "data"):
        if part not in content:
            continue
        if part != "trainer":
            content[part] = _with_class_path(content[part])
        _require_options(content[part], part, path)
        arguments = content[part].get("init_args")
        if arguments is not None:  # `init_args:` with nothing behind it
            _require_options(arguments, f"{part}.init_args", path)
            if "attack" in arguments:
                arguments["attack"] = _with_class_path(arguments["attack"])
    return content


def _require_options(given: Any, name: str, path: Path) -> None:
    if not isinstance(given, dict):
        raise ValueError(
            f"Expected `{name}` in {printable(str(path))} to hold options, a line for each, but "
            f"got {printable(repr(given), 100)}. Correct the file."
        )


def _with_class_path(given: Any) -> Any:
    """Return a class that is named alone as a mapping, in which options can be set."""
    return {"class_path": given} if isinstance(given, str) else given


def check_base(content: dict[str, Any], base: Path) -> None:
    """Check that a base names what is trained, and on what; a trainer may be left out.

    Args:
        content: The base, to which an empty trainer is added if it has none.
        base: Its file, for the message.

    Raises:
        ValueError: If it does not.
    """
    content.setdefault("trainer", {})
    for part in ("model", "data"):
        class_path = content.get(part, {}).get("class_path")
        if not isinstance(class_path, str):
            raise ValueError(
                f"Expected the base {printable(str(base))} to name a class as `{part}.class_path`, "
                f"but got {printable(repr(class_path), 100)}. Name one there."
            )


def check_network(content: Mapping[str, Any], base: Path) -> None:
    """Check that the trained network can be built again, which is done by its name.

    Args:
        content: The whole configuration.
        base: The file of its base, for the message.

    Raises:
        ValueError: If the network is given in another way.
    """
    network = (content["model"].get("init_args") or {}).get("network")
    if network is not None:
        raise ValueError(
            f"Expected the model of the base {printable(str(base))} to name its network by "
            f"`architecture`, but got `network`: {printable(repr(network), 100)}. A benchmark "
            "builds networks by name: set `architecture` in its place."
        )


def save_last(content: dict[str, Any], base: Path) -> None:
    """Let the training keep its last checkpoint, and check a rule of its own for that.

    Args:
        content: The whole configuration, which is changed.
        base: The file of its base, for the message.

    Raises:
        ValueError: If a rule of its own keeps none where a benchmark looks for it.
    """
    callbacks = content["trainer"].get("callbacks") or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]  # one alone
    rules = [each for each in callbacks if "ModelCheckpoint" in _class_path(each)]
    if not rules:
        callbacks.append(copy.deepcopy(_SAVE_LAST))
    elif not any(_keeps_last(rule) for rule in rules):
        raise ValueError(
            f"Expected a ModelCheckpoint of {printable(str(base))} or of the attack to write "
            "`checkpoints/last.ckpt`, from where a benchmark takes the network, but got "
            f"{printable(repr(rules), 200)}. Leave it out, since a benchmark adds one by itself, "
            "or give it `filename: last` and no `dirpath`."
        )
    content["trainer"]["callbacks"] = callbacks


def _keeps_last(rule: Any) -> bool:
    """Return whether a ModelCheckpoint writes `last.ckpt` to the folder that it has by default."""
    arguments = (rule.get("init_args") if isinstance(rule, dict) else None) or {}
    is_last = arguments.get("filename") == "last" or arguments.get("save_last") is True
    return is_last and arguments.get("dirpath") is None


def overlay_file(base: Path, name: str) -> Path:
    """Return the file of an attack, which lies beside the base.

    Args:
        base: The file of the base.
        name: The file's name without its ending.

    Raises:
        ValueError: If there is none.
    """
    known = {path.stem: path for path in base.parent.glob("*.yaml")}
    if name not in known:
        raise ValueError(unknown_attack(base, name))
    return known[name]


def unknown_attack(base: Path, name: str) -> str:
    """Return what to say of an attack that is not known.

    Args:
        base: The file of the base, beside which the known ones lie.
        name: The name that was given.
    """
    known = [CLEAN]
    for path in sorted(base.parent.glob("*.yaml")):
        with contextlib.suppress(ValueError, OSError):  # a file that is no configuration
            if attack_of(read_configuration(path)) is not None:
                known.append(path.stem)
    return (
        f"Expected an attack out of {', '.join(known)}, but got {name!r}."
        f"{nearest(name, known)} Each is a file in {base.parent}."
    )


def attack_of(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the part of a configuration that names the attack, the same object.

    Args:
        content: The configuration.

    Example:
        >>> attack_of({"data": {"class_path": "lightning_mnp.data.CIFAR10DataModule"}}) is None
        True
    """
    for owner in ("data", "model"):
        attack: Any = content
        for step in (owner, "init_args", "attack"):
            attack = attack.get(step) if isinstance(attack, dict) else None
        if isinstance(attack, dict) and "class_path" in attack:
            return attack
    return None


def _class_path(callback: Any) -> str:
    """Return the class of a callback, of which a configuration may name the class alone."""
    return str(callback.get("class_path") if isinstance(callback, dict) else callback)


def merged(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Lay one configuration over another: mappings are merged, all else is replaced.

    Args:
        below: The one below.
        above: The one that has the last word.

    Returns:
        A copy that shares nothing with either.

    Example:
        >>> merged({"trainer": {"devices": 1}}, {"trainer": {"max_epochs": 2}})
        {'trainer': {'devices': 1, 'max_epochs': 2}}
    """
    found = copy.deepcopy(below)
    for name, value in above.items():
        old = found.get(name)
        if isinstance(old, dict) and isinstance(value, Mapping) and value:
            value = merged(old, value)
        found[name] = value
    return copy.deepcopy(found)


def set_option(content: dict[str, Any], name: str, value: Any, only_known: bool = False) -> None:
    """Set an option by its dotted name, which leaves `init_args` out.

    Args:
        content: The configuration, which is changed.
        name: Such as ``"data.root"``.
        value: The value.
        only_known: Whether an option that the configuration does not have is left alone.

    Example:
        >>> content = {"data": {"class_path": "lightning_mnp.data.CIFAR10DataModule"}}
        >>> set_option(content, "data.root", "images")
        >>> content["data"]["init_args"]
        {'root': 'images'}
    """
    *path, last = name.split(".")
    for step in path:
        content = arguments_of(content)
        if only_known and not isinstance(content.get(step), dict):
            return
        content = content.setdefault(step, {})
    content = arguments_of(content)
    if not only_known or last in content:
        content[last] = value


def arguments_of(content: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a part of a configuration, the same object.

    Args:
        content: A class with `init_args`, which are added if it has none, or options alone.
    """
    if "class_path" not in content:
        return content
    if content.get("init_args") is None:  # `init_args:` with nothing behind it
        content["init_args"] = {}
    found: dict[str, Any] = content["init_args"]
    return found

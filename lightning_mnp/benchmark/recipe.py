"""How a network is trained: configuration files of `fit`, merged into one, with its digest."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from lightning_mnp.benchmark.names import find_class, nearest
from lightning_mnp.benchmark.training_options import SHAPE, check_fine_tuning, check_option
from lightning_mnp.checkpoints.printable import printable
from lightning_mnp.data import CIFAR10DataModule, DigitsDataModule, ImageNetSubsetDataModule

__all__ = ["CLEAN", "NetworkRecipe", "read_yaml"]

CLEAN = "clean"
_SAVE_LAST = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {
        "filename": "last",
        "enable_version_counter": False,
        "save_on_train_epoch_end": True,
    },
}
# What says where things are and how loud the training is, not what comes out of it.
_NOT_PART = {
    "trainer": ("default_root_dir", "logger", "enable_progress_bar", "enable_model_summary"),
    "data": ("download", "defense_size", "defense_seed", "defense_batch_size"),
}
# The classes whose images are the same wherever they lie. For others, the folder is the data set.
_KNOWN_DATA = (CIFAR10DataModule, DigitsDataModule, ImageNetSubsetDataModule)


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


@dataclass(frozen=True)
class NetworkRecipe:
    """One network of a benchmark: what `lightning-mnp fit` trains it with.

    Attributes:
        base: The configuration that a clean network is trained with.
        attack: ``"clean"``, or the name of a configuration in the folder of the base, without its
            ending, which goes on top of it. Several are joined by ``+``: ``"blend+adaptive"``.
        seed: Seed of the weights, the order, the augmentation and the attack.
        architecture: Name of the architecture; that of the configurations if None.
        width: Channels of the first stage; as configured if None.
        poison_rate: Share of the training images that are poisoned; as configured if None.
        mode: ``"all-to-one"`` or ``"all-to-all"``; as configured if None.
        device: ``"cpu"`` or ``"cuda"``.
        options: Options of `fit` by dotted name, such as ``"trainer.max_epochs"``, that replace
            those of the base. What the attack's configuration says has the last word.
        fine_tuning: If it is not empty, a network with an attack starts from the clean network, and
            these options of `fit` replace those of `options`, by dotted name. Here, too, the
            attack's configuration has the last word.
        data: Folder of the images; as configured if None. It stands for the images unless these
            are known by the class of the datamodule, as those of CIFAR-10 are.

    Raises:
        ValueError: From its properties, if an attack is unknown or does not take an option.
    """

    base: Path
    attack: str = CLEAN
    seed: int = 0
    architecture: str | None = None
    width: int | None = None
    poison_rate: float | None = None
    mode: str | None = None
    device: str = "cpu"
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    fine_tuning: dict[str, Any] = field(default_factory=dict, hash=False)
    data: Path | None = None

    @cached_property
    def content(self) -> dict[str, Any]:
        """The merged configuration, without places of files."""
        content = self._with_overlays(self._with_options())
        _set(content, "seed_everything", self.seed)
        _set(content, "data.seed", self.seed)
        _set(content, "trainer.accelerator", "gpu" if self.device == "cuda" else "cpu")
        _set(content, "trainer.devices", 1)
        for name in ("architecture", "width"):
            if getattr(self, name) is not None:
                _set(content, f"model.{name}", getattr(self, name))
        self._change_attack(content)
        _check_network(content, self.base)
        _save_last(content, self.base)
        return content

    @property
    def _is_fine_tuned(self) -> bool:
        return bool(self.fine_tuning) and self.attack != CLEAN

    def _with_options(self) -> dict[str, Any]:
        """Return the base with the options of the benchmark in place of its own."""
        content = _read(self.base)
        _check_base(content, self.base)
        for part, names in (("options", self.options), ("fine_tuning", self.fine_tuning)):
            for name in names:
                check_option(content, name, part)
        if self.fine_tuning:
            check_fine_tuning(content, self.fine_tuning)
        options = self.options
        if self._is_fine_tuned:  # the place of the clean network is set when it is known
            options = {**options, **self.fine_tuning, "model.checkpoint": None}
        for name, value in options.items():
            _set(content, name, value)
        return content

    def _with_overlays(self, content: dict[str, Any]) -> dict[str, Any]:
        """Return a configuration under those of the attack, of which the first has to name one."""
        parts = [] if self.attack == CLEAN else self.attack.split("+")
        if CLEAN in parts:
            raise ValueError(
                f"Expected attacks that are joined by `+` to be files beside the base, but got "
                f"{CLEAN!r} in {self.attack!r}, which has none. Leave {CLEAN!r} out, or name it "
                "alone."
            )
        for place, part in enumerate(parts):
            overlay = _read(_overlay(self.base, part))
            if place == 0 and _attack_of(overlay) is None:
                raise ValueError(_unknown(self.base, part))
            content = _merged(content, overlay)
        return content

    def _change_attack(self, content: dict[str, Any]) -> None:
        """Set seed, rate and mode of the attack; and its clean network's shape."""
        attack = _attack_of(content)
        if attack is None:
            return
        arguments = _arguments(attack)
        taken = inspect.signature(find_class(attack["class_path"])).parameters
        changes = {"seed": self.seed, "poison_rate": self.poison_rate, "mode": self.mode}
        for name, value in changes.items():
            if value is None or (name == "seed" and name not in taken):
                continue
            if name not in taken:
                rates = [each for each in taken if "rate" in each or "poisons" in each]
                raise ValueError(
                    f"Expected attack {self.attack!r} to take the option `{name}`, but it takes "
                    f"{', '.join(rates) if name == 'poison_rate' else 'one mode only'}. Give it a "
                    f"grid of its own, without `{name}s`."
                )
            arguments[name] = value
        if "reference" in arguments:
            reference = arguments["reference"].setdefault("init_args", {})
            reference.update(_network_of(content))

    @property
    def network(self) -> dict[str, Any]:
        """Architecture, width, classes and channels, as far as they are configured."""
        return _network_of(self.content)

    @property
    def attack_options(self) -> dict[str, Any]:
        """The attack's class path and arguments; empty for a clean network."""
        return _attack_of(self.content) or {}

    @property
    def attack_name(self) -> str:
        """The name of the attack's class, such as ``"BadNets"``; ``"clean"`` without an attack."""
        return str(self.attack_options.get("class_path", CLEAN)).rpartition(".")[2]

    @property
    def clean(self) -> NetworkRecipe | None:
        """The clean network that the attack is made with or starts from; None if it needs none."""
        options = self.attack_options.get("init_args", {})
        if self.attack == CLEAN or not ("reference" in options or self._starts_from_clean):
            return None
        return replace(self, attack=CLEAN, poison_rate=None, mode=None, fine_tuning={})

    @property
    def _starts_from_clean(self) -> bool:
        return "checkpoint" in (self.content["model"].get("init_args") or {})

    @property
    def root(self) -> str | None:
        """The folder that stands for the images; None if the class of the datamodule does."""
        data = self.content["data"]
        if find_class(data["class_path"]) in _KNOWN_DATA:
            return None
        root = (data.get("init_args") or {}).get("root") if self.data is None else self.data
        return None if root is None else os.path.abspath(os.path.expanduser(root))

    @cached_property
    def digest(self) -> str:
        """Twelve hexadecimal digits that stand for all that decides on the weights."""
        content = copy.deepcopy(self.content)
        for part, names in _NOT_PART.items():
            for name in names:
                _arguments(content[part]).pop(name, None)
        _arguments(content["data"]).pop("root", None)
        if self.root is not None:
            _set(content, "data.root", self.root)
        if files := _digests(self.attack_options.get("init_args") or {}):
            content["files"] = files
        if (clean := self.clean) is not None:
            content["clean"] = clean.digest
            for name in ("data.attack.reference.checkpoint", "model.checkpoint"):
                _set(content, name, None, only_known=True)
        text = json.dumps(content, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        """A name for files and messages, such as ``"badnets-seed0-1f0c2ab93d4e"``."""
        return f"{self.attack}-seed{self.seed}-{self.digest}"

    def configuration(
        self, folder: Path, data: Path | None, clean_checkpoint: Path | None
    ) -> dict[str, Any]:
        """Return the whole configuration of `fit`, with the places of files.

        Args:
            folder: Where checkpoint, trigger and log go.
            data: Folder of the images; as configured if None.
            clean_checkpoint: Weights of the network :attr:`clean`; None if there is none.
        """
        content = copy.deepcopy(self.content)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        content["trainer"].update(default_root_dir=str(folder), **quiet)
        if data is not None:
            _set(content, "data.root", str(data))
        if clean_checkpoint is not None:
            for name in ("data.attack.reference.checkpoint", "model.checkpoint"):
                _set(content, name, str(clean_checkpoint), only_known=True)
        return content

    @property
    def _rate(self) -> float | None:
        """Share of the images that are poisoned; the attack's own if it is not configured."""
        if not self.attack_options:
            return None
        arguments = self.attack_options["init_args"]
        taken = inspect.signature(find_class(self.attack_options["class_path"])).parameters
        defaults = {name: each.default for name, each in taken.items()}
        for given in (arguments, defaults):
            for name in ("poison_rate", "class_rate"):
                if isinstance(given.get(name), (int, float)):
                    return float(given[name])
        return None

    def described(self) -> dict[str, Any]:
        """Return what a row of a table says about the network, as primitives."""
        arguments = self.attack_options.get("init_args", {})
        return {
            "name": self.name,
            "digest": self.digest,
            "base": self.base.stem,
            "data": str(self.content["data"]["class_path"]).rpartition(".")[2],
            "attack": self.attack,
            "attack_class": self.attack_name,
            "mode": arguments.get("mode", "all-to-one") if arguments else None,
            "rate": self._rate,
            "usual": self.poison_rate is None and self.mode is None and "+" not in self.attack,
            "seed": self.seed,
            "architecture": self.network.get("architecture", "cifar_resnet18"),
            "width": self.network.get("width", 64),
            "epochs": self.content["trainer"].get("max_epochs"),
            "options": self.options,
            "fine_tuning": self.fine_tuning if self._is_fine_tuned else {},
            "device": self.device,
            **({} if self.root is None else {"root": self.root}),
        }


def _read(path: Path) -> dict[str, Any]:
    """Read a configuration, with `class_path:` put before classes that are named alone."""
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


def _check_base(content: dict[str, Any], base: Path) -> None:
    """Check that a base names what is trained, and on what; a trainer may be left out."""
    content.setdefault("trainer", {})
    for part in ("model", "data"):
        class_path = content.get(part, {}).get("class_path")
        if not isinstance(class_path, str):
            raise ValueError(
                f"Expected the base {printable(str(base))} to name a class as `{part}.class_path`, "
                f"but got {printable(repr(class_path), 100)}. Name one there."
            )


def _check_network(content: Mapping[str, Any], base: Path) -> None:
    """Check that the trained network can be built again, which is done by its name."""
    network = (content["model"].get("init_args") or {}).get("network")
    if network is not None:
        raise ValueError(
            f"Expected the model of the base {printable(str(base))} to name its network by "
            f"`architecture`, but got `network`: {printable(repr(network), 100)}. A benchmark "
            "builds networks by name: set `architecture` in its place."
        )


def _save_last(content: dict[str, Any], base: Path) -> None:
    """Let the training keep its last checkpoint, and check a rule of its own for that."""
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


def _overlay(base: Path, name: str) -> Path:
    known = {path.stem: path for path in base.parent.glob("*.yaml")}
    if name not in known:
        raise ValueError(_unknown(base, name))
    return known[name]


def _unknown(base: Path, name: str) -> str:
    known = [CLEAN]
    for path in sorted(base.parent.glob("*.yaml")):
        with contextlib.suppress(ValueError, OSError):  # a file that is no configuration
            if _attack_of(_read(path)) is not None:
                known.append(path.stem)
    return (
        f"Expected an attack out of {', '.join(known)}, but got {name!r}."
        f"{nearest(name, known)} Each is a file in {base.parent}."
    )


def _attack_of(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the part of a configuration that names the attack, the same object."""
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


def _network_of(content: Mapping[str, Any]) -> dict[str, Any]:
    arguments = content["model"].get("init_args") or {}
    return {name: arguments[name] for name in SHAPE if name in arguments}


def _merged(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Lay one configuration over another: mappings are merged, all else is replaced."""
    merged = copy.deepcopy(below)
    for name, value in above.items():
        old = merged.get(name)
        if isinstance(old, dict) and isinstance(value, Mapping) and value:
            value = _merged(old, value)
        merged[name] = value
    return copy.deepcopy(merged)


def _set(content: dict[str, Any], name: str, value: Any, only_known: bool = False) -> None:
    """Set an option by its dotted name, which leaves `init_args` out."""
    *path, last = name.split(".")
    for step in path:
        content = _arguments(content)
        if only_known and not isinstance(content.get(step), dict):
            return
        content = content.setdefault(step, {})
    content = _arguments(content)
    if not only_known or last in content:
        content[last] = value


def _digests(options: Mapping[str, Any]) -> dict[str, str]:
    """Return the SHA-256 of each file that an option names, such as Blend's image.

    Weights of a reference network are not among them: a benchmark puts its own in their place.
    """
    paths = {
        name: Path(os.path.expanduser(value))
        for name, value in options.items()
        if isinstance(value, str) and value
    }
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in paths.items()
        if path.is_file()
    }


def _arguments(content: dict[str, Any]) -> dict[str, Any]:
    if "class_path" not in content:
        return content
    if content.get("init_args") is None:  # `init_args:` with nothing behind it
        content["init_args"] = {}
    found: dict[str, Any] = content["init_args"]
    return found

"""How a network is trained: one configuration of `fit`, out of several, and its digest."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_mnp.benchmark.configuration import (
    CLEAN,
    arguments_of,
    attack_of,
    check_base,
    check_network,
    merged,
    overlay_file,
    read_configuration,
    save_last,
    set_option,
    unknown_attack,
)
from lightning_mnp.benchmark.names import file_digests, find_class
from lightning_mnp.benchmark.training_options import SHAPE, check_fine_tuning, check_option
from lightning_mnp.data import CIFAR10DataModule, DigitsDataModule, ImageNetSubsetDataModule

__all__ = ["NetworkRecipe"]

# What says where things are and how loud the training is, not what comes out of it.
_NOT_PART = {
    "trainer": ("default_root_dir", "logger", "enable_progress_bar", "enable_model_summary"),
    "data": ("download", "defense_size", "defense_seed", "defense_batch_size"),
}
# The classes whose images are the same wherever they lie. For others, the folder is the data set.
_KNOWN_DATA = (CIFAR10DataModule, DigitsDataModule, ImageNetSubsetDataModule)


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
        set_option(content, "seed_everything", self.seed)
        set_option(content, "data.seed", self.seed)
        set_option(content, "trainer.accelerator", "gpu" if self.device == "cuda" else "cpu")
        set_option(content, "trainer.devices", 1)
        for name in ("architecture", "width"):
            if getattr(self, name) is not None:
                set_option(content, f"model.{name}", getattr(self, name))
        self._change_attack(content)
        check_network(content, self.base)
        save_last(content, self.base)
        return content

    @property
    def _is_fine_tuned(self) -> bool:
        return bool(self.fine_tuning) and self.attack != CLEAN

    def _with_options(self) -> dict[str, Any]:
        """Return the base with the options of the benchmark in place of its own."""
        content = read_configuration(self.base)
        check_base(content, self.base)
        for part, names in (("options", self.options), ("fine_tuning", self.fine_tuning)):
            for name in names:
                check_option(content, name, part)
        if self.fine_tuning:
            check_fine_tuning(content, self.fine_tuning)
        options = self.options
        if self._is_fine_tuned:  # the place of the clean network is set when it is known
            options = {**options, **self.fine_tuning, "model.checkpoint": None}
        for name, value in options.items():
            set_option(content, name, value)
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
            overlay = read_configuration(overlay_file(self.base, part))
            if place == 0 and attack_of(overlay) is None:
                raise ValueError(unknown_attack(self.base, part))
            content = merged(content, overlay)
        return content

    def _change_attack(self, content: dict[str, Any]) -> None:
        """Set seed, rate and mode of the attack; and its clean network's shape."""
        attack = attack_of(content)
        if attack is None:
            return
        arguments = arguments_of(attack)
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
        return attack_of(self.content) or {}

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
                arguments_of(content[part]).pop(name, None)
        arguments_of(content["data"]).pop("root", None)
        if self.root is not None:
            set_option(content, "data.root", self.root)
        # Not the weights of a reference network: a benchmark puts its own in their place.
        if files := file_digests(self.attack_options.get("init_args") or {}):
            content["files"] = files
        if (clean := self.clean) is not None:
            content["clean"] = clean.digest
            for name in ("data.attack.reference.checkpoint", "model.checkpoint"):
                set_option(content, name, None, only_known=True)
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
            set_option(content, "data.root", str(data))
        if clean_checkpoint is not None:
            for name in ("data.attack.reference.checkpoint", "model.checkpoint"):
                set_option(content, name, str(clean_checkpoint), only_known=True)
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


def _network_of(content: Mapping[str, Any]) -> dict[str, Any]:
    arguments = content["model"].get("init_args") or {}
    return {name: arguments[name] for name in SHAPE if name in arguments}

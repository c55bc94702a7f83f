"""The networks of a benchmark: trained once for each recipe, measured, and loaded again."""

from __future__ import annotations

import contextlib
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from torch import nn

from lightning_mnp.benchmark.code_version import code_version
from lightning_mnp.benchmark.images import CellImages
from lightning_mnp.benchmark.lock import exclusive
from lightning_mnp.benchmark.machine import describe_machine
from lightning_mnp.benchmark.names import find_class
from lightning_mnp.benchmark.recipe import NetworkRecipe
from lightning_mnp.benchmark.records import read_json, write_json
from lightning_mnp.checkpoints.load import load_into
from lightning_mnp.checkpoints.read import read_state_dict
from lightning_mnp.models import CifarResNet, build_network
from lightning_mnp.models.memory_format import fastest_format
from lightning_mnp.surgery.network import weights_digest

__all__ = ["Fit", "NetworkFolder", "training_version", "using_threads"]

# Runs the command `fit` with these arguments and returns its exit code.
Fit = Callable[[list[str]], int]

_INTERRUPTED, _TERMINATED = 130, 143
_LAST_LINES = 6
_FIGURES, _WEIGHTS = "network.json", Path("checkpoints", "last.ckpt")


def training_version(recipe: NetworkRecipe) -> str:
    """Return the version of the code that trains a network and measures it.

    Args:
        recipe: The network.
    """
    paths = [recipe.content[part]["class_path"] for part in ("data", "model")]
    paths += [recipe.attack_options["class_path"]] if recipe.attack_options else []
    paths += _callbacks(recipe.content["trainer"])
    own = ["lightning_mnp.attacks.callback", "lightning_mnp.metrics.success"]
    return code_version([*(find_class(path).__module__ for path in paths), *own])


def _callbacks(trainer: Mapping[str, Any]) -> list[str]:
    """Return the class paths of a training's callbacks, without Lightning's own."""
    paths: list[str] = []
    for name in ("callbacks", "callbacks+"):
        given = trainer.get(name) or []
        for each in given if isinstance(given, list) else [given]:
            paths.append(each["class_path"] if isinstance(each, Mapping) else str(each))
    return [path for path in paths if "." in path and not path.startswith("lightning.")]


@dataclass(frozen=True)
class NetworkFolder:
    """Where a network is kept: checkpoint, trigger, log and figures.

    Its name holds the recipe and the version of the code that trains it, so networks that other
    code has trained stay where they are.

    Args:
        root: Folder of all networks.
        recipe: How the network is trained.
        any_code: Whether a network that other code has trained will do, the latest one, if there is
            none of this.
    """

    root: Path
    recipe: NetworkRecipe
    any_code: bool = False

    @property
    def path(self) -> Path:
        """The folder."""
        current = self.root / f"{self.recipe.name}-{training_version(self.recipe)}"
        if self.any_code and not _is_trained(current):
            trained = filter(_is_trained, self.root.glob(f"{self.recipe.name}-*"))
            return max(trained, key=lambda path: (path / _FIGURES).stat().st_mtime, default=current)
        return current

    @property
    def checkpoint(self) -> Path:
        """The weights, and all that a training needs to go on."""
        return self.path / _WEIGHTS

    @property
    def trigger(self) -> Path | None:
        """The trigger file; None for a clean network."""
        return self.checkpoint.with_name("trigger.safetensors") if self._is_attacked else None

    @property
    def _is_attacked(self) -> bool:
        return bool(self.recipe.attack_options)

    @property
    def clean(self) -> NetworkFolder | None:
        """The clean network that the attack is made with; None if it needs none."""
        recipe = self.recipe.clean
        return None if recipe is None else NetworkFolder(self.root, recipe, self.any_code)

    def figures(self) -> dict[str, Any] | None:
        """Return what was measured; None if the network is not trained yet, or not there."""
        path = self.path
        return read_json(path / _FIGURES) if _is_trained(path) else None

    def images(self, data: Path | None) -> CellImages:
        """Return the images that belong to the network.

        Args:
            data: Their folder; as configured if None.
        """
        clean = self.clean
        return CellImages(
            self.recipe, data, self.trigger, None if clean is None else clean.checkpoint
        )

    def train(self, fit: Fit, data: Path | None, test_images: int | None) -> dict[str, Any]:
        """Train the network and measure it, or return what was measured before.

        A training that was stopped goes on from its last checkpoint. If another run trains the
        network, its end is waited for.

        Args:
            fit: Trains.
            data: Folder of the images; as configured if None.
            test_images: Most test images; None for all.

        Returns:
            CA and ASR from 0 to 1, the seconds of training, and what it was trained on.

        Raises:
            RuntimeError: If the training fails.
        """
        path = self.path
        path.mkdir(parents=True, exist_ok=True)
        with exclusive(path / "lock", f"the training of {self.recipe.name}"):
            return self.figures() or self._trained(fit, data, test_images)

    def _trained(self, fit: Fit, data: Path | None, test_images: int | None) -> dict[str, Any]:
        going_on = self.checkpoint.exists()
        if not going_on:  # what is left of weights that are gone
            for left in filter(None, (self.path / _FIGURES, self.trigger)):
                left.unlink(missing_ok=True)
        started = time.perf_counter()
        self._fit(fit, data, going_on)
        seconds = time.perf_counter() - started
        network = self.load()
        measured = self.images(data).test(test_images).measure(network, self.recipe.device)
        content = {
            **measured,
            "seconds": round(seconds, 1),
            "test_images": test_images,
            "went_on": going_on,  # then the seconds are those of the last part
            "weights_sha256": weights_digest(network),
            "code": training_version(self.recipe),
            "machine": describe_machine(self.recipe.device),
        }
        write_json(self.path / _FIGURES, content)
        return content

    def check(self, fit: Fit, data: Path | None) -> None:
        """Check that the configuration is one that `fit` understands, without training.

        Args:
            fit: Trains.
            data: Folder of the images; as configured if None.

        Raises:
            ValueError: If it is not.
        """
        with tempfile.TemporaryDirectory() as place:
            arguments = self._arguments(Path(place), data)
            with (Path(place) / "fit.log").open("w+", encoding="utf-8") as log:
                code = _run_quietly(fit, [*arguments, "--print_config"], log)
                log.seek(0)
                said = _last_lines(log.read())
        if code:
            raise ValueError(
                f"Expected the configuration of the network {self.recipe.attack!r}, seed "
                f"{self.recipe.seed}, to be one for `lightning-mnp fit`, but: {said}"
            )

    def _arguments(self, place: Path, data: Path | None) -> list[str]:
        """Write the configuration to a folder, and return the command that trains with it."""
        clean = None if self.clean is None else self.clean.checkpoint
        content = self.recipe.configuration(self.path, data, clean)
        configuration = place / "recipe.yaml"
        configuration.write_text(yaml.safe_dump(content, sort_keys=False), "utf-8")
        return ["fit", "--config", str(configuration)]

    def _fit(self, fit: Fit, data: Path | None, going_on: bool) -> None:
        arguments = self._arguments(self.path, data)
        if going_on:
            arguments += ["--ckpt_path", str(self.checkpoint)]
        else:  # a training before its first checkpoint leaves this, and is begun anew
            (self.path / "config.yaml").unlink(missing_ok=True)
        log = self.path / "fit.log"
        with log.open("a", encoding="utf-8") as file:
            code = _run_quietly(fit, arguments, file)
        if code == _INTERRUPTED:
            raise KeyboardInterrupt
        if code == _TERMINATED:  # somebody wants the process to end, and not this training alone
            raise SystemExit(code)
        if code:
            said = _last_lines(log.read_text("utf-8"))
            anew = f" Remove {self.path} to train it anew." if going_on else ""
            raise RuntimeError(
                f"Training {self.recipe.name} failed: {said} The log is {log}.{anew}"
            )

    def load(self) -> nn.Module:
        """Return the trained network, in evaluation mode, on the recipe's device.

        Raises:
            ValueError: If the checkpoint cannot be read, or holds other weights than were measured.
        """
        network = build_network(**{"architecture": "cifar_resnet18", **self.recipe.network})
        remedy = f"Remove {self.path} to train the network anew."
        try:
            load_into(network, read_state_dict(self.checkpoint))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"Expected {self.checkpoint} to hold the weights of {self.recipe.name}, but: "
                f"{error} {remedy}"
            ) from error
        known, found = self.figures() or {}, weights_digest(network)
        if found != known.get("weights_sha256", found):
            raise ValueError(
                f"Expected {self.checkpoint} to hold the weights that {_FIGURES} beside it was "
                f"measured on ({known['weights_sha256'][:12]}), but got others ({found[:12]}). "
                f"{remedy}"
            )
        if isinstance(network, CifarResNet):
            network = network.to(memory_format=fastest_format(network))
        return network.eval().to(self.recipe.device)


def _is_trained(folder: Path) -> bool:
    return all((folder / name).exists() for name in (_FIGURES, _WEIGHTS))


def _run_quietly(fit: Fit, arguments: list[str], log: IO[str]) -> int:
    """Run a command in this process, let it print to a file, and return its exit code."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels, words = [logger.level for logger in loggers], sys.argv
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    sys.argv = words[:1]  # Lightning warns if they are not those of the command
    try:
        with (
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            return fit(arguments)
    except SystemExit as stop:  # by the parser
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        sys.argv = words


def _last_lines(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[-_LAST_LINES:])


@contextlib.contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Compute with so many threads until the context ends.

    Args:
        count: Their number.

    Example:
        >>> with using_threads(1):
        ...     torch.get_num_threads()
        1
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""The results of cells, as tables need them: in percent, by setting, with where they come from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lightning_mnp.benchmark.records import read_cells

__all__ = ["MISSING", "Marks", "Result", "Setting", "paper_figures", "read_results", "settings_of"]

MISSING = "missing"

# The paper's names of attacks.
_ATTACKS = {"InputAware": "IAB", "FeatureCollision": "FC"}


@cache
def paper_figures() -> dict[str, Any]:
    """Return the figures of the paper's Tables 1 to 4, in percent.

    Example:
        >>> paper_figures()["1"]["rows"]["BadNets"]["mnp"]
        [92.11, 0.47]
    """
    text = Path(__file__).with_name("paper.json").read_text("utf-8")
    figures: dict[str, Any] = json.loads(text)
    return figures


@dataclass(frozen=True, order=True)
class Setting:
    """What results have in common that stand in the same table.

    Attributes:
        data: Class of the datamodule.
        base: Configuration of the clean training.
        options: What replaces the base's options, as JSON.
        architecture: Its name.
        width: Channels of the first stage.
        size: Number of clean images.
        device: ``"cpu"`` or ``"cuda"``.
        test_images: Most test images; 0 for all.
        root: Folder of the images; "" if the class of the datamodule stands for them.
    """

    data: str
    base: str
    options: str
    architecture: str
    width: int
    size: int
    device: str
    test_images: int
    root: str = ""

    def __str__(self) -> str:
        options = ", ".join(
            f"{name}={json.dumps(value)}" for name, value in json.loads(self.options).items()
        )
        changed = f" with {options}" if options else ""
        thinned = f", at most {self.test_images} test images" if self.test_images else ""
        data = self.data.removesuffix("DataModule") + (f" of {self.root}" if self.root else "")
        return (
            f"{data}, {self.architecture} of width {self.width}, "
            f"trained by `{self.base}`{changed}, {self.size} clean images, {self.device}{thinned}"
        )

    @property
    def paper_table(self) -> str | None:
        """Number of the paper's table on the same data; None if there is none."""
        return {"CIFAR10DataModule": "1", "ImageNetSubsetDataModule": "2"}.get(self.data)


@dataclass(frozen=True)
class Result:
    """The result of one cell.

    Attributes:
        name: Name of its file, without the ending.
        content: What is in the file.
    """

    name: str
    content: Mapping[str, Any]

    @property
    def network(self) -> Mapping[str, Any]:
        """How the network was trained."""
        network: Mapping[str, Any] = self.content["cell"]["network"]
        return network

    @property
    def network_key(self) -> str:
        """Which network it is: one recipe, trained twice, gives two."""
        trained = self.content.get("training") or {}
        return str(trained.get("weights_sha256") or self.network["digest"])

    @property
    def attack(self) -> str:
        """The paper's name of the attack, or that of its class; ``"clean"`` without one."""
        name = str(self.network["attack_class"])
        return _ATTACKS.get(name, name)

    @property
    def is_clean(self) -> bool:
        """Whether the network was trained without an attack."""
        return self.attack == "clean"

    @property
    def label(self) -> str:
        """The method with its options."""
        return str(self.content["cell"]["label"])

    @property
    def has_options(self) -> bool:
        """Whether the method has options that are not its defaults."""
        return bool(self.content["cell"]["method"]["options"])

    @property
    def task(self) -> str:
        """``"defense"`` or ``"detector"``."""
        return str(self.content["cell"]["task"])

    @property
    def is_done(self) -> bool:
        """Whether it has figures and not an error."""
        return bool(self.content["status"] == "done")

    @property
    def setting(self) -> Setting:
        """Which table it stands in."""
        network, cell = self.network, self.content["cell"]
        return Setting(
            network["data"],
            network["base"],
            json.dumps(network["options"], sort_keys=True),
            network["architecture"],
            network["width"],
            cell["defense_size"],
            network["device"],
            cell["test_images"] or 0,
            network.get("root", ""),
        )

    def percent(self, when: str) -> tuple[float, float | None]:
        """Return CA and ASR in percent; the latter is None for a clean network.

        Args:
            when: ``"before"`` or ``"after"`` the defense.
        """
        figures = self.content[when]
        asr = figures["ASR"]
        return 100 * figures["CA"], None if asr is None else 100 * asr


class Marks:
    """Short marks of machines and settings, for the columns of tables.

    Example:
        >>> marks = Marks()
        >>> marks.lines()
        []
    """

    def __init__(self) -> None:
        self._machines: dict[str, str] = {}
        self._settings: dict[str, str] = {}

    def mark(self, results: Iterable[Result]) -> str:
        """Return the marks of the machines that results come from.

        Args:
            results: The results.
        """
        marks: dict[str, None] = {}
        for result in results:
            machine = result.content["machine"]
            versions = machine["versions"]
            threads = "" if machine["device"] == "cuda" else f", threads: {machine['threads']}"
            told = (
                f"{machine['name']}{threads}, {machine['system']}, Python {versions['python']}, "
                f"torch {versions['torch']}, lightning-mnp {versions['lightning-mnp']}"
            )
            beside = result.content.get("at_a_time", 1)
            told += f", {beside} cells at a time" if beside > 1 else ""
            marks[self._machines.setdefault(told, f"m{len(self._machines) + 1}")] = None
        return ", ".join(marks)

    def setting(self, setting: Setting) -> str:
        """Return the mark of a setting.

        Args:
            setting: The setting.
        """
        return self._settings.setdefault(str(setting), f"s{len(self._settings) + 1}")

    def lines(self) -> list[str]:
        """Return a line for each mark that was given."""
        given = [*self._settings.items(), *self._machines.items()]
        return [f"{mark}: {told}" for told, mark in given]


def settings_of(results: Sequence[Result]) -> list[Setting]:
    """Return the settings of results, sorted.

    Args:
        results: The results.
    """
    return sorted({result.setting for result in results})


def read_results(folder: Path) -> list[Result]:
    """Read all results, in the order of their names.

    Args:
        folder: Folder of the files.

    Raises:
        ValueError: If there is none, or a file is damaged.
    """
    results = [Result(name, content) for name, content in read_cells(folder).items()]
    if not results:
        raise ValueError(
            f"Expected argument `results` to be a folder with results of cells, but {folder} has "
            "none. Run `lightning-mnp benchmark run` first, or name its `--out`."
        )
    return results

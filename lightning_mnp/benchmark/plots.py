"""Plots of results; they need matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_mnp.benchmark.pairs import mean_pair
from lightning_mnp.benchmark.results import Result, settings_of
from lightning_mnp.benchmark.table import head

__all__ = ["draw_plots"]

_MARKERS = "os^Dv"
# Options of MNP that Figure 3 varies, and their names there.
_VARIED = {"masks.penalty": "lambda", "suppression.mu": "mu"}


def draw_plots(results: Sequence[Result], folder: Path) -> list[Path]:
    """Draw what there are results for.

    - CA against ASR after each defense, a plot for each setting: the best place is upper left.
    - Figure 3: CA and ASR over lambda and mu.
    - Figure 4: CA and ASR over the number of clean images.

    Args:
        results: All results.
        folder: Where the PNG files go.

    Returns:
        The files.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    wanted = [
        r
        for r in results
        if r.is_done and r.task == "defense" and not r.is_clean and r.network["usual"]
    ]
    files = []
    for number, setting in enumerate(settings_of(wanted), 1):
        here = [each for each in wanted if each.setting == setting]
        files.append(_save(_scatter(here), folder / f"defenses-{number}.png"))
    for name, lines in (("figure3", _over_options(wanted)), ("figure4", _over_sizes(wanted))):
        for number, line in enumerate(lines, 1):
            files.append(_save(_curves(line), folder / f"{name}-{number}.png"))
    return files


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=150, bbox_inches="tight")
    return path


def _scatter(here: Sequence[Result]) -> Any:
    """CA against ASR: a point for each attack, a color and a marker for each defense."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5))
    axes = figure.subplots()
    for place, label in enumerate(sorted({each.label for each in here})):
        pairs = [each.percent("after") for each in here if each.label == label]
        both = [asr or 0.0 for _, asr in pairs], [ca for ca, _ in pairs]
        marker = _MARKERS[place // 10 % len(_MARKERS)]  # colors repeat after ten
        axes.scatter(*both, label=head(label), marker=marker)
    axes.set(xlabel="ASR (%)", ylabel="CA (%)", title=str(here[0].setting))
    axes.title.set_fontsize(7)
    axes.legend(fontsize=7)
    return figure


Line = tuple[str, str, list[tuple[float, float, float]]]


def _curves(line: Line) -> Any:
    """CA and ASR over what a figure of the paper varies."""
    from matplotlib.figure import Figure

    title, xlabel, points = line
    figure = Figure(figsize=(5, 4))
    axes = figure.subplots()
    values = [value for value, _, _ in points]
    axes.plot(values, [ca for _, ca, _ in points], marker="o", label="CA")
    axes.plot(values, [asr for _, _, asr in points], marker="s", label="ASR")
    axes.set_xscale("symlog", linthresh=min((v for v in values if v > 0), default=1.0))
    axes.set(xlabel=xlabel, ylabel="%", title=title)
    axes.title.set_fontsize(7)
    axes.legend()
    return figure


def _over_options(results: Sequence[Result]) -> list[Line]:
    """Return what Figure 3 shows: results of MNP with one option changed, by its value."""
    lines = []
    for setting in settings_of(results):
        for attack in sorted({each.attack for each in results}):
            for option, symbol in _VARIED.items():
                groups: dict[float, list[Result]] = {}
                for each in results:
                    method = each.content["cell"]["method"]
                    if (
                        each.setting == setting
                        and each.attack == attack
                        and method["name"] == "mnp"
                        and list(method["options"]) == [option]
                    ):
                        groups.setdefault(float(method["options"][option]), []).append(each)
                lines += _line(groups, f"{attack}; {setting}", symbol)
    return lines


def _over_sizes(results: Sequence[Result]) -> list[Line]:
    """Return what Figure 4 shows: results of MNP by the number of clean images."""
    lines = []
    for key in sorted({_without_size(each) for each in results if each.label == "mnp"}):
        groups: dict[float, list[Result]] = {}
        for each in results:
            if each.label == "mnp" and _without_size(each) == key:
                groups.setdefault(float(each.setting.size), []).append(each)
        lines += _line(groups, f"{key[0]}; {key[1]}", "clean images")
    return lines


def _without_size(result: Result) -> tuple[str, str, int]:
    told = str(result.setting).replace(f", {result.setting.size} clean images", "")
    return result.attack, told, result.network["seed"]


def _line(groups: dict[float, list[Result]], title: str, xlabel: str) -> list[Line]:
    if len(groups) < 2:
        return []
    points = []
    for value, group in sorted(groups.items()):
        ca, asr = mean_pair([each.percent("after") for each in group])
        points.append((value, ca, asr or 0.0))
    return [(title, xlabel, points)]

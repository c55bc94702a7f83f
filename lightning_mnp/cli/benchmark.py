"""The command `lightning-mnp benchmark`: measure cells, and make a report of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from jsonargparse import ArgumentParser
from jsonargparse.typing import Path_fr
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lightning_mnp.benchmark.configuration import read_yaml
from lightning_mnp.benchmark.executors import ExecutorName, open_executor
from lightning_mnp.benchmark.grid import Cell, Grid, cells_of
from lightning_mnp.benchmark.names import nearest
from lightning_mnp.benchmark.networks import Fit, NetworkFolder
from lightning_mnp.benchmark.report import write_report
from lightning_mnp.benchmark.run import Places, Summary, run_benchmark
from lightning_mnp.checkpoints.atomic_write import check_writable
from lightning_mnp.cli.parser import end_with_error
from lightning_mnp.cli.paths import expanded

__all__ = ["main", "parse_seconds"]

_RESULTS = Path("benchmarks/results/cells")
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_FAILED = 1


def run(
    base: Path_fr,
    grids: list[Grid],
    options: dict[str, Any] | None = None,
    test_images: int | None = None,
    suspects: int = 2000,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    out: Path = _RESULTS,
    networks: Path = Path("runs/benchmark"),
    data: Path | None = None,
    budget: float | str | None = None,
    jobs: int | None = None,
    executor: ExecutorName = "processes",
    address: str | None = None,
    threads: int = 1,
    any_code: bool = False,
    progress: bool = True,
) -> None:
    """Measure all cells of a configuration that have no result yet.

    A cell is one defense or detector on one network. Networks are trained by `fit`, once for all
    their cells. The exit code is 1 if a cell failed.

    Args:
        base: The configuration of `fit` that a clean network is trained with. Attacks are files in
            its folder. In a configuration, it is looked for in the folder of that file; all other
            paths are taken from the folder of the command.
        grids: What is combined with what.
        options: Options of the training that replace those of the base, by dotted name.
        test_images: Most test images, and most triggered ones; null for all.
        suspects: Number of images for detectors that look for poisoned ones.
        device: Where networks are trained and methods run; auto is cuda if there is a GPU.
        out: Folder of the results, a small JSON for each cell.
        networks: Folder of the trained networks.
        data: Folder of the images, in place of the `data.root` of the base.
        budget: Time in all, such as 500s, 8m or 2h, or in seconds; what would take longer is not
            begun.
        jobs: Pieces of work at a time; one by default, and all that a Ray cluster has room for.
        executor: Where work is done: in processes of this machine, or on a Ray cluster.
        address: Address of the Ray cluster; one is started on this machine if null.
        threads: Threads of each piece of work on the CPU.
        any_code: Whether to keep results and networks that other code has made.
        progress: Whether to show a progress bar.
    """
    raise AssertionError("only parsed")


def report(
    results: Path = _RESULTS, out: Path = Path("runs/benchmark-report"), plots: bool = True
) -> None:
    """Make tables and plots of the results of cells, and of nothing else.

    Args:
        results: Folder of the results.
        out: Folder of the report: report.md, a CSV for each table, and plots.
        plots: Whether to draw plots, which takes matplotlib.
    """
    raise AssertionError("only parsed")


class _Parser(ArgumentParser):
    """A parser that says what is wrong in plain words."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the error and the usage, and end with code 2.

        Args:
            message: What is wrong.
            ex: The exception that says so.
        """
        end_with_error(self, message, ex)


def main(args: Sequence[str], fit: Fit) -> int:
    """Run the command.

    Args:
        args: What stands behind `benchmark`.
        fit: Runs the command `fit`; other processes must be able to import it.

    Returns:
        The exit code: 1 if a cell failed, otherwise 0.

    Raises:
        ValueError: If an argument cannot serve.
    """
    parser = _Parser(
        prog="lightning-mnp benchmark", description="Compare defenses and detectors, cell by cell."
    )
    commands = parser.add_subcommands()
    for command in (run, report):
        part = _Parser(description=str(command.__doc__).partition("\n\n    Args:")[0])
        part.add_argument("--config", action="config", help="a YAML file with these options")
        part.add_function_arguments(command, as_group=False)
        first = str(command.__doc__).partition("\n")[0].rstrip(".")
        commands.add_subcommand(command.__name__, part, help=first)
    _check_names(args)
    chosen = parser.instantiate_classes(parser.parse_args(list(args)))
    values = dict(vars(getattr(chosen, chosen.subcommand)))
    values.pop("config", None)
    for name, value in values.items():
        if isinstance(value, Path):
            values[name] = Path(expanded(str(value)))
    if chosen.subcommand == "report":
        return _report(**values)
    return _run(fit, **values)


def _check_names(args: Sequence[str]) -> None:
    """Raise for an unknown name of an option or in a configuration, and suggest the nearest one."""
    command = {"run": run, "report": report}.get(str(args[0]) if args else "")
    if command is None:
        return
    options = command.__annotations__.keys() - {"return"}
    words = [str(word)[2:].partition("=")[0] for word in args if str(word).startswith("--")]
    _require_known(
        "an option of the command",
        [word.partition(".")[0].rstrip("+") for word in words],
        options | {"config", "help", "print_config"},
    )
    for place, word in enumerate(args):
        name, _, value = str(word).partition("=")
        path = Path(value or next(iter(args[place + 1 : place + 2]), ""))
        if name != "--config" or not path.is_file():
            continue
        content = read_yaml(path)
        if not isinstance(content, Mapping):
            continue
        _require_known(f"an option in {path}", content, options)
        grids = content.get("grids")
        for grid in grids if isinstance(grids, list) else []:
            if isinstance(grid, Mapping):
                _require_known(f"a key of a grid in {path}", grid, {f.name for f in fields(Grid)})


def _require_known(what: str, names: Iterable[Any], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(
                f"Expected {what} to be one of {', '.join(sorted(known))}, but got {name!r}."
                f"{nearest(str(name), known)}"
            )


def parse_seconds(given: float | str | None) -> float | None:
    """Return a time in seconds.

    Args:
        given: Such as ``"500s"``, ``"8m"``, ``"2h"``, ``"500"`` or 500; None stays None.

    Raises:
        ValueError: If it is none of these.

    Example:
        >>> parse_seconds("8m"), parse_seconds("500")
        (480.0, 500.0)
    """
    if given is None:
        return None
    text = str(given)
    unit = _UNITS.get(text[-1:], 0.0)
    try:
        seconds = float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise ValueError(
            f"Expected argument `budget` to be a time above 0, such as 500s, 8m or 2h, but got "
            f"{given!r}."
        )
    return seconds


def _run(
    fit: Fit,
    base: Any,
    grids: Sequence[Grid],
    options: dict[str, Any] | None,
    test_images: int | None,
    suspects: int,
    device: str,
    out: Path,
    networks: Path,
    data: Path | None,
    budget: float | str | None,
    jobs: int | None,
    executor: ExecutorName,
    address: str | None,
    threads: int,
    any_code: bool,
    progress: bool,
) -> int:
    seconds = parse_seconds(budget)
    counts = {"threads": threads, "test_images": test_images, "suspects": suspects}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"Expected argument `{name}` to be at least 1, but got {value}.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    data = None if data is None else data.absolute()
    places = Places(out, networks.absolute(), data)
    for argument, folder in (("out", places.results), ("networks", places.networks)):
        check_writable(folder / "trial.json", argument)
    cells = cells_of(
        grids,
        Path(os.fspath(base)).absolute(),
        options=options,
        device=device,
        test_images=test_images,
        suspects=suspects,
        data=data,
    )
    _check_networks(cells, places, fit, any_code)
    count = 1 if jobs is None and executor != "ray" else jobs
    with open_executor(executor, count, address) as opened, _progress(progress) as say:
        summary: Summary = run_benchmark(
            *(cells, places, opened, fit),
            budget=seconds,
            threads=threads,
            any_code=any_code,
            say=say,
        )
    print(f"{summary}; results are in {out}")
    return _FAILED if summary.failed else 0


def _check_networks(cells: Sequence[Cell], places: Places, fit: Fit, any_code: bool) -> None:
    """Check the configurations of networks that are not trained yet, one for all seeds."""
    recipes = {replace(cell.network, seed=0): cell.network for cell in cells}
    for recipe in recipes.values():
        folder = NetworkFolder(places.networks, recipe, any_code)
        if folder.figures() is None:
            folder.check(fit, places.data)


@contextmanager
def _progress(shown: bool) -> Iterator[Callable[[str, int, int], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    with Progress(*columns, console=console, disable=not shown, transient=True) as bar:
        task = bar.add_task("networks and cells", total=None)

        def say(line: str, done: int, total: int) -> None:
            console.print(line)
            bar.update(task, completed=done, total=total)

        yield say


def _report(results: Path, out: Path, plots: bool) -> int:
    files = write_report(results, out, plots)
    if plots and find_spec("matplotlib") is None:
        print('No plots: `pip install "lightning-mnp[plots]"` adds matplotlib.')
    print(f"{len(files)} files written: {files[0]} and others beside it")
    return 0

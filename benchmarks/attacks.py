"""Train a network with each attack and make the table of attacks; go on where it stopped.

    python -m benchmarks.attacks --data ~/data/cifar10
    python -m benchmarks.attacks --data ~/data/imagenette --base imagenette-2core

Each network is trained by `lightning-mnp fit` from the configurations in `examples/attacks`, its
folder keeps the checkpoint, the trigger and the log. CA and ASR are then measured by
`lightning-mnp test` with the saved trigger, on images of 8 bits.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_mnp.benchmark.executors import ENVIRONMENT
from lightning_mnp.benchmark.records import read_json, write_json

EXAMPLES = Path(__file__).parents[1] / "examples" / "attacks"
NOTED_EVERY = 30.0  # seconds between two notes of the time that a training has taken


@dataclass(frozen=True)
class Recipe:
    """How one network is made: configurations on top of the base, and what must exist first."""

    overlays: tuple[str, ...] = ()
    needs_clean: bool = False
    epochs: int | None = None  # where the base's are not right
    width: int | None = None  # of the network, where it is not the base's
    options: tuple[str, ...] = ()  # more of the command line, for training only


CIFAR10 = {
    "clean": Recipe(),
    "badnets": Recipe(("badnets",)),
    "trojan": Recipe(("trojan",), needs_clean=True),
    "blend": Recipe(("blend",)),
    "cl": Recipe(("cl",), needs_clean=True),
    "sig": Recipe(("sig",)),
    "iab": Recipe(("iab",)),
    "wanet": Recipe(("wanet",)),
    "fc": Recipe(("fc",), needs_clean=True),
    "dfst": Recipe(("dfst",)),
    "lira": Recipe(("lira",)),
    "badnets-1percent": Recipe(("badnets", "badnets-1percent")),
    "badnets-1percent-20epochs": Recipe(("badnets", "badnets-1percent"), epochs=20),
    "badnets-all-to-all": Recipe(("badnets", "badnets-all-to-all")),
}

IMAGENETTE = {
    "clean": Recipe(),
    "badnets": Recipe(("badnets-imagenette",)),
    "trojan": Recipe(("trojan-imagenette",), needs_clean=True),
    "blend": Recipe(("blend",)),
    "cl": Recipe(("cl-imagenette",), needs_clean=True),
    "wanet": Recipe(("wanet",)),
    "fc": Recipe(("fc-imagenette",), needs_clean=True),
}

RECIPES = {"cifar10-2core": CIFAR10, "imagenette-2core": IMAGENETTE}


@dataclass
class Task:
    """One network to train and to measure."""

    name: str
    base: str
    recipe: Recipe
    data: Path
    out: Path
    clean: Path | None = None  # folder of the clean network that attacks are made with
    precision: str | None = None  # of the trainer, where it is not the base's

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self.out / self.name

    @property
    def checkpoint(self) -> Path:
        """Its weights, and all that a training needs to go on."""
        return self.folder / "checkpoints" / "last.ckpt"

    @property
    def result(self) -> Path:
        """The figures; there when it is finished."""
        return self.folder / "result.json"

    def command(self, subcommand: str) -> list[str]:
        """Return the start of a command line for this network."""
        command = [
            *(sys.executable, "-m", "lightning_mnp.cli", subcommand),
            *("--config", str(EXAMPLES / f"{self.base}.yaml")),
        ]
        if self.precision is not None:
            command += ["--trainer.precision", self.precision]
        return command

    def width(self) -> list[str]:
        """Return the option of the network's width, where it is not the base's."""
        width = self.recipe.width
        return [] if width is None else ["--model.width", str(width)]

    def fit(self) -> None:
        """Train, from the latest checkpoint where there is one."""
        command = self.command("fit")
        for overlay in self.recipe.overlays:
            command += ["--config", str(EXAMPLES / f"{overlay}.yaml")]
        command += [*self.width(), *self.recipe.options, "--data.root", str(self.data)]
        command += ["--trainer.default_root_dir", str(self.folder)]
        command += ["--trainer.enable_progress_bar", "false"]
        if self.recipe.epochs is not None:
            command += ["--trainer.max_epochs", str(self.recipe.epochs)]
            command += ["--trainer.check_val_every_n_epoch", str(self.recipe.epochs)]
        if self.recipe.needs_clean:
            clean = (self.clean or self.out / "clean") / "checkpoints" / "last.ckpt"
            command += ["--data.attack.reference.checkpoint", str(clean)]
            if self.name == "fc":
                command += ["--model.checkpoint", str(clean)]
        if self.checkpoint.exists():
            command += ["--ckpt_path", str(self.checkpoint)]
        else:  # stopped before the first checkpoint
            (self.folder / "config.yaml").unlink(missing_ok=True)
        started = time.perf_counter() - self.spent()

        def note(finished: bool = False) -> None:
            self.note(seconds=time.perf_counter() - started, finished=finished)

        self.run(command, "fit.log", note)
        note(finished=True)

    def test(self) -> dict[str, float]:
        """Measure CA and, with the saved trigger, ASR."""
        command = self.command("test")
        command += [*self.width(), "--data.root", str(self.data)]
        command += ["--ckpt_path", str(self.checkpoint)]
        command += ["--trainer.enable_progress_bar", "false"]
        trigger = self.checkpoint.with_name("trigger.safetensors")
        if trigger.exists():
            command += ["--data.attack", "lightning_mnp.attacks.SavedTrigger"]
            command += ["--data.attack.path", str(trigger)]
        figures = self.folder / "metrics"
        command += ["--trainer.logger", "lightning.pytorch.loggers.CSVLogger"]
        command += ["--trainer.logger.save_dir", str(figures), "--trainer.logger.name", ""]
        command += ["--trainer.logger.version", "test"]
        self.run(command, "test.log")
        names, *rows = (figures / "test" / "metrics.csv").read_text().splitlines()
        values = dict(zip(names.split(","), rows[-1].split(","), strict=True))
        return {
            key.removeprefix("test/"): float(value)
            for key, value in values.items()
            if key.startswith("test/") and value
        }

    def run(self, command: list[str], log: str, note: Callable[[], None] | None = None) -> None:
        """Run a command line in a process of its own, on one core; call `note` now and then."""
        environment = {**os.environ, **ENVIRONMENT}
        with (self.folder / log).open("a") as file:
            file.write(" ".join(command) + "\n")
            file.flush()
            process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
            while True:
                try:
                    code = process.wait(NOTED_EVERY)
                    break
                except subprocess.TimeoutExpired:
                    if note is not None:
                        note()
        if code:
            raise RuntimeError(f"{self.name}: {log} ends with exit code {code}: {self.folder}")

    def noted(self) -> dict[str, Any]:
        """Return what :meth:`note` kept last."""
        path = self.folder / "seconds.json"
        return read_json(path) if path.exists() else {}

    def spent(self) -> float:
        """Say the seconds of training so far, with those before it was stopped."""
        return float(self.noted().get("seconds", 0.0))

    def is_trained(self) -> bool:
        """Say whether training came to its end."""
        figures = self.noted()
        return bool(figures.get("finished", figures))

    def note(self, **figures: Any) -> None:
        """Keep the seconds of training, and whether it is finished."""
        write_json(self.folder / "seconds.json", figures)

    def finish(self) -> dict[str, Any]:
        """Train and measure what is missing."""
        if not self.result.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self.is_trained():
                self.fit()
            result = {**self.test(), "seconds": self.spent()}
            write_json(self.result, result)
            print(f"{self.name}: {result}", flush=True)
        return read_json(self.result)


def table(results: dict[str, dict[str, Any]]) -> str:
    """Write the results as a Markdown table, in percent."""
    lines = [
        "| attack | CA | CA, clean network | ASR | seconds |",
        "| --- | --- | --- | --- | --- |",
    ]
    clean = results.get("clean", {}).get("CA")
    for name, row in results.items():
        other = "" if clean is None else f"{100 * clean:.2f}"
        success = f"{100 * row['ASR']:.2f}" if "ASR" in row else ""
        figures = (f"{100 * row['CA']:.2f}", other, success, f"{row['seconds']:.0f}")
        lines.append(f"| {name} | {' | '.join(figures)} |")
    return "\n".join(lines)


def finish_all(tasks: Sequence[Task], jobs: int) -> None:
    """Train and measure what is missing, so many at a time; print the table, then what failed."""
    failed = []
    results: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(jobs) as pool:
        futures = {task.name: pool.submit(task.finish) for task in tasks}
        for name, future in futures.items():
            try:
                results[name] = future.result()
            except RuntimeError as error:
                failed.append(str(error))
    Console(width=100, markup=False).print(table(results))
    if failed:
        sys.exit("\n".join(failed))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of how networks are trained."""
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, one core each")
    parser.add_argument(
        "--precision",
        help="of the trainer, such as 32-true: on a CPU without bf16 instructions, the bf16-mixed "
        "of the examples takes ten times as long",
    )


def main() -> None:
    """Train and measure every network that is missing, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the images")
    parser.add_argument("--base", choices=sorted(RECIPES), default="cifar10-2core")
    parser.add_argument("--out", type=Path, help="where networks go; runs/attacks/<base>")
    parser.add_argument("--only", nargs="*", help="names of networks; without it, all")
    add_options(parser)
    options = parser.parse_args()
    recipes = RECIPES[options.base]
    out = (options.out or Path("runs/attacks") / options.base).absolute()
    wanted = options.only or list(recipes)
    unknown = sorted(set(wanted) - set(recipes))
    if unknown:
        parser.error(f"--only: expected names out of {list(recipes)}, but got {unknown}")

    def task_of(name: str) -> Task:
        data, precision = options.data.expanduser(), options.precision
        return Task(name, options.base, recipes[name], data, out, precision=precision)

    tasks = [task_of(name) for name in wanted]
    if any(task.recipe.needs_clean for task in tasks):
        task_of("clean").finish()
    finish_all(tasks, options.jobs)


if __name__ == "__main__":
    main()

"""Train, list, audit and sum up the population.

    python -m benchmarks.population train --jobs 2
    python -m benchmarks.population list
    python -m benchmarks.population audit --split choosing --jobs 2
    python -m benchmarks.population table --split reporting --group whole
    python -m benchmarks.population audit --conditions --jobs 2
    python -m benchmarks.population reference --split reporting
    python -m benchmarks.population defend --split reporting --defenses default mnp --jobs 2
    python -m benchmarks.population table --split reporting --defended
    python -m benchmarks.population detect --split reporting --detectors nc mm-bd --jobs 2
    python -m benchmarks.population table --split reporting --detected
    python -m benchmarks.population retune --only cnn-blend-413 --defenses default clp
    python -m benchmarks.population table --retuned
    python -m benchmarks.population keep --split reporting

Every command goes on where it stopped. `train` looks for images in ~/data/cifar10 and
~/data/imagenette, and keeps networks in runs/population; `audit` keeps a file for each audit in
benchmarks/results/population, from which `table` is made. `reference` puts the scores of clean
networks into the package, with which an audit compares its own. `defend` removes the backdoors by
one or several defenses, or by the default without one of its pieces, measures CA and ASR before and
after, and keeps files in `defended` beside the audits. `detect` asks rival detectors, and keeps
files in `detected`. `retune` purifies networks and trains them on with a few poisoned images, and
keeps files in `retuned`. `keep` copies networks to benchmarks/weights, from where `train` takes
them. With `--conditions`, `audit` and `table` are about eight networks, and defense sets that are
small or impure. `rates` measures the training rates behind the estimated minutes; `split` writes
the split file, which is done once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal

from benchmarks.population.ablations import ABLATIONS
from benchmarks.population.architectures import ARCHITECTURES
from benchmarks.population.audits import (
    RESULTS,
    audit_network,
    code_version,
    outcome_file,
    read_audits,
    read_outcomes,
    result_file,
)
from benchmarks.population.conditions import CONDITIONS, NAMED, USUAL, conditions_table
from benchmarks.population.data import load_images
from benchmarks.population.defenses import (
    DEFENSES,
    defend_network,
    defense_version,
    defenses_table,
)
from benchmarks.population.detections import (
    DETECTORS,
    detect_network,
    detection_version,
    detections_table,
)
from benchmarks.population.networks import RECIPES
from benchmarks.population.rates import training_rate
from benchmarks.population.recipes import GROUPS, Recipe
from benchmarks.population.reemergence import (
    CONTROLS,
    POISONED,
    retune_network,
    retuning_table,
    retuning_version,
)
from benchmarks.population.reference import reference_of, write_reference
from benchmarks.population.rescoring import rescored
from benchmarks.population.split import split_of, write_split
from benchmarks.population.table import write_table
from benchmarks.population.training import is_trained, read_row, train_network
from benchmarks.population.weights import keep, restore
from lightning_mnp.benchmark.executors import open_executor
from lightning_mnp.benchmark.jobs import Job, run_jobs

COMMANDS = (
    *("train", "list", "audit", "defend", "detect", "retune", "table", "reference", "keep"),
    *("rates", "split"),
)
# Of a network of ten classes with 500 images.
_AUDIT_PASSES = 22_000
_DEFENSE_PASSES = 80_000  # of the default, the dearest
_DETECTION_PASSES = 310_000  # of NC, the dearest
_RETUNING_PASSES = 20_000  # five epochs, and measuring


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says.

    Args:
        arguments: Those behind the program's name; of this process if None.

    Returns:
        The exit code: 1 if some network could not be trained, audited or defended.
    """
    options = _parse(arguments)
    chosen = _chosen(options)
    if options.command == "train":
        return _train(chosen, options)
    if options.command == "audit":
        return _audit(chosen, options)
    if options.command == "defend":
        return _defend(chosen, options)
    if options.command == "detect":
        return _detect(chosen, options)
    if options.command == "retune":
        return _retune(chosen, options)
    if options.command == "list":
        print(list_of(chosen, options.folder))
    elif options.command == "table" and options.defended:
        outcomes = [
            row
            for row in read_outcomes("defended", options.results)
            if options.defenses is None or row["defense"] in options.defenses
        ]
        print(defenses_table(chosen, outcomes, options.sets))
    elif options.command == "table" and options.detected:
        detections = read_outcomes("detected", options.results)
        print(detections_table(chosen, detections, _audits(options), options.sets))
    elif options.command == "table" and options.retuned:
        wanted = (*CONTROLS, *(options.defenses or (*DEFENSES, *ABLATIONS)))
        outcomes = [
            row for row in read_outcomes("retuned", options.results) if row["defense"] in wanted
        ]
        print(retuning_table(chosen, outcomes, options.sets))
    elif options.command == "table" and options.conditions:
        audits = [row for row in _audits(options) if row["set"] < options.sets]
        print(conditions_table(chosen, audits))
    elif options.command == "table":
        audits = _audits(options)
        for split in dict.fromkeys(split_of(each.architecture, each.seed) for each in chosen):
            part = [each for each in chosen if split_of(each.architecture, each.seed) == split]
            print(write_table(split, part, audits, options.sets))
    elif options.command == "reference":
        audits = [row for row in read_audits(options.results) if row["set"] < options.sets]
        write_reference(reference_of(chosen, audits, code_version()))
    elif options.command == "keep":
        for recipe in chosen:
            if is_trained(recipe, options.folder):
                keep(recipe, options.folder)
    elif options.command == "rates":
        for name in ARCHITECTURES:
            print(f"{name}: {training_rate(name):.0f} images/s", flush=True)
    else:
        write_split({recipe.name: (recipe.architecture, recipe.seed) for recipe in RECIPES})
    return 0


def list_of(recipes: Sequence[Recipe], folder: Path) -> str:
    """Write one line for each network, and the sum of the estimated minutes.

    Args:
        recipes: The networks.
        folder: Where trained ones are kept.

    Returns:
        Markdown.
    """
    columns = ("name", "split", "architecture", "attack", "minutes", "trained", "CA", "ASR")
    lines = [" | ".join(columns), " | ".join(["---"] * len(columns))]
    left = 0.0
    for recipe in recipes:
        figures = ["no", "", ""]
        if is_trained(recipe, folder):
            row = read_row(recipe, folder)
            learned = row["learned"] is not False
            figures = ["yes" if learned else "yes, attack not learned", f"{100 * row['CA']:.1f}"]
            figures.append("" if row["ASR"] is None else f"{100 * row['ASR']:.1f}")
        else:
            left += recipe.minutes
        split = split_of(recipe.architecture, recipe.seed)
        kind = f"{recipe.kind}, 1%" if recipe.is_sparse else recipe.kind
        line = [recipe.name, split, recipe.architecture, kind, f"{recipe.minutes:.1f}", *figures]
        lines.append(" | ".join(line))
    table = "\n".join(f"| {line} |" for line in lines)
    total = sum(recipe.minutes for recipe in recipes)
    return f"{table}\n\n{len(recipes)} networks, {total:.0f} minutes, of which {left:.0f} are left."


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.population",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", nargs="?", choices=COMMANDS, default="list")
    parser.add_argument("--list", action="store_true", help="the same as the command list")
    parser.add_argument("--split", choices=("choosing", "reporting"), help="without it, both")
    parser.add_argument(
        "--group",
        choices=GROUPS,
        help="networks trained whole, trained on with an attack, or by an attacker who knows the "
        "defense; without it, all",
    )
    parser.add_argument("--only", nargs="+", help="names of networks; without it, all")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--executor", choices=("processes", "ray"), default="processes")
    parser.add_argument("--address", help="of a Ray cluster; without it, one is started here")
    parser.add_argument("--budget", type=float, help="seconds; begin nothing that takes longer")
    parser.add_argument("--sets", type=int, default=2, help="defense sets of each network")
    parser.add_argument(
        "--conditions",
        action="store_true",
        help="a few named networks, with defense sets that are not as they should be",
    )
    parser.add_argument("--defended", action="store_true", help="the table of defenses")
    parser.add_argument(
        "--defenses",
        nargs="+",
        choices=(*DEFENSES, *ABLATIONS),
        help="what `defend` and `retune` run (without it, the default), or the table is of (all)",
    )
    parser.add_argument(
        "--rescored", action="store_true", help="judge kept audits anew by the present rules"
    )
    parser.add_argument("--detected", action="store_true", help="the table of detectors")
    parser.add_argument(
        "--detectors",
        nargs="+",
        choices=DETECTORS,
        default=list(DETECTORS),
        help="what `detect` runs; without it, all",
    )
    parser.add_argument(
        "--retuned", action="store_true", help="the table of networks that were trained on"
    )
    parser.add_argument("--renew", action="store_true", help="do again what other code has done")
    parser.add_argument("--data", type=Path, default=Path("~/data"), help="folder of data sets")
    parser.add_argument("--folder", type=Path, default=Path("runs/population"), help="networks")
    parser.add_argument("--results", type=Path, default=RESULTS, help="audits")
    options = parser.parse_args(arguments)
    options.command = "list" if options.list else options.command
    options.data = options.data.expanduser()
    if options.conditions and options.command not in ("audit", "table"):
        parser.error(f"--conditions: only `audit` and `table` take it, but got {options.command!r}")
    for name in ("rescored", "defended", "detected", "retuned"):
        if getattr(options, name) and options.command != "table":
            parser.error(f"--{name}: only `table` takes it, but got {options.command!r}")
    if options.jobs < 1:
        parser.error(f"--jobs: expected at least 1, but got {options.jobs}")
    if options.command == "reference":
        if options.split is None:
            parser.error("--split: `reference` takes the networks of one split; name it")
        for name in ("only", "group"):  # the file in the package would be that of a part
            if getattr(options, name) is not None:
                parser.error(f"--{name}: `reference` takes all clean networks; leave it out")
    unknown = sorted(set(options.only or ()) - {recipe.name for recipe in RECIPES})
    if unknown:
        parser.error(f"--only: expected names as `list` has them, but got {unknown}")
    return options


def _chosen(options: argparse.Namespace) -> list[Recipe]:
    named: Collection[str] | None = NAMED if options.conditions else None
    if options.conditions and options.command == "table":  # also of others that were audited so
        named = {*NAMED, *(row["network"] for row in read_audits(options.results / "conditions"))}
    return [
        recipe
        for recipe in RECIPES
        if options.split in (None, split_of(recipe.architecture, recipe.seed))
        and options.group in (None, recipe.group)
        and (named is None or recipe.name in named)
        and (options.only is None or recipe.name in options.only)
    ]


def _audits(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Read the audits of all networks, also those under other conditions if these are wanted."""
    audits = read_audits(options.results)
    if options.conditions:
        audits += read_audits(options.results / "conditions")
    return list(map(rescored, audits)) if options.rescored else audits


def _train(chosen: Sequence[Recipe], options: argparse.Namespace) -> int:
    needed = {recipe.needs for recipe in chosen}  # also for images that CL has poisoned
    references = [recipe for recipe in RECIPES if recipe.name in needed]
    for recipe in (*references, *chosen):
        restore(recipe, options.folder)
    missing = [recipe for recipe in chosen if not is_trained(recipe, options.folder)]
    first = [recipe for recipe in references if not is_trained(recipe, options.folder)]
    later = [recipe for recipe in missing if recipe not in first]
    jobs = [
        Job(
            each.name,
            60 * each.minutes,
            train_network,
            (each, options.data, options.folder),
            needs=() if each.needs is None else (each.needs,),
        )
        for each in (*first, *later)
    ]

    def line_of(job: Job, row: dict[str, Any]) -> str:
        asr = "" if row["ASR"] is None else f", ASR {100 * row['ASR']:.1f}"
        note = ", attack not learned" if row["learned"] is False else ""
        figures = f"CA {100 * row['CA']:.1f}{asr}{note}, {row['processor_seconds']:.0f} s"
        return f"{figures} (estimated: {job.seconds:.0f} s)"

    return _run(jobs, options, line_of)


def _audit(chosen: Sequence[Recipe], options: argparse.Namespace) -> int:
    version, there = code_version(), {}
    for row in _audits(options):
        key = row["network"], row["condition"], row["set"]
        there[key] = row["weights_sha256"], row["version"]
    jobs = []
    trained = _trained(chosen, options)
    for recipe, condition in product(trained, CONDITIONS[1:] if options.conditions else (USUAL,)):
        if not condition.fits(recipe):
            continue
        weights = read_row(recipe, options.folder)["weights_sha256"]
        seconds = _AUDIT_PASSES / ARCHITECTURES[recipe.architecture].rate
        for number in range(options.sets):
            done = there.get((recipe.name, condition.name, number))
            if _is_due(done, weights, version if options.renew else None):
                places = (options.data, options.folder, options.results)
                arguments = (recipe, number, *places, None, condition)
                name = result_file(recipe, number, condition=condition).stem
                jobs.append(Job(name, seconds, audit_network, arguments))

    def line_of(job: Job, row: dict[str, Any]) -> str:
        figures = f"{row['verdict']}, class {row['target_class']}, score {row['score']}"
        return f"{row['kind']}, {figures}, {row['wall_seconds']:.0f} s"

    return _run(jobs, options, line_of)


def _defend(chosen: Sequence[Recipe], options: argparse.Namespace) -> int:
    jobs = _due_jobs(chosen, options, "defend")

    def line_of(job: Job, row: dict[str, Any]) -> str:
        rates = [name for name in ("CA", "ASR") if row[name] is not None]
        figures = [
            f"{name} {100 * row[name]:.1f} to {100 * row[f'{name}_after']:.1f}" for name in rates
        ]
        spent = f"{row['pruned']} filters, {row['processor_seconds']:.0f} s"
        return f"{', '.join(figures)}, {spent}"

    return _run(jobs, options, line_of)


def _detect(chosen: Sequence[Recipe], options: argparse.Namespace) -> int:
    jobs = _due_jobs(chosen, options, "detect")

    def line_of(job: Job, row: dict[str, Any]) -> str:
        found = f"{row['verdict']}, class {row['target_class']}"
        return f"{row['kind']}, {found}, {row['processor_seconds']:.0f} s"

    return _run(jobs, options, line_of)


def _retune(chosen: Sequence[Recipe], options: argparse.Namespace) -> int:
    attacked = [recipe for recipe in chosen if not recipe.is_clean]
    if chosen and not attacked:
        print(
            "all networks named are clean, and no backdoor can come back in them; name backdoored "
            "ones, and each is compared with its clean twin",
            file=sys.stderr,
            flush=True,
        )
    jobs = _due_jobs(attacked, options, "retune")

    def line_of(job: Job, row: dict[str, Any]) -> str:
        figures = [f"ASR {100 * row['ASR_after']:.1f}"] + [
            f"{each['poisoned']}: {100 * each['ASR']:.1f}" for each in row["retuned"]
        ]
        return f"{', '.join(figures)}, {row['processor_seconds']:.0f} s"

    return _run(jobs, options, line_of)


def _due_jobs(
    chosen: Sequence[Recipe],
    options: argparse.Namespace,
    command: Literal["defend", "detect", "retune"],
) -> list[Job]:
    """The methods to run on the trained networks that have learned their attack."""
    work: Callable[..., dict[str, Any]]
    version_of: Callable[[str], str]
    if command == "defend":
        methods, kind = options.defenses or ["default"], "defended"
        work, version_of = defend_network, defense_version
        passes = _DEFENSE_PASSES
    elif command == "retune":
        methods, kind = [*CONTROLS, *(options.defenses or ["default"])], "retuned"
        work, version_of = retune_network, retuning_version
        passes = _DEFENSE_PASSES + _RETUNING_PASSES * len(POISONED)
    else:
        methods, kind = options.detectors, "detected"
        work, version_of = detect_network, detection_version
        passes = _DETECTION_PASSES
    there = {
        (row["network"], row["defense"], row["set"]): (row["weights_sha256"], row["version"])
        for row in read_outcomes(kind, options.results)
    }
    jobs = []
    for recipe, number, method in product(_trained(chosen, options), range(options.sets), methods):
        row = read_row(recipe, options.folder)
        if row["learned"] is False:
            continue
        done = there.get((recipe.name, method, number))
        version = version_of(method) if options.renew else None
        if _is_due(done, row["weights_sha256"], version):
            seconds = passes / ARCHITECTURES[recipe.architecture].rate
            arguments = (recipe, number, method, options.data, options.folder, options.results)
            name = outcome_file(kind, recipe, number, method).stem
            jobs.append(Job(name, seconds, work, arguments))
    return jobs


def _trained(chosen: Sequence[Recipe], options: argparse.Namespace) -> list[Recipe]:
    """Return those networks that are trained, and tell how many are not."""
    trained = [recipe for recipe in chosen if is_trained(recipe, options.folder)]
    if missing := len(chosen) - len(trained):
        print(
            f"{missing} of {len(chosen)} networks are not trained, and are left out; "
            "`train` with the same options makes them",
            file=sys.stderr,
            flush=True,
        )
    return trained


def _is_due(done: tuple[str, str] | None, weights: str, version: str | None) -> bool:
    """Whether a result is missing, of other weights, or of another version if one is wanted."""
    return done is None or done[0] != weights or version not in (None, done[1])


def _data_of(job: Job) -> set[str]:
    """The data sets that a job reads."""
    recipes = [each for each in job.arguments if isinstance(each, Recipe)]
    first = {"digits" for recipe in recipes if recipe.pretrained == "digits"}
    return {recipe.data for recipe in recipes} | first


def _run(
    jobs: Sequence[Job], options: argparse.Namespace, line_of: Callable[[Job, dict[str, Any]], str]
) -> int:
    for name in sorted({name for job in jobs for name in _data_of(job)}):
        load_images(name, options.data, options.folder / "data")  # once, not in each process
    failed = 0
    with open_executor(options.executor, options.jobs, options.address, apart=True) as executor:
        for job, row in run_jobs(jobs, executor, options.budget):
            if isinstance(row, BaseException):
                failed += 1
                print(f"{job.name}: {row!r}", file=sys.stderr, flush=True)
                continue
            print(f"{job.name}: {line_of(job, row)}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

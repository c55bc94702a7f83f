"""Train the networks of the study of the default: some to choose on, others to report on.

    python -m benchmarks.attacks --data ~/data/cifar10
    python -m benchmarks.study --data ~/data/cifar10
    python -m benchmarks.study --data ~/data/imagenette --base imagenette-2core

Constants of the method are chosen on the networks of `benchmarks.attacks`, `benchmarks.networks`
and on those whose names begin with `tune` here; tables report the others. Those have other seeds,
target classes, triggers and widths, with and without weight decay. The `imbalanced` networks are
clean and saw few images of one class. Clean reference networks for Trojan and CL come from
`benchmarks.attacks`. No constant is chosen on those of Imagenette. The command goes on where it
stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.attacks import Recipe, Task, add_options, finish_all


def _recipe(
    *overlays: str,
    seed: int,
    target: int | None = None,
    width: int = 16,
    epochs: int = 6,
    decay: bool = True,
    more: tuple[str, ...] = (),
) -> Recipe:
    options = ["--seed_everything", str(seed)]
    if target is not None:
        holder = "data" if overlays[0] not in ("wanet", "iab", "dfst", "lira") else "model"
        options += [f"--{holder}.attack.target_class", str(target)]
        options += [f"--{holder}.attack.seed", str(seed)]
    if not decay:
        options += ["--model.weight_decay", "0"]
    return Recipe(
        overlays,
        needs_clean=bool({"trojan", "cl"} & set(overlays)),
        epochs=epochs,
        width=width,
        options=(*options, *more),
    )


def _imbalanced(rare_class: int, rare_share: float, seed: int, width: int) -> Recipe:
    more = (
        *("--data", "benchmarks.imbalance.ImbalancedCIFAR10"),
        *("--data.rare_class", str(rare_class)),
        *("--data.rare_share", str(rare_share)),
    )
    return _recipe(seed=seed, width=width, more=more)


TUNE = {
    "tune-clean-1": _recipe(seed=1),
    "tune-clean-2": _recipe(seed=2, width=8),
    "tune-clean-3": _recipe(seed=3, decay=False),
    "tune-clean-4": _recipe(seed=4, width=8, decay=False),
    "tune-wanet": _recipe("wanet", seed=103, target=7, width=8, epochs=10),
    "tune-lira": _recipe("lira", seed=109, target=1, width=8, epochs=10),
    "tune-trojan": _recipe("trojan", seed=121, target=4, width=8),
    "tune-sig": _recipe("sig", seed=125, target=3, width=8),
    "tune-clean-5": _recipe(seed=5, width=8, decay=False),
    "tune-clean-6": _recipe(seed=6, width=8, decay=False),
    "tune-blend-1percent": _recipe(
        "blend", seed=126, target=1, more=("--data.attack.poison_rate", "0.01")
    ),
    "tune-blend-1percent-b": _recipe(
        "blend", seed=132, target=8, more=("--data.attack.poison_rate", "0.01")
    ),
    "tune-blend-0.5percent": _recipe(
        "blend", seed=131, target=2, more=("--data.attack.poison_rate", "0.005")
    ),
    "tune-blend-0.5percent-b": _recipe(
        "blend", seed=133, target=5, epochs=9, more=("--data.attack.poison_rate", "0.005")
    ),
    "tune-cl": _recipe("cl", seed=134, target=0, width=8),
    "tune-badnets": _recipe("badnets", seed=135, target=3, width=8, decay=False),
    "tune-imbalanced": _imbalanced(rare_class=3, rare_share=0.2, seed=7, width=8),
    "tune-all-to-all": _recipe("badnets", "badnets-all-to-all", seed=127, width=8, epochs=20),
    "tune-blend-all-to-all": _recipe(
        "blend", seed=128, width=8, epochs=12, more=("--data.attack.mode", "all-to-all")
    ),
}

REPORT = {
    "clean-11": _recipe(seed=11, width=8),
    "clean-12": _recipe(seed=12),
    "badnets": _recipe("badnets", seed=101, target=2),
    "trojan": _recipe("trojan", seed=102, target=3),
    "wanet": _recipe("wanet", seed=116, target=4, width=8, epochs=10),
    "clean-13": _recipe(seed=13, width=8, decay=False),
    "sig": _recipe("sig", seed=104, target=6),
    "blend": _recipe("blend", seed=105, target=4, width=8),
    "clean-14": _recipe(seed=14, width=8, epochs=8),
    "cl": _recipe("cl", seed=106, target=5),
    "iab": _recipe("iab", seed=107, target=8, width=8, epochs=10),
    "clean-15": _recipe(seed=15, decay=False),
    "dfst": _recipe("dfst", seed=108, target=9, width=8, epochs=10),
    "lira": _recipe("lira", seed=124, target=5, width=8, epochs=10),
    "clean-16": _recipe(seed=16, width=8),
    "blend-1percent": _recipe(
        "blend", seed=110, target=3, more=("--data.attack.poison_rate", "0.01")
    ),
    "badnets-all-to-all": _recipe("badnets", "badnets-all-to-all", seed=111, width=8, epochs=20),
    "badnets-all-to-all-b": _recipe(
        *("badnets", "badnets-all-to-all"),
        seed=129,
        width=8,
        epochs=20,
        more=("--data.attack.pattern", "random", "--data.attack.corner", "upper-left"),
    ),
    "blend-all-to-all": _recipe(
        "blend", seed=130, width=8, epochs=12, more=("--data.attack.mode", "all-to-all")
    ),
    "clean-17": _recipe(seed=17, width=8, decay=False),
    "badnets-8": _recipe("badnets", seed=112, target=5, width=8, decay=False),
    "trojan-8": _recipe("trojan", seed=113, target=1, width=8),
    "clean-18": _recipe(seed=18, width=8, epochs=4),
    "blend-0.5percent": _recipe(
        "blend", seed=114, target=6, more=("--data.attack.poison_rate", "0.005")
    ),
    "sig-8": _recipe("sig", seed=115, target=2, width=8),
    "clean-19": _recipe(seed=19),
    "clean-20": _recipe(seed=20, width=8),
    "trojan-8-b": _recipe("trojan", seed=117, target=6, width=8),
    "cl-8": _recipe("cl", seed=118, target=9, width=8),
    "blend-16": _recipe("blend", seed=119, target=8),
    "badnets-16": _recipe("badnets", seed=120, target=7, decay=False),
    "blend-adaptive": _recipe("blend", "adaptive", seed=122, target=3, width=8),
    "badnets-adaptive": _recipe("badnets", "adaptive", seed=123, target=6, width=8),
    "clean-21": _recipe(seed=21, width=8, decay=False),
    "clean-22": _recipe(seed=22, width=8, epochs=8),
    "clean-23": _recipe(seed=23),
    "clean-24": _recipe(seed=24, width=8),
    "clean-25": _recipe(seed=25, width=8, decay=False),
    "clean-26": _recipe(seed=26, width=8, epochs=5),
    "clean-27": _recipe(seed=29, width=8, decay=False),
    "clean-28": _recipe(seed=30, width=8),
    "imbalanced": _imbalanced(rare_class=0, rare_share=0.25, seed=27, width=16),
    "imbalanced-8": _imbalanced(rare_class=6, rare_share=0.15, seed=28, width=8),
}

IMAGENETTE = {
    "clean-41": _recipe(seed=41, width=8, epochs=10),
    "badnets-64": _recipe("badnets-imagenette", seed=141, target=3, width=8, epochs=10),
    "clean-42": _recipe(seed=42, width=8, epochs=10, decay=False),
    "blend-64": _recipe("blend", seed=142, target=6, width=8, epochs=10),
    "wanet-64": _recipe("wanet", seed=143, target=2, width=8, epochs=10),
    "sig-64": _recipe("sig", seed=144, target=8, width=8, epochs=10),
    "clean-43": _recipe(seed=43, width=8, epochs=10),
}

NETWORKS = {"cifar10-2core": {**TUNE, **REPORT}, "imagenette-2core": IMAGENETTE}


def main() -> None:
    """Train and measure every network that is missing, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the images")
    parser.add_argument("--base", choices=sorted(NETWORKS), default="cifar10-2core")
    parser.add_argument("--out", type=Path, help="where networks go; runs/study[-imagenette]")
    parser.add_argument("--reference", type=Path, default=Path("runs/attacks/cifar10-2core/clean"))
    parser.add_argument("--only", nargs="*", help="names of networks; without it, all")
    add_options(parser)
    options = parser.parse_args()
    recipes = NETWORKS[options.base]
    unknown = sorted(set(options.only or ()) - set(recipes))
    if unknown:
        parser.error(f"--only: expected names out of {list(recipes)}, but got {unknown}")
    folder = "study" if options.base == "cifar10-2core" else "study-imagenette"
    data, out = options.data.expanduser(), (options.out or Path("runs") / folder).absolute()
    reference = options.reference.absolute()

    def task_of(name: str) -> Task:
        return Task(name, options.base, recipes[name], data, out, reference, options.precision)

    tasks = [task_of(name) for name in options.only or recipes]
    if any(task.recipe.needs_clean for task in tasks):
        if reference.parent == out and reference.name in recipes:
            task_of(reference.name).finish()  # others read its last checkpoint, finished or not
        elif not (reference / "result.json").exists():
            parser.error(
                f"--reference: expected the folder of a clean network that was trained to its end, "
                f"but {reference} has no result.json. Train it with benchmarks.attacks, or name "
                f"one of this study, such as {out / 'clean-12'}."
            )
    finish_all(tasks, options.jobs)


if __name__ == "__main__":
    main()

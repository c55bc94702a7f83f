"""Draw the paper's Figure 1 for a network and its trigger: CLC and BLC of every filter, by layer.

python examples/figure1.py --network runs/attacks/cifar10-2core/badnets/checkpoints

The folder holds last.ckpt, a CIFAR ResNet-18, and trigger.safetensors, as `lightning-mnp fit` with
an attack leaves them. Each point is a filter; right means that clean images need it, up that the
backdoor does; dark means large weights. Figures go to changes.csv, the picture (if matplotlib is
installed) to figure1.png.
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter
from pathlib import Path
from typing import Any

from rich.progress import Progress
from torch.utils.data import DataLoader, Subset

from lightning_mnp import load_into, read_state_dict
from lightning_mnp.attacks import SavedTrigger
from lightning_mnp.benchmark import LossChanges, loss_changes
from lightning_mnp.data import CIFAR10DataModule
from lightning_mnp.models import cifar_resnet18


def spaced(loader: DataLoader[Any], most: int) -> DataLoader[Any]:
    """Return a loader of every n-th image, so that there are at most so many, of all classes."""
    images: Any = loader.dataset
    rows = range(0, len(images), -(-len(images) // most))
    return DataLoader(
        Subset(images, rows), batch_size=loader.batch_size, collate_fn=loader.collate_fn
    )


def write_figures(changes: LossChanges, path: Path) -> None:
    """Write one line for each filter."""
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        lines.writerow(["layer", "filter", "CLC", "BLC", "l2 norm", "kind"])
        columns = (changes.clc, changes.blc, changes.magnitude)
        numbers = zip(*(column.tolist() for column in columns), strict=True)
        for name, row, kind in zip(changes.names, numbers, changes.kinds(), strict=True):
            lines.writerow([*name, *row, kind])


def draw(changes: LossChanges, path: Path) -> None:
    """Draw one panel for each layer."""
    from matplotlib.figure import Figure

    layers = changes.layers()
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(3 * columns, 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels[len(layers) :]:
        panel.set_axis_off()
    for panel, layer in zip(panels, layers, strict=False):
        chosen = [place for place, (name, _) in enumerate(changes.names) if name == layer]
        panel.axhline(0.0, color="gray", linewidth=0.5)
        panel.axvline(0.0, color="gray", linewidth=0.5)
        values = (changes.clc[chosen].numpy(), changes.blc[chosen].numpy())
        panel.scatter(*values, c=changes.magnitude[chosen].numpy(), cmap="Blues", edgecolors="0.5")
        panel.set(title=layer, xlabel="CLC", ylabel="BLC")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", type=Path, required=True, help="folder with the two files")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with CIFAR-10")
    parser.add_argument("--images", type=int, default=500, help="test images of each kind")
    parser.add_argument("--layers", nargs="*", default=["*"], help="name patterns of layers")
    parser.add_argument("--output", type=Path, default=Path("runs/figure1"), help="folder")
    options = parser.parse_args()

    weights = read_state_dict(options.network / "last.ckpt")
    stem = next(weight for name, weight in weights.items() if name.endswith("conv1.weight"))
    network = cifar_resnet18(width=stem.shape[0])
    load_into(network, weights)
    attack = SavedTrigger(options.network / "trigger.safetensors")
    data = CIFAR10DataModule(options.data, attack, on_device=False)
    clean, triggered = (spaced(loader, options.images) for loader in data.test_dataloader())

    with Progress() as bar:
        task = bar.add_task("filters, clean and triggered")
        changes = loss_changes(
            network.eval(),
            clean,
            triggered,
            include=options.layers,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    options.output.mkdir(parents=True, exist_ok=True)
    write_figures(changes, options.output / "changes.csv")
    print(", ".join(f"{count} {kind}" for kind, count in Counter(changes.kinds()).most_common()))
    try:
        draw(changes, options.output / "figure1.png")
    except ModuleNotFoundError:
        print('No picture: `pip install "lightning-mnp[plots]"` adds matplotlib.')


if __name__ == "__main__":
    main()

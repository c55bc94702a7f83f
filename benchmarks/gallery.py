"""Draw the gallery of triggers: clean images, the same with the trigger, the difference x 10.

    python -m benchmarks.gallery --data ~/data/cifar10 --networks runs/attacks/cifar10-2core

Triggers are read from the files that training left beside each network; see `benchmarks.attacks`.
Attacks that craft their training images, CL and FC, get a second file with these.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import make_grid, save_image

from lightning_mnp.attacks import CL, FeatureCollision, ReferenceNetwork, load_trigger
from lightning_mnp.attacks.trigger import read_poisoned_indices
from lightning_mnp.data import CIFAR10DataModule, ImageNetSubsetDataModule

SCALE = 3


def grid(clean: Tensor, triggered: Tensor) -> Tensor:
    """Arrange three rows, in the order of the module's first line.

    Args:
        clean: Images, shape (N, C, H, W), uint8.
        triggered: The same images with the trigger.

    Returns:
        One image with values in [0, 1]; in the last row, gray is no difference.
    """
    before, after = clean.float() / 255.0, triggered.float() / 255.0
    difference = (0.5 + 10.0 * (after - before)).clamp(0.0, 1.0)
    rows = torch.cat([before, after, difference])
    rows = F.interpolate(rows, scale_factor=SCALE, mode="nearest")
    arranged: Tensor = make_grid(rows, nrow=len(clean), padding=SCALE, pad_value=1.0)
    return arranged


def main() -> None:
    """Draw one file for each trigger that there is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the images")
    parser.add_argument("--networks", type=Path, default=Path("runs/attacks/cifar10-2core"))
    parser.add_argument("--out", type=Path, default=Path("docs/reference/attacks/gallery"))
    parser.add_argument("--imagenette", action="store_true", help="the data is Imagenette, 64 px")
    parser.add_argument("--images", type=int, default=8, help="images in a row")
    options = parser.parse_args()
    datamodule: CIFAR10DataModule | ImageNetSubsetDataModule
    if options.imagenette:
        datamodule = ImageNetSubsetDataModule(options.data, preset="imagenette", image_size=64)
    else:
        datamodule = CIFAR10DataModule(options.data)
    test = datamodule.load("test")
    options.out.mkdir(parents=True, exist_ok=True)
    triggers = sorted(options.networks.glob("*/checkpoints/trigger.safetensors"))
    if not triggers:
        parser.error(f"--networks: expected folders with triggers, but got {options.networks}")
    for path in triggers:
        name = path.parent.parent.name
        attack = load_trigger(path)
        chosen = attack.triggered_indices(test.labels, datamodule.num_classes)
        # One image of each class, as far as there are some.
        labels = test.labels[chosen]
        places = [int(chosen[labels == label][0]) for label in labels.unique().tolist()]
        images = test.fetch(places[: options.images])
        grids = {name: grid(images, attack.apply(images))}
        if isinstance(attack, CL | FeatureCollision):
            clean = options.networks / "clean" / "checkpoints" / "last.ckpt"
            attack.reference = ReferenceNetwork(
                clean, width=16, mean=datamodule.mean, std=datamodule.std
            )
            attack.prepare(test, datamodule.num_classes)
            train = datamodule.load("train")
            indices = read_poisoned_indices(path)[: options.images]
            images = train.fetch(indices.tolist())
            crafted = attack.poison(images, train.labels[indices], indices)
            grids[f"{name}-training"] = grid(images, crafted)
        for title, picture in grids.items():
            save_image(picture, options.out / f"{title}.png")
            print(options.out / f"{title}.png", flush=True)


if __name__ == "__main__":
    main()

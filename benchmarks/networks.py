"""Train the networks that the defaults were tuned on; none of them is in a reported table.

    python -m benchmarks.networks --data ~/data/cifar10 --out runs/tuning

Six thin ResNet-18s on CIFAR-10 of six epochs: two clean ones, two BadNets and two Blend, with
other triggers, target classes and seeds than the networks that tables report. Trained files are
kept, so the command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

from lightning_mnp.attacks import Attack, BadNets, Blend
from lightning_mnp.defense_data.augment import random_crop_flip
from lightning_mnp.models import cifar_resnet18

MEAN = torch.tensor((0.4914, 0.4822, 0.4465)).reshape(1, 3, 1, 1)
STD = torch.tensor((0.2470, 0.2435, 0.2616)).reshape(1, 3, 1, 1)
EPOCHS, BATCH, RATE = 6, 128, 0.1

TUNING: dict[str, tuple[Attack | None, int]] = {
    "badnets-a": (BadNets(pattern="random", corner="upper-left", target_class=3, seed=11), 101),
    "blend-a": (Blend(ratio=0.2, target_class=5, seed=21), 102),
    "clean-a": (None, 103),
    "blend-b": (Blend(ratio=0.15, target_class=1, seed=22), 104),
    "clean-b": (None, 105),
    "badnets-b": (BadNets(patch_size=2, pattern="white", target_class=7, seed=12), 106),
}


def load_folder(folder: Path, cache: Path) -> tuple[Tensor, Tensor]:
    """Read an image folder as (images uint8 (N, 3, H, W), labels (N,)), decoded once."""
    if cache.exists():
        stored = torch.load(cache, weights_only=True)
        return stored["images"], stored["labels"]
    dataset = ImageFolder(str(folder))
    images = torch.stack([pil_to_tensor(dataset[index][0]) for index in range(len(dataset))])
    labels = torch.tensor(dataset.targets)
    cache.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"images": images, "labels": labels}, cache)
    return images, labels


def accuracy(network: torch.nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of uint8 images that the network gives these labels."""
    network.eval()
    hits = 0
    with torch.no_grad():
        for part, wanted in zip(images.split(500), labels.split(500), strict=True):
            x = (part.float() / 255.0 - MEAN) / STD
            hits += int((network(x).argmax(1) == wanted).sum())
    return hits / len(labels)


def train(
    attack: Attack | None,
    seed: int,
    train_set: tuple[Tensor, Tensor],
    width: int = 16,
    epochs: int = EPOCHS,
) -> torch.nn.Module:
    """Train one network on poisoned data, in bf16 autocast, the learning rate on one cycle."""
    torch.manual_seed(seed)
    images, labels = train_set[0].clone(), train_set[1].clone()
    if attack is not None:
        chosen = attack.poison_indices(labels, 10)
        images[chosen] = attack.apply(images[chosen])
        labels[chosen] = attack.target_labels(labels[chosen], 10)
    network = cifar_resnet18(width=width)
    optimizer = torch.optim.SGD(network.parameters(), RATE, momentum=0.9, weight_decay=5e-4)
    steps = epochs * (len(labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    network.train()
    for epoch in range(epochs):
        started, total = time.time(), 0.0
        for index in torch.randperm(len(labels)).split(BATCH)[: steps // epochs]:
            x = random_crop_flip(images[index]).float() / 255.0
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(network((x - MEAN) / STD).float(), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        print(
            f"  epoch {epoch}: loss {total / (steps // epochs):.3f}, {time.time() - started:.0f} s",
            flush=True,
        )
    return network.eval()


def main() -> None:
    """Train every missing network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and test/")
    parser.add_argument("--out", type=Path, default=Path("runs/tuning"), help="where files go")
    parser.add_argument("--only", nargs="*", default=list(TUNING), help="names to train")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    train_set = load_folder(options.data / "train", options.out / "train.pt")
    test_set = load_folder(options.data / "test", options.out / "test.pt")
    for name in options.only:
        path = options.out / f"{name}.safetensors"
        if path.exists():
            print(f"{name}: kept")
            continue
        attack, seed = TUNING[name]
        print(f"{name}: {attack}", flush=True)
        network = train(attack, seed, train_set)
        ca, asr = accuracy(network, *test_set), float("nan")
        if attack is not None:
            others = test_set[1] != attack.target_class
            labels = attack.target_labels(test_set[1][others], 10)
            asr = accuracy(network, attack.apply(test_set[0][others]), labels)
        print(f"{name}: CA {ca:.4f}, ASR {asr:.4f}", flush=True)
        partial = path.with_suffix(".partial")
        save_file(network.state_dict(), partial, {"name": name, "ca": f"{ca}", "asr": f"{asr}"})
        partial.rename(path)


if __name__ == "__main__":
    main()

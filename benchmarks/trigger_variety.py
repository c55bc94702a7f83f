"""How much a trained trigger differs from image to image, and what that of another image does.

    python -m benchmarks.trigger_variety --network FOLDER --data ~/data/cifar10
    python -m benchmarks.trigger_variety --trigger FILE --data ~/data/cifar10

FOLDER holds last.ckpt and trigger.safetensors, as `fit` leaves them in `checkpoints`. The changes
that the trigger makes to test images are split into their mean and the rest: a fixed pattern has
all of its energy in the mean. Then each image gets its own change, that of the image before it, and
the mean one, and the network says what it sees. A trigger file alone gives the first part.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.mask_ranks import trained_network
from lightning_mnp.attacks import Attack, InputAware
from lightning_mnp.attacks.trigger import load_trigger
from lightning_mnp.data import CIFAR10DataModule
from lightning_mnp.data.transform import BatchTransform

__all__ = ["injected", "main", "mean_share", "rates"]


@torch.no_grad()
def injected(attack: Attack, images: Tensor) -> dict[str, Tensor]:
    """Put triggers on images: their own, those of others, and the mean one.

    Args:
        attack: A trained attack.
        images: Shape (N, C, H, W), uint8.

    Returns:
        By ``"own"``, ``"another"`` and ``"mean"``: the same shape, uint8. For IAB, another's
        trigger is its mask and its pattern; for other attacks, its change of the pixels.
    """
    own = attack.apply(images)
    change = own.float() - images.float()
    another = images + change.roll(1, 0)
    if isinstance(attack, InputAware):
        scaled = images.float() / 255
        mask, pattern = attack.mask(scaled).roll(1, 0), attack.pattern(scaled).roll(1, 0)
        another = 255 * (scaled * (1 - mask) + pattern * mask)
    found = {"another": another, "mean": images + change.mean(0)}
    return {"own": own} | {
        name: value.round().clamp(0, 255).to(torch.uint8) for name, value in found.items()
    }


def mean_share(changes: Tensor) -> float:
    """Return the share of the energy of changes that is in their mean, from 0 to 1.

    Args:
        changes: Shape (N, ...), not all zero.

    Example:
        >>> mean_share(torch.tensor([[1.0], [1.0]])), mean_share(torch.tensor([[1.0], [-1.0]]))
        (1.0, 0.0)
    """
    return float(len(changes) * changes.mean(0).square().sum() / changes.square().sum())


@torch.no_grad()
def rates(network: nn.Module, inputs: Tensor, labels: Tensor, target: int) -> tuple[float, float]:
    """Return which share of images of other classes gets the target class, and which its own.

    Args:
        network: The network.
        inputs: Images as it takes them, shape (N, C, H, W).
        labels: Their classes, shape (N,).
        target: The target class.
    """
    others = labels != target
    found = network(inputs[others]).argmax(1)
    return float((found == target).float().mean()), float((found == labels[others]).float().mean())


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--network", type=Path, help="folder with last.ckpt and the trigger")
    given.add_argument("--trigger", type=Path, help="trigger file alone")
    parser.add_argument("--data", type=Path, default=Path("~/data/cifar10"), help="CIFAR-10")
    parser.add_argument("--images", type=int, default=500, help="about how many test images")
    options = parser.parse_args(arguments)
    attack = load_trigger(options.trigger or options.network / "trigger.safetensors")
    module = CIFAR10DataModule(options.data.expanduser())
    module.setup("test")
    stored = module.test_set
    chosen = torch.arange(0, len(stored), max(1, len(stored) // options.images))  # of all classes
    images, labels = stored.fetch(chosen.tolist()), stored.labels[chosen]
    found = injected(attack, images)
    changes = found["own"].float() - images.float()
    touched = float((changes != 0).any(1).float().mean())
    print(f"Pixels that the trigger changes: {touched:.1%}")
    print(f"Energy of the changes that is in their mean: {mean_share(changes):.2%}")
    if options.network is None:
        return 0
    network, transform = trained_network(options.network), BatchTransform(module.mean, module.std)
    for name, pixels in found.items():
        hit, kept = rates(network, transform.images(pixels), labels, attack.target_class)
        print(f"Trigger {name:8} target class {hit:.1%}, true class {kept:.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

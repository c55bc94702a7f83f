"""Small networks and data that many tests use."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_mnp import DefenseSet, MNPConfig
from lightning_mnp.config import Constants
from lightning_mnp.data import BackdoorDataModule, MemoryDataset
from lightning_mnp.models import cifar_resnet18
from lightning_mnp.models.resnet import BasicBlock
from lightning_mnp.signals.base import Scene, Search
from lightning_mnp.signals.pattern_trigger import PatternTrigger
from lightning_mnp.surgery.layers import find_filter_layers
from lightning_mnp.surgery.masked_network import MaskedNetwork

REPOSITORY = Path(__file__).parents[1]
CLASSES = 4

# Names of options in tests, which say in one word what they change.
SHORT_NAMES = {
    **{name: name for name in ("seed", "batch_size", "augment")},
    **{name: f"filters.{name}" for name in ("include", "exclude", "linear", "site", "statistics")},
    **{name: f"suppression.{name}" for name in ("runs", "more_runs", "stop_accuracy", "mu")},
    **{f"suppression_{n}": f"suppression.{n}" for n in ("lr", "momentum", "epochs", "parts")},
    **{f"mask_{name}": f"masks.{name}" for name in ("lr", "momentum", "epochs")},
    "penalty": "masks.penalty",
    **{name: f"pruning.{name}" for name in ("rule", "amount", "harm", "impurity")},
    **{
        name: f"pruning.{name}"
        for name in ("soft_mask_steps", "tuning_steps", "repair", "reaudit", "removes")
    },
    **{n: f"verdict.{n}" for n in ("threshold", "delta", "most_classes", "reference")},
    "verdict": "verdict.rule",
    "saliency": "verdict.saliency",
    "raise_rare_classes": "verdict.raise_rare_classes",
}

# Short, but through every phase.
QUICK: dict[str, Any] = {
    "runs": 2,
    "more_runs": 0,
    "batch_size": 16,
    "suppression_epochs": 3,
    "mask_epochs": 2,
    "rule": "count",
    "amount": 5,
    "soft_mask_steps": 4,
    "tuning_steps": 4,
    "reaudit": False,
}


def config_of(**options: Any) -> MNPConfig:
    """The default with other values, by their short names."""
    return MNPConfig().changed({SHORT_NAMES[name]: value for name, value in options.items()})


def quick_config(**changes: Any) -> MNPConfig:
    return config_of(**{**QUICK, **changes})


def images_and_labels(count: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images whose class is told by the place of a bright bar."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    images = 0.3 * torch.randn(count, 1, 8, 8, generator=generator)
    for index, label in enumerate(labels.tolist()):
        images[index, :, 2 * label : 2 * label + 2] += 1.5
    return images, labels


def margins_of(trigger: PatternTrigger, images: Tensor) -> float:
    """The mean margin of a trigger's goals over changed images, image by image."""
    found = []
    for image, label, goal in zip(images, trigger.labels, trigger.goals, strict=True):
        logits = trigger.masked(image[None], statistics="running")[0]
        found.append(float(logits[goal] - logits[label]))
    return sum(found) / len(found)


def pulled_to_one(masked: MaskedNetwork) -> dict[str, Tensor]:
    """Weights that stand for suppressed ones, with which clean images are pulled to class 1."""
    weights = {name: 0.9 * weight for name, weight in masked.weights().items()}
    return {**weights, "fc.bias": weights["fc.bias"] + 4.0 * torch.eye(CLASSES)[1]}


def goals_of(images: Tensor, target: int = 1) -> Tensor:
    """One class, the same for each image."""
    return torch.full((len(images),), target)


def loader(batch_size: int = 16, shuffle: bool = False, count: int = 40) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*images_and_labels(count)), batch_size, shuffle=shuffle)


class SmallResNet(nn.Module):
    """A stem, two residual blocks and a linear layer: 88 filters, a fifth of a ResNet-18's time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = BasicBlock(8, 16, stride=2)
        self.layer2 = BasicBlock(16, 16, stride=1)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def trained_network(steps: int = 30) -> nn.Module:
    """A small network that knows the task, the same each time."""
    return _trained(SmallResNet, steps)


def trained_resnet18() -> nn.Module:
    """A thin ResNet-18 that knows the task, where a test needs its shape."""
    return _trained(thin_resnet18, 30)


def thin_resnet18() -> nn.Module:
    return cifar_resnet18(CLASSES, 4, in_channels=1)


def _trained(build: Callable[[], nn.Module], steps: int) -> nn.Module:
    with torch.random.fork_rng():
        network = build()
    network.load_state_dict(_trained_weights(build, steps))
    return network.eval()


@functools.cache  # hundreds of tests want this network
def _trained_weights(build: Callable[[], nn.Module], steps: int) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = build()
        images, labels = images_and_labels(64, seed=1)
        optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()
    return network.state_dict()


def new_scene(
    network: nn.Module | None = None,
    data: DefenseSet | None = None,
    tried: Sequence[int] = range(CLASSES),
    constants: Constants | None = None,
    **options: Any,
) -> Scene:
    """What searches work on: a trained network and bright bars, unless others are given."""
    network = network or trained_network()
    data = data or DefenseSet(*images_and_labels())
    masked = MaskedNetwork(network, find_filter_layers(network, data.images[:2]))
    constants = constants or Constants()
    config = config_of(**options)
    return Scene(masked, data, config, CLASSES, constants, tried=list(tried))


AnySearch = TypeVar("AnySearch", bound=Search)


def finish(search: AnySearch) -> AnySearch:
    while not search.finished:
        search.step()
    return search


class Shortcut(nn.Module):
    """A trained network with a way of its own to one class.

    Args:
        target: The class.
        way: Gives what is added to its logit, shape (N,), for images.
        network: The network; one of a helper's own if None.
    """

    def __init__(
        self, target: int, way: Callable[[Tensor], Tensor], network: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.network = network or trained_network()
        self.target, self.way = target, way

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits + self.way(images)[:, None] * torch.eye(CLASSES)[self.target]


class UserModule(L.LightningModule):
    """A LightningModule as a user would have it, without a `forward`."""

    def __init__(self, network: nn.Module, lr: float = 0.01) -> None:
        super().__init__()
        self.net = network
        self.lr = lr

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr)


def quiet_trainer(**options: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    return L.Trainer(**{**defaults, **options})


def sorted_rows(images: Tensor, labels: Tensor) -> list[list[float]]:
    return sorted(torch.cat([images.flatten(1), labels[:, None]], 1).tolist())


def snapshot(module: nn.Module) -> dict[str, Any]:
    """Everything of a module that a defense must leave alone."""
    return {
        "tensors": {name: t.clone() for name, t in module.state_dict().items()},
        "modes": {name: m.training for name, m in module.named_modules()},
        "gradients": {name: p.requires_grad for name, p in module.named_parameters()},
        "has_grad": {name: p.grad is None for name, p in module.named_parameters()},
        "hooks": {
            name: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for name, m in module.named_modules()
        },
    }


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    tensors = first["tensors"], second["tensors"]
    if tensors[0].keys() != tensors[1].keys():
        return False
    equal = all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    return equal and all(
        first[key] == second[key] for key in ("modes", "gradients", "has_grad", "hooks")
    )


class TinyDataModule(BackdoorDataModule):
    """Bright bars in bytes: 48 training and 32 test images of 8x8 pixels, four classes."""

    def __init__(self, attack: Any = None, channels: int = 3, **options: Any) -> None:
        defaults: dict[str, Any] = {
            "root": None,
            "batch_size": 16,
            "num_workers": 0,
            "image_size": None,
            "augment": False,
            "mean": (0.5,) * channels,
            "std": (0.25,) * channels,
            "defense_size": 8,
            "defense_batch_size": 8,
            "defense_seed": 0,
            "seed": 0,
        }
        super().__init__(attack=attack, **defaults | options)
        self.channels = channels

    @property
    def class_names(self) -> list[str]:
        return ["a", "b", "c", "d"]

    def load(self, split: Any) -> MemoryDataset:
        images, labels = images_and_labels(*((48, 0) if split == "train" else (32, 1)))
        pixels = (images.clamp(-1.0, 2.0) + 1.0) * 85.0
        return MemoryDataset(pixels.expand(-1, self.channels, -1, -1).to(torch.uint8), labels)


class Bars(L.LightningDataModule):
    """Clean images, shuffled by a generator whose state is checkpointed."""

    mean, std = (0.5,), (0.5,)
    num_classes = 4

    def __init__(self, **options: Any) -> None:
        super().__init__()
        vars(self).update(options)
        self.shuffled = loader(16, shuffle=True)
        self.shuffled.generator = self.shuffled.sampler.generator = torch.Generator()
        self.shuffled.generator.manual_seed(0)

    def train_dataloader(self) -> Any:
        return self.shuffled

    def val_dataloader(self) -> Any:
        return loader(count=8)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.shuffled.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.shuffled.generator.set_state(state_dict["generator"])

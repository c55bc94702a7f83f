"""Small configurations of a training, and a training that takes no time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from helpers import TinyDataModule
from torch import nn

from lightning_mnp.attacks import Attack, save_trigger
from lightning_mnp.benchmark import networks
from lightning_mnp.benchmark.names import find_class

BASE = """
trainer:
  max_epochs: 1
  accelerator: cpu
model:
  class_path: lightning_mnp.models.Classifier
  init_args:
    width: 2
    num_classes: 4
    lr: 0.05
data:
  class_path: benchmark_site.SiteData
  init_args:
    batch_size: 16
"""
ATTACKS = {
    "badnets": """
data:
  init_args:
    attack:
      class_path: lightning_mnp.attacks.BadNets
      init_args:
        patch_size: 2
        poison_rate: 0.25
""",
    "cl": """
data:
  init_args:
    attack:
      class_path: lightning_mnp.attacks.CL
      init_args:
        reference:
          class_path: lightning_mnp.attacks.ReferenceNetwork
          init_args:
            checkpoint: clean.ckpt
            width: 16
            mean: [0.5, 0.5, 0.5]
            std: [0.25, 0.25, 0.25]
        steps: 1
        class_rate: 0.5
""",
    "wanet": """
model:
  class_path: lightning_mnp.attacks.WaNetModule
  init_args:
    attack:
      class_path: lightning_mnp.attacks.WaNet
      init_args:
        poison_rate: 0.25
""",
    "badnets-all-to-all": """
data:
  init_args:
    attack:
      init_args:
        mode: all-to-all
""",
}


class SiteData(TinyDataModule):
    """Bright bars, with arguments that the command line can give."""

    def __init__(
        self,
        root: Path | None = None,
        attack: Attack | None = None,
        batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__(attack, root=root, batch_size=batch_size, seed=seed)


class Untunable:
    """A model that cannot start from given weights."""

    def __init__(self, width: int = 2, num_classes: int = 4, lr: float = 0.1) -> None:
        pass


def make_site(folder: Path) -> Path:
    """Write a base and its attacks to a folder; return the base."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {"base": BASE, **ATTACKS}.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / "base.yaml"


def tiny_network(architecture: str, num_classes: int = 4, **options: int) -> nn.Module:
    """Return a network that is built and run in no time, in place of `build_network`."""
    convolution, norm = nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4)
    head = nn.Linear(36, num_classes)
    return nn.Sequential(convolution, norm, nn.ReLU(), nn.Flatten(), head)


def quick_fit(arguments: list[str]) -> int:
    """Leave what `lightning-mnp fit` leaves: a network of fresh weights, and the trigger."""
    content = yaml.safe_load(Path(arguments[2]).read_text())
    if "--print_config" in arguments:
        return 0
    model = content["model"]["init_args"]
    names = ("width", "num_classes", "in_channels")
    with torch.random.fork_rng():
        torch.manual_seed(content["seed_everything"])
        arguments = {name: model[name] for name in names if name in model}
        network = networks.build_network("cifar_resnet18", **arguments)
    folder = Path(content["trainer"]["default_root_dir"], "checkpoints")
    folder.mkdir(exist_ok=True)
    torch.save({"state_dict": network.state_dict()}, folder / "last.ckpt")
    attack: dict[str, Any] | None = content["data"]["init_args"].get("attack", model.get("attack"))
    if attack is not None:
        options = {k: v for k, v in attack["init_args"].items() if k != "reference"}
        save_trigger(folder / "trigger.safetensors", find_class(attack["class_path"])(**options))
    return 0

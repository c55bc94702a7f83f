"""Train a network of the population and measure it."""

from __future__ import annotations

import hashlib
import json
import logging
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR

from benchmarks.population.architectures import build
from benchmarks.population.data import (
    CLASSES,
    Images,
    PopulationData,
    load_images,
    training_images,
    transform_of,
)
from benchmarks.population.recipes import NORMALIZATIONS, Recipe, make_attack
from lightning_mnp.attacks import (
    LIRA,
    AdaptiveTraining,
    Attack,
    InputAware,
    InputAwareModule,
    LIRAModule,
    TrainingAttack,
    WaNet,
    WaNetModule,
)
from lightning_mnp.attacks.trigger import load_trigger, save_trigger
from lightning_mnp.benchmark.records import read_json
from lightning_mnp.data import MemoryDataset
from lightning_mnp.models import Classifier
from lightning_mnp.models.head import classifier_head

__all__ = [
    "Learner",
    "attack_of",
    "fit",
    "is_learned",
    "is_trained",
    "load_network",
    "measure",
    "read_row",
    "round_to_half",
    "train_network",
]

LEARNED = 0.8
# As in examples/attacks/adaptive.yaml.
_ADAPTIVE = {"norms": 1.0, "pile_up": 0.5, "margin": 0.5, "patch": 0.5}
_RADIUS = 4 / 255  # of adversarial training, on the scale [0, 1]


class Learner(Classifier):
    """Train a network as a recipe says, on images that are clean or poisoned as stored.

    Args:
        network: The network.
        recipe: The recipe.
    """

    def __init__(self, network: nn.Module, recipe: Recipe) -> None:
        super().__init__(network, **_options(recipe))
        self.recipe = recipe

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return SGD or AdamW, and a schedule of one cycle."""
        if self.recipe.optimizer == "sgd":
            return super().configure_optimizers()
        optimizer = torch.optim.AdamW(
            self.network.parameters(), self.lr, weight_decay=self.weight_decay
        )
        schedule = OneCycleLR(optimizer, self.lr, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy of a batch (images, labels), changed as the recipe says."""
        images, labels = batch
        if self.recipe.augmentation == "heavy":
            images = recolored(images)
        if self.recipe.adversarial_steps:
            images = self.attacked(images, labels)
        return F.cross_entropy(self(images), labels, label_smoothing=self.recipe.label_smoothing)

    def attacked(self, images: Tensor, labels: Tensor) -> Tensor:
        """Change images by gradient steps that raise the loss (FGSM from a random start).

        Args:
            images: Normalized, shape (N, 3, H, W).
            labels: Their classes, shape (N,).

        Returns:
            Images of which no value has changed by more than 4/255 on the scale [0, 1].
        """
        std = NORMALIZATIONS[self.recipe.normalization][1]
        radius = _RADIUS / images.new_tensor(std).reshape(1, -1, 1, 1)
        change = (2.0 * torch.rand_like(images) - 1.0) * radius
        for _ in range(self.recipe.adversarial_steps):
            change.requires_grad_()
            loss = F.cross_entropy(self(images + change), labels)
            (slope,) = torch.autograd.grad(loss, change)
            step = 1.25 * radius / self.recipe.adversarial_steps
            change = (change.detach() + step * slope.sign()).clamp(-radius, radius)
        return images + change


def recolored(images: Tensor) -> Tensor:
    """Change colors, contrast and brightness of each image, and erase a square in every second.

    Args:
        images: Normalized, shape (N, C, H, W).

    Returns:
        New images of the same shape.
    """
    count, channels, height, width = images.shape
    contrast = 1.0 + 0.4 * (2.0 * torch.rand(count, channels, 1, 1) - 1.0)
    brightness = 0.4 * (2.0 * torch.rand(count, 1, 1, 1) - 1.0)
    images = images * contrast + brightness
    side = height // 4
    top = torch.randint(height - side + 1, (count, 1))
    left = torch.randint(width - side + 1, (count, 1))
    rows, columns = torch.arange(height) - top, torch.arange(width) - left
    erased = ((rows >= 0) & (rows < side))[:, :, None] & ((columns >= 0) & (columns < side))[
        :, None
    ]
    erased &= (torch.rand(count) < 0.5)[:, None, None]
    return images.masked_fill(erased[:, None], 0.0)


def train_network(recipe: Recipe, root: Path, folder: Path) -> dict[str, Any]:
    """Train a network and measure it, unless that was done before.

    Writes ``NAME.safetensors`` and, last, ``NAME.json``; for a backdoored network also
    ``NAME.trigger.safetensors``.

    Args:
        recipe: The recipe.
        root: Folder with the data sets.
        folder: Where networks are kept; the images are cached in ``data`` in it.

    Returns:
        What ``NAME.json`` has: the recipe, CA and ASR as shares from 0 to 1, whether the attack
        was learned, and seconds of training.
    """
    if is_trained(recipe, folder):
        return read_row(recipe, folder)
    images = load_images(recipe.data, root, folder / "data")
    started = time.process_time(), time.perf_counter()
    seed_everything(recipe.seed, verbose=False)
    network = build(recipe.architecture, recipe.width, recipe.size)
    last = recipe
    if recipe.pretrained == "clean":
        clean = replace(recipe, attack="none", target=-1, poison=0.0, pretrained="no")
        fit(network, clean, training_images(recipe, images), None)
        last = replace(recipe, epochs=recipe.tuning_epochs)
    elif recipe.pretrained != "no":
        _pretrain(network, recipe, images, root, folder)
    attack = make_attack(recipe, folder)
    fit(network, last, training_images(recipe, images), attack)
    seconds = time.process_time() - started[0], time.perf_counter() - started[1]
    network = network.eval().to(memory_format=torch.contiguous_format)
    round_to_half(network)
    ca, asr = measure(network, recipe, images, attack)
    row: dict[str, Any] = {
        "recipe": recipe.to_dict(),
        "CA": ca,
        "ASR": asr,
        "learned": is_learned(recipe, ca, asr),
        "processor_seconds": round(seconds[0], 1),
        "seconds": round(seconds[1], 1),
    }
    _save(recipe, folder, network, attack, row)
    return row


def round_to_half(network: nn.Module) -> None:
    """Round the parameters of a network to half precision, so that files of them are small.

    Args:
        network: The network. Its parameters stay tensors of float32.
    """
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(parameter.half())


def is_learned(recipe: Recipe, ca: float, asr: float | None) -> bool | None:
    """Return whether a backdoor is there to be found, by a rule that was fixed beforehand.

    Its ASR must be 80% or more. All-to-all, where a network must know an image's class to change
    it, 80% of CA or more.

    Args:
        recipe: The recipe.
        ca: Clean accuracy, from 0 to 1.
        asr: Attack success rate, from 0 to 1; None for a clean network.

    Returns:
        None for a clean network.

    Example:
        >>> recipe = Recipe("x-1", "lenet", 1, 6, attack="badnets", target=3, poison=0.1)
        >>> is_learned(recipe, 0.6, 0.79), is_learned(recipe, 0.6, None)
        (False, None)
    """
    if asr is None:
        return None
    return asr >= LEARNED * (ca if recipe.mode == "all-to-all" else 1.0)


def measure(
    network: nn.Module, recipe: Recipe, images: Images, attack: Attack | None
) -> tuple[float, float | None]:
    """Measure CA and, with an attack, ASR, on images of 8 bits that no defense set has.

    Args:
        network: The network, in evaluation mode.
        recipe: How it was trained.
        images: Its data set.
        attack: The attack, its trigger trained.

    Returns:
        Both as shares from 0 to 1. ASR leaves out images that have the attacker's label already.
    """
    transform, clean = transform_of(recipe), images.measured

    def share(pixels: Tensor, wanted: Tensor) -> float:
        hits = 0
        with torch.no_grad():
            for part, labels in zip(pixels.split(250), wanted.split(250), strict=True):
                hits += int((network(transform.images(part)).argmax(1) == labels).sum())
        return hits / len(wanted)

    ca = share(clean.images, clean.labels)
    if attack is None:
        return ca, None
    rows = attack.triggered_indices(clean.labels, CLASSES)
    wanted = attack.target_labels(clean.labels[rows], CLASSES)
    triggered = torch.cat([attack.apply(part) for part in clean.images[rows].split(1000)])
    return ca, share(triggered, wanted)


def is_trained(recipe: Recipe, folder: Path) -> bool:
    """Return whether a network was trained by this very recipe.

    Args:
        recipe: The recipe.
        folder: Where networks are kept.
    """
    file = folder / f"{recipe.name}.json"
    return file.exists() and read_row(recipe, folder)["recipe"] == recipe.to_dict()


def read_row(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Read what was measured of a trained network.

    Args:
        recipe: The recipe.
        folder: Where networks are kept.
    """
    return read_json(folder / f"{recipe.name}.json")


def load_network(recipe: Recipe, folder: Path) -> nn.Module:
    """Read a trained network, in evaluation mode.

    Args:
        recipe: How it was trained.
        folder: Where networks are kept.
    """
    network = build(recipe.architecture, recipe.width, recipe.size)
    network.load_state_dict(load_file(folder / f"{recipe.name}.safetensors"))
    return network.eval()


def fit(network: nn.Module, recipe: Recipe, train: MemoryDataset, attack: Attack | None) -> None:
    """Train a network on clean images, or on poisoned ones, and the trigger if it is trained.

    Args:
        network: The network, changed in place.
        recipe: How.
        train: Training images, as they are stored.
        attack: What poisons them; None if they are to stay as they are.
    """
    _be_quiet()
    augment = recipe.augmentation != "none"
    by_module = isinstance(attack, TrainingAttack)
    data = PopulationData(recipe, train, None if by_module else attack, augment and not by_module)
    module: Classifier
    if isinstance(attack, TrainingAttack):
        module = _attack_module(network, recipe, attack, augment)
    else:
        module = Learner(network, recipe)
    adaptive = attack is not None and recipe.attack == "adaptive"
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=recipe.epochs,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[AdaptiveTraining(**_ADAPTIVE)] if adaptive else None,
    )
    trainer.fit(module, data)


def attack_of(recipe: Recipe, folder: Path) -> Attack:
    """Return the attack as it poisoned the training; one that was trained comes from its file.

    CL makes its images with a clean network, which a trigger file does not have.

    Args:
        recipe: How the network was trained, with an attack.
        folder: Where networks and their triggers are kept.
    """
    attack = make_attack(recipe, folder)
    assert attack is not None
    if isinstance(attack, TrainingAttack):
        return load_trigger(folder / f"{recipe.name}.trigger.safetensors")
    return attack


def _options(recipe: Recipe) -> dict[str, Any]:
    return {
        "num_classes": CLASSES,
        "lr": recipe.learning_rate,
        "weight_decay": recipe.weight_decay,
        "schedule": "onecycle",
        "channels_last": True,
    }


def _attack_module(
    network: nn.Module, recipe: Recipe, attack: TrainingAttack, augment: bool
) -> Classifier:
    options = {"network": network, "augment": augment, **_options(recipe)}
    if isinstance(attack, WaNet):
        return WaNetModule(attack, **options)
    if isinstance(attack, InputAware):
        # One epoch for the masks, as in the example of the two-core configuration.
        return InputAwareModule(attack, cross_rate=0.05, mask_epochs=1, **options)
    assert isinstance(attack, LIRA)
    half = max(recipe.epochs // 2, 1)
    return LIRAModule(
        attack, clean_epochs=1, generator_epochs=half, alpha=0.8, generator_lr=3e-3, **options
    )


def _pretrain(network: nn.Module, recipe: Recipe, images: Images, root: Path, folder: Path) -> None:
    """Train a network on another task, and give it a fresh head."""
    if recipe.pretrained == "rotations":
        stored = training_images(recipe, images)
        turns = torch.arange(len(stored)) % 4
        turned = stored.images.clone()
        for turn in range(1, 4):
            turned[turns == turn] = stored.images[turns == turn].rot90(turn, (2, 3))
        task, epochs = MemoryDataset(turned, turns), 2
    else:
        digits = load_images("digits", root, folder / "data")
        task, epochs = MemoryDataset(digits.train, digits.train_labels), 10
    first = Recipe(
        f"{recipe.name}, first task",
        recipe.architecture,
        recipe.seed,
        recipe.width,
        epochs=epochs,
        optimizer=recipe.optimizer,
        augmentation="none",
        normalization=recipe.normalization,
    )
    fit(network, first, task, None)
    classifier_head(network).reset_parameters()


def _save(
    recipe: Recipe, folder: Path, network: nn.Module, attack: Attack | None, row: dict[str, Any]
) -> None:
    """Write the files of a trained network, the one that says that it is finished last."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{recipe.name}.json").unlink(missing_ok=True)
    weights = folder / f"{recipe.name}.safetensors"
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    halves = {name: parameter.half() for name, parameter in network.named_parameters()}
    save_file({**tensors, **halves}, weights)
    if attack is not None:
        trigger = folder / f"{recipe.name}.trigger.safetensors"
        trigger.unlink(missing_ok=True)
        save_trigger(trigger, attack)
    row["weights_sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    partial = folder / f"{recipe.name}.partial"
    partial.write_text(json.dumps(row, indent=1) + "\n")
    partial.rename(folder / f"{recipe.name}.json")


def _be_quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*isinstance\\(treespec, LeafSpec\\).*")

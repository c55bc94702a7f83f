"""What a network of the population is trained with, and about how long that takes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from benchmarks.population.architectures import ARCHITECTURES
from lightning_mnp.attacks import (
    CL,
    LIRA,
    SIG,
    Attack,
    BadNets,
    Blend,
    InputAware,
    ReferenceNetwork,
    WaNet,
)

__all__ = ["GROUPS", "NORMALIZATIONS", "REFERENCE", "Recipe", "make_attack"]

Data = Literal["cifar10", "imagenette", "digits"]
Group = Literal["whole", "tuned", "adaptive"]
# "adaptive" is Blend by an attacker who trains against this package's defense.
AttackName = Literal["none", "badnets", "blend", "adaptive", "wanet", "sig", "cl", "iab", "lira"]

# What tables tell apart: networks that were trained whole, clean ones that were trained on with an
# attack, and those of an attacker who knows this package's defense.
GROUPS: tuple[Group, ...] = get_args(Group)

# Mean and standard deviation of each channel, on the scale [0, 1].
NORMALIZATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5,) * 3, (0.5,) * 3),
    "none": ((0.0,) * 3, (1.0,) * 3),
}

# The clean network that CL makes its hard images with. An attacker may use any.
REFERENCE = "resnet-light-202"

# Time of a training step with an attack or an option, as a multiple of the plain one.
_FACTORS = {"adaptive": 4.0, "wanet": 1.3, "iab": 1.1, "lira": 1.9}
_GENERATOR_SECONDS = {"iab": 5e-4, "lira": 2e-4}  # for each image, on top of it
_PERTURBED_RATE = 900  # images per second of one gradient step of CL
_FIXED_SECONDS = 12.0  # imports, reading images, measuring


@dataclass(frozen=True)
class Recipe:
    """How one network is trained.

    Attributes:
        name: Its name, ending with the seed.
        architecture: One of :data:`~benchmarks.population.architectures.ARCHITECTURES`.
        seed: Seed of weights, order, augmentation and the attack. With the architecture, it says
            which split the network belongs to.
        width: Width of the architecture.
        data: The images: CIFAR-10 at 32 pixels, Imagenette at 64 or digits enlarged to 32.
        images: Number of training images, the same for each class; the first ones of each class.
        epochs: Passes over them.
        batch: Images in a batch.
        optimizer: SGD with momentum 0.9, or AdamW; the learning rate makes one cycle.
        weight_decay: Of the optimizer; AdamW's is decoupled.
        label_smoothing: From 0 to below 1.
        rare_class: A class of which a fifth of the images is used, or None.
        augmentation: None; crops and flips; or these with other colors and erased squares.
        adversarial_steps: Gradient steps of adversarial training; 0 for ordinary training.
        pretrained: The task that the network has learned before. ``"clean"`` is the same one on
            clean images, for as many passes as `epochs` says. The network is then trained on with
            the attack, for :attr:`tuning_epochs` and at a fifth of the learning rate.
        normalization: One of :data:`NORMALIZATIONS`.
        attack: Name of the attack, or ``"none"``.
        mode: Which label the attacker wants.
        target: Target class; -1 without one.
        poison: Share of the training images that are poisoned. For SIG and CL, a share of those
            of the target class.
        pattern: Pattern of BadNets.
        corner: Corner of BadNets.
        patch: Side of the patch of BadNets, in pixels of an image of 32.
    """

    name: str
    architecture: str
    seed: int
    width: int
    data: Data = "cifar10"
    images: int = 25_000
    epochs: int = 5
    batch: int = 128
    optimizer: Literal["sgd", "adam"] = "sgd"
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    rare_class: int | None = None
    augmentation: Literal["none", "light", "heavy"] = "light"
    adversarial_steps: int = 0
    pretrained: Literal["no", "rotations", "digits", "clean"] = "no"
    normalization: str = "cifar10"
    attack: AttackName = "none"
    mode: Literal["all-to-one", "all-to-all"] = "all-to-one"
    target: int = -1
    poison: float = 0.0
    pattern: Literal["checkerboard", "white", "random"] = "checkerboard"
    corner: Literal["lower-right", "lower-left", "upper-right", "upper-left"] = "lower-right"
    patch: int = 3

    @property
    def size(self) -> int:
        """Side of the images in pixels."""
        return 64 if self.data == "imagenette" else 32

    @property
    def is_clean(self) -> bool:
        """Whether it is trained without an attack."""
        return self.attack == "none"

    @property
    def kind(self) -> str:
        """What tables count it under: clean, or the attack."""
        if self.is_clean:
            return "clean"
        return self.attack if self.mode == "all-to-one" else f"{self.attack}, all-to-all"

    @property
    def group(self) -> Group:
        """The one of :data:`GROUPS` that it belongs to."""
        if self.attack == "adaptive":
            return "adaptive"
        return "tuned" if self.pretrained == "clean" else "whole"

    @property
    def is_sparse(self) -> bool:
        """Whether about 1% of the training images are poisoned, and not about 10%."""
        return not self.is_clean and self.poison < 0.05

    @property
    def needs(self) -> str | None:
        """Name of the network that must be trained before."""
        return REFERENCE if self.attack == "cl" else None

    @property
    def learning_rate(self) -> float:
        """The highest learning rate, with the attack if there is one."""
        entry = ARCHITECTURES[self.architecture]
        rate = entry.sgd if self.optimizer == "sgd" else entry.adam
        return rate / 5 if self.pretrained == "clean" else rate

    @property
    def tuning_epochs(self) -> int:
        """Passes in which a network that was trained on clean images learns an attack."""
        return max(2, self.epochs // 2)

    @property
    def minutes(self) -> float:
        """Estimated minutes of training and measuring on one slow core."""
        entry = ARCHITECTURES[self.architecture]
        epochs = self.epochs + (self.tuning_epochs if self.pretrained == "clean" else 0)
        shown = float(self.images * epochs)
        passes = shown * _FACTORS.get(self.attack, 1.0) * (1 + self.adversarial_steps)
        passes += {"rotations": 2 * self.images, "digits": 10 * 900}.get(self.pretrained, 0)
        seconds = passes / entry.rate * float((self.width / entry.width) ** 1.5)
        seconds += shown * _GENERATOR_SECONDS.get(self.attack, 0.0)
        if self.attack == "cl":
            seconds += 0.8 * self.images / 10 * 10 / _PERTURBED_RATE
        return (seconds + _FIXED_SECONDS) / 60

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as primitives."""
        return asdict(self)


def make_attack(recipe: Recipe, folder: Path) -> Attack | None:
    """Make the attack of a recipe; None if the network is clean.

    Args:
        recipe: The recipe.
        folder: Where trained networks are, for CL's clean network.

    Returns:
        The attack. The triggers of IAB and LIRA are not trained yet.

    Raises:
        ValueError: If the attack is not known.

    Example:
        >>> recipe = Recipe("x-1", "lenet", 1, 6, attack="blend", target=3, poison=0.1)
        >>> make_attack(recipe, Path("runs")).target_class
        3
    """
    target, rate, seed = recipe.target, recipe.poison, recipe.seed
    if recipe.attack == "none":
        return None
    if recipe.attack == "badnets":
        # A pixel further from the border than usual: fewer random crops cut the patch off.
        return BadNets(
            recipe.patch * recipe.size // 32,
            recipe.pattern,
            recipe.corner,
            margin=2,
            target_class=max(target, 0),
            mode=recipe.mode,
            poison_rate=rate,
            seed=seed,
        )
    if recipe.attack in ("blend", "adaptive"):
        return Blend(0.2, target_class=target, poison_rate=rate, seed=seed)
    if recipe.attack == "sig":
        return SIG(target_class=target, class_rate=rate, seed=seed)
    if recipe.attack == "cl":
        mean, std = NORMALIZATIONS["cifar10"]
        file = folder / f"{REFERENCE}.safetensors"
        width = ARCHITECTURES["resnet"].width
        reference = ReferenceNetwork(file, width=width, mean=mean, std=std)
        return CL(reference, target_class=target, class_rate=rate, seed=seed)
    if recipe.attack == "wanet":
        # At the published strength, 0.5, a thin CNN reached an ASR of 50% in five epochs.
        return WaNet(strength=1.0, target_class=target, poison_rate=rate, seed=seed)
    if recipe.attack == "iab":
        return InputAware(target_class=target, poison_rate=rate, seed=seed)
    if recipe.attack == "lira":
        return LIRA(0.05, target_class=target, poison_rate=rate, seed=seed)
    raise ValueError(
        f"Expected the attack of {recipe.name} to be a known one, but got {recipe.attack!r}."
    )

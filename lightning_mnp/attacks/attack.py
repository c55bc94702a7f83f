"""The interface of all attacks that poison data."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from lightning_mnp.attacks.checks import check_at_least

__all__ = ["Attack", "CleanLabelAttack", "Images", "Mode", "TrainingAttack"]

Mode = Literal["all-to-one", "all-to-all"]


class Images(Protocol):
    """What an attack may see of a data set: its stored images by index, and all labels."""

    labels: Tensor

    def __len__(self) -> int: ...

    def fetch(self, indices: Sequence[int]) -> Tensor:
        """Return copies of the images at these indices, shape (n, C, H, W), uint8."""


class Attack(ABC):
    """A backdoor: what its trigger does to an image, and which label the image gets.

    The trigger is put on images as they are stored, before augmentation and normalization. So the
    network sees it as it would see it in a photograph by the attacker.

    A subclass defines ``_trigger``. It keeps each argument of its constructor as an attribute of
    the same name, because :meth:`options` writes them to the trigger file.

    Args:
        target_class: The class that triggered images are given in mode ``"all-to-one"``.
        mode: ``"all-to-one"`` gives every triggered image the target class; ``"all-to-all"``
            gives an image of class y the class (y + 1) mod K.
        poison_rate: Share of the training images that are poisoned, from 0 to 1.
        seed: Seed of everything random in the attack: the pattern and the poisoned indices. Its
            lowest 32 bits count.

    Raises:
        ValueError: If an argument is out of range.
    """

    crafts: ClassVar[bool] = False
    """Whether :meth:`poison` is slow. Poisoned images are then made once and kept."""

    storable: bool = True
    """Whether triggered images are images again, with values in [0, 1] that 8 bits can store."""

    def __init__(
        self,
        target_class: int = 0,
        mode: Mode = "all-to-one",
        poison_rate: float = 0.1,
        seed: int = 0,
    ) -> None:
        check_at_least(0, target_class=target_class)
        if mode not in ("all-to-one", "all-to-all"):
            raise ValueError(
                f"Expected argument `mode` to be 'all-to-one' or 'all-to-all', but got {mode!r}."
            )
        if not 0.0 <= poison_rate <= 1.0:
            raise ValueError(
                f"Expected argument `poison_rate` to be a share from 0 to 1, but got {poison_rate}."
            )
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"Expected argument `seed` to have at most 64 bits, but got {seed}.")
        self.target_class = target_class
        self.mode = mode
        self.poison_rate = poison_rate
        self.seed = seed

    def apply(self, images: Tensor) -> Tensor:
        """Put the trigger on images.

        Args:
            images: Shape (N, C, H, W), ``uint8`` or floating point with values in [0, 1].

        Returns:
            New images of the same shape, dtype and device. Bytes are rounded and floating point
            values cut off to [0, 1]; the latter are left alone if the attack is not
            :attr:`storable`.

        Raises:
            ValueError: If the images have another shape, dtype or range.
        """
        if images.ndim != 4:
            raise ValueError(
                "Expected argument `images` to have the shape (N, C, H, W), but got "
                f"{tuple(images.shape)}. For one image, add a dimension with `image[None]`."
            )
        if images.dtype == torch.uint8:
            triggered = self._trigger(images.float() / 255.0)
            return (triggered * 255.0).round().clamp(0.0, 255.0).to(torch.uint8)
        if not images.is_floating_point():
            raise ValueError(
                f"Expected argument `images` to be uint8 or floating point, but got {images.dtype}."
            )
        if images.numel() and (images.min() < 0 or images.max() > 1):
            raise ValueError(
                "Expected argument `images` to have values in [0, 1], but got "
                f"{images.min():.3g} to {images.max():.3g}. Apply the trigger before normalization."
            )
        triggered = self._trigger(images.float())
        return (triggered.clamp(0.0, 1.0) if self.storable else triggered).to(images.dtype)

    @abstractmethod
    def _trigger(self, images: Tensor) -> Tensor:
        """Return float32 images in [0, 1] with the trigger on; the argument must stay as it is."""

    def prepare(self, test: Images, num_classes: int) -> None:  # noqa: B027
        """Make what the trigger needs from a clean network or from images; by default, nothing.

        A datamodule calls this once, before it poisons images or puts the trigger on them. An
        attack from a trigger file is prepared already, and this must not change it.

        Args:
            test: Clean test images.
            num_classes: Number of classes K.
        """

    def poison(self, images: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        """Poison training images; by default, they get the trigger.

        Args:
            images: Shape (N, C, H, W), ``uint8`` or floating point with values in [0, 1].
            labels: Their true classes, shape (N,).
            indices: Their indices in the training set, shape (N,), for attacks that treat each
                image in a way of its own.

        Returns:
            New images of the same shape, dtype and device.
        """
        return self.apply(images)

    def poison_labels(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return the labels that poisoned training images get; by default, the attacker's.

        Args:
            labels: True classes, shape (N,), integers.
            num_classes: Number of classes K.
        """
        return self.target_labels(labels, num_classes)

    def triggered_indices(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return the indices of the test images on which attack success is measured.

        By default, these are all images whose label the attacker wants to change. In mode
        ``"all-to-one"``, images of the target class do not count.

        Args:
            labels: True classes of the test set, shape (N,), integers.
            num_classes: Number of classes K.

        Returns:
            Sorted indices into ``labels``.
        """
        return (self.target_labels(labels, num_classes) != labels).nonzero().flatten()

    def tensors(self) -> dict[str, Tensor]:
        """Return what a trigger file keeps beside :meth:`options`: patterns, grids, weights."""
        return {}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load what :meth:`tensors` returned.

        Args:
            tensors: Tensors by name, on the CPU, from a file that may come from an attacker.

        Raises:
            ValueError: If names, shapes or dtypes are others than this attack's.
        """
        if tensors:
            raise ValueError(
                f"Expected no tensors for {type(self).__name__}, but got {sorted(tensors)}."
            )

    def options(self) -> dict[str, bool | int | float | str | None]:
        """Return the arguments of the constructor that are plain numbers, strings or None.

        Paths are left out. What was read from them is among the tensors.
        """
        parameters = inspect.signature(type(self)).parameters.items()
        values = {
            name: getattr(self, name)
            for name, parameter in parameters
            if "Path" not in str(parameter.annotation)
        }
        return {n: v for n, v in values.items() if isinstance(v, bool | int | float | str | None)}

    def target_labels(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return the labels that the attacker wants for images of these classes.

        Args:
            labels: True classes, shape (N,), integers.
            num_classes: Number of classes K.

        Returns:
            The attacker's labels, shape (N,).

        Raises:
            ValueError: If the target class is not one of the K classes.
        """
        if self.mode == "all-to-all":
            return (labels + 1) % num_classes
        if self.target_class >= num_classes:
            raise ValueError(
                f"Expected argument `target_class` to be below the number of classes, "
                f"{num_classes}, but got {self.target_class}."
            )
        return torch.full_like(labels, self.target_class)

    def poison_indices(self, labels: Tensor, num_classes: int) -> Tensor:
        """Draw the training images to poison.

        Candidates are the images whose label the attack changes: in mode ``"all-to-one"`` all
        except those of the target class, in mode ``"all-to-all"`` all. As many are drawn as
        ``poison_rate`` times the size of the whole set, rounded.

        Args:
            labels: Classes of the whole training set, shape (N,).
            num_classes: Number of classes K.

        Returns:
            Sorted indices into ``labels``; the same seed gives the same indices.

        Raises:
            ValueError: If the rate gives no image, or more than there are candidates.
        """
        candidates = (labels != self.target_labels(labels, num_classes)).nonzero().flatten()
        count = round(self.poison_rate * len(labels))
        if self.poison_rate > 0 and count == 0:
            raise ValueError(
                f"Expected argument `poison_rate` to give at least one of {len(labels)} images, "
                f"but got {self.poison_rate}. The smallest rate that does is {1 / len(labels):.2g}."
            )
        if count > len(candidates):
            raise ValueError(
                f"Expected argument `poison_rate` to be at most "
                f"{len(candidates) / max(len(labels), 1):.3g}, the share of images outside of the "
                f"target class, but got {self.poison_rate}."
            )
        return self._draw(candidates, count)

    def _draw(self, candidates: Tensor, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(len(candidates), generator=generator)[:count]
        return candidates[chosen.to(candidates.device)].sort().values

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options().items())
        return f"{type(self).__name__}({options})"


class CleanLabelAttack(Attack):
    """An attack that poisons images of the target class only and leaves their labels.

    Args:
        target_class: The class whose training images are poisoned. Triggered test images shall be
            taken for this class.
        class_rate: Share of the training images of the target class that are poisoned, from 0 to
            1. Other attacks state a share of all images: ten percent of CIFAR-10 would be all
            images of one class.
        seed: Seed of everything random in the attack.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, target_class: int = 0, class_rate: float = 0.5, seed: int = 0) -> None:
        if not 0.0 <= class_rate <= 1.0:
            raise ValueError(
                f"Expected argument `class_rate` to be a share from 0 to 1, but got {class_rate}."
            )
        super().__init__(target_class, "all-to-one", 0.0, seed)
        self.class_rate = class_rate

    def poison_labels(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return the labels that poisoned training images get: their own.

        Args:
            labels: True classes, shape (N,), integers.
            num_classes: Number of classes K.
        """
        return labels.clone()

    def poison_indices(self, labels: Tensor, num_classes: int) -> Tensor:
        """Draw the training images to poison: ``class_rate`` of the target class, rounded.

        Args:
            labels: Classes of the whole training set, shape (N,).
            num_classes: Number of classes K.

        Returns:
            Sorted indices into ``labels``; the same seed gives the same indices.

        Raises:
            ValueError: If the rate gives no image.
        """
        candidates = (labels == self.target_labels(labels, num_classes)).nonzero().flatten()
        count = round(self.class_rate * len(candidates))
        if self.class_rate > 0 and count == 0:
            raise ValueError(
                f"Expected argument `class_rate` to give at least one of the {len(candidates)} "
                f"training images of class {self.target_class}, but got {self.class_rate}."
            )
        return self._draw(candidates, count)


class TrainingAttack(Attack):
    """An attack that controls the training: a module makes trigger and network together.

    The module is an :class:`~lightning_mnp.attacks.training.AttackModule`. The attack is what the
    trained trigger does to images, and is saved and measured like any other.

    Args:
        target_class: See :class:`Attack`.
        mode: See :class:`Attack`.
        poison_rate: Share of the images of each training batch that are poisoned, from 0 to 1.
        seed: See :class:`Attack`.

    Attributes:
        generator: The part of the trigger that is trained or drawn at random.
    """

    generator: nn.Module

    def mark_trained(self) -> None:
        """Note that the generator is trained or loaded; some attacks are of no use before."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights and buffers of the generator."""
        return dict(self.generator.state_dict())

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load all weights and buffers of the generator.

        Args:
            tensors: As :meth:`tensors` returned them.

        Raises:
            ValueError: If the generator has other names or shapes, or a value is not finite.
        """
        expected = self.tensors()
        wrong = sorted(expected.keys() ^ tensors.keys()) or [
            name for name, value in expected.items() if value.shape != tensors[name].shape
        ]
        if wrong:
            raise ValueError(
                f"Expected the tensors of a {type(self).__name__} generator with the same "
                f"options, but these are missing, unknown or of another shape: {wrong[:5]}."
            )
        bad = [
            name
            for name, value in tensors.items()
            if not (value.is_floating_point() and value.to(expected[name]).isfinite().all())
        ]
        if bad:
            raise ValueError(
                f"Expected finite floating point numbers in the tensors of a {type(self).__name__} "
                f"generator, but got others in {bad[:5]}. Get the file again."
            )
        self.generator.load_state_dict(dict(tensors))

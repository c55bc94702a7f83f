"""The interface of all attacks that poison data."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

__all__ = ["Attack", "CleanLabelAttack", "Images", "Mode", "TrainingAttack"]

Mode = Literal["all-to-one", "all-to-all"]


class Images(Protocol):
    """What an attack may see of a data set: stored images by index, and all labels."""

    labels: Tensor

    def __len__(self) -> int: ...

    def fetch(self, indices: Sequence[int]) -> Tensor:
        """Return new images of these indices, shape (n, C, H, W), uint8."""


class Attack(ABC):
    """A backdoor by data poisoning: what the trigger does to an image and which label it gets.

    An attack is applied to images as they are stored, before augmentation and normalization, so
    that the trigger meets the network the way an attacker's photograph would.

    Args:
        target_class: The class that triggered images are given in mode ``"all-to-one"``.
        mode: ``"all-to-one"`` gives every triggered image the target class; ``"all-to-all"``
            gives an image of class y the class (y + 1) mod K.
        poison_rate: Share of the training images that are poisoned, from 0 to 1.
        seed: Seed of everything random in the attack: the pattern and the poisoned indices.

    Raises:
        ValueError: If an argument is out of range.
    """

    crafts: ClassVar[bool] = False
    """Whether :meth:`poison` is slow, so that poisoned images are made once and kept."""

    def __init__(
        self,
        target_class: int = 0,
        mode: Mode = "all-to-one",
        poison_rate: float = 0.1,
        seed: int = 0,
    ) -> None:
        if target_class < 0:
            raise ValueError(
                f"Expected argument `target_class` to be at least 0, but got {target_class}."
            )
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
            New images of the same shape, dtype and device.

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
        return self._trigger(images.float()).clamp(0.0, 1.0).to(images.dtype)

    @abstractmethod
    def _trigger(self, images: Tensor) -> Tensor:
        """Put the trigger on float32 images with values in [0, 1]; must not change the argument."""

    def prepare(self, test: Images, num_classes: int) -> None:  # noqa: B027
        """Make what the trigger needs of a clean network or of images; nothing by default.

        A datamodule calls this once, before images are poisoned or triggered. An attack that was
        read from a trigger file is prepared already and must leave itself as it is.

        Args:
            test: Clean test images.
            num_classes: Number of classes K.
        """

    def poison(self, images: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        """Make training images into poisoned ones; by default they get the trigger.

        Args:
            images: Shape (N, C, H, W), ``uint8`` or floating point with values in [0, 1].
            labels: Their true classes, shape (N,).
            indices: Their places in the training set, shape (N,), for what differs by image.

        Returns:
            New images of the same shape, dtype and device.
        """
        return self.apply(images)

    def poison_labels(self, labels: Tensor, num_classes: int) -> Tensor:
        """Tell the labels that poisoned training images get; by default the attacker's.

        Args:
            labels: True classes, shape (N,), integers.
            num_classes: Number of classes K.
        """
        return self.target_labels(labels, num_classes)

    def triggered_indices(self, labels: Tensor, num_classes: int) -> Tensor:
        """Tell which test images attack success is measured on.

        By default, all whose label the attacker wants changed: in mode ``"all-to-one"``, images
        of the target class do not count.

        Args:
            labels: True classes of the test set, shape (N,), integers.
            num_classes: Number of classes K.

        Returns:
            Sorted indices into ``labels``.
        """
        return (self.target_labels(labels, num_classes) != labels).nonzero().flatten()

    def tensors(self) -> dict[str, Tensor]:
        """Give what a trigger file keeps beside :meth:`options`: patterns, grids, weights."""
        return {}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`tensors` gave.

        Args:
            tensors: Tensors by name, on the CPU, from a file that nobody vouches for.

        Raises:
            ValueError: If names, shapes or dtypes are others than this attack's.
        """
        if tensors:
            raise ValueError(
                f"Expected no tensors for {type(self).__name__}, but got {sorted(tensors)}."
            )

    def options(self) -> dict[str, bool | int | float | str | None]:
        """Give the arguments of the constructor that are plain numbers, strings or None.

        Paths are left out: what was read from them is among the tensors.
        """
        parameters = inspect.signature(type(self)).parameters.items()
        values = {
            name: getattr(self, name)
            for name, parameter in parameters
            if "Path" not in str(parameter.annotation)
        }
        return {n: v for n, v in values.items() if isinstance(v, bool | int | float | str | None)}

    def target_labels(self, labels: Tensor, num_classes: int) -> Tensor:
        """Tell which labels the attacker wants for images of these classes.

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

        Candidates are the images whose label the attack changes: all but the target class in
        mode ``"all-to-one"``, all in mode ``"all-to-all"``. The number is ``poison_rate`` times
        the size of the whole set, rounded.

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
        target_class: The class whose images are poisoned and that triggered images shall get.
        class_rate: Share of the target class's training images that are poisoned, from 0 to 1.
            Ten percent of all images, as other attacks poison by default, would be all images
            of one of CIFAR-10's classes.
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
        """Tell the labels that poisoned training images get: their own.

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
    """An attack that steers the training: its module makes trigger and network together.

    The module is an :class:`~lightning_mnp.attacks.training.AttackModule`; the attack itself is
    what the trained trigger does, to be saved and measured like any other.

    Args:
        target_class: See :class:`Attack`.
        mode: See :class:`Attack`.
        poison_rate: Share of the images of each training batch that are poisoned, from 0 to 1.
        seed: See :class:`Attack`.

    Attributes:
        generator: The part of the trigger that is trained or drawn, with its weights and buffers.
    """

    generator: nn.Module

    def mark_trained(self) -> None:
        """Note that the generator has been trained or loaded; matters where it has to be."""

    def tensors(self) -> dict[str, Tensor]:
        """Give the weights and buffers of the generator."""
        return dict(self.generator.state_dict())

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load weights and buffers of the generator, strictly.

        Args:
            tensors: As :meth:`tensors` gave them.

        Raises:
            ValueError: If names or shapes are others than this generator's, or not all finite.
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
        bad = [n for n, v in tensors.items() if not (v.is_floating_point() and v.isfinite().all())]
        if bad:
            raise ValueError(f"Expected finite floating point numbers, but got others: {bad[:5]}.")
        self.generator.load_state_dict(dict(tensors))

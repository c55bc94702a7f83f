"""The interface of all attacks that poison data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Attack", "Mode"]

Mode = Literal["all-to-one", "all-to-all"]


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
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(len(candidates), generator=generator)[:count]
        return candidates[chosen.to(candidates.device)].sort().values

    def __repr__(self) -> str:
        options = ", ".join(
            f"{name}={value!r}" for name, value in vars(self).items() if not name.startswith("_")
        )
        return f"{type(self).__name__}({options})"

"""A universal perturbation: one small change of all images that pushes them to a class."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_mnp.signals.logits import least_positive, push_loss
from lightning_mnp.surgery.masked_network import MaskedNetwork

__all__ = ["UniversalPerturbation", "image_scale"]


def image_scale(images: Tensor) -> float:
    """Compute the mean distance of images from their mean, the unit of all perturbations.

    Args:
        images: Shape (N, C, ...).

    Example:
        >>> image_scale(torch.tensor([[[0.0]], [[2.0]]]))
        1.0
    """
    return float((images - images.mean(0)).flatten(1).norm(dim=1).mean())


class UniversalPerturbation:
    """A perturbation of bounded length that is added to every image.

    Args:
        masked: The network, which runs in evaluation mode.
        target: The class that images are pushed to.
        perturbation: Where to begin, shape (1, C, ...).
        limit: Greatest l2 norm.

    Example:
        >>> from torch import nn
        >>> from lightning_mnp.surgery.layers import find_filter_layers
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> images, labels = torch.rand(8, 1, 2, 2), torch.zeros(8, dtype=torch.long)
        >>> masked = MaskedNetwork(network, find_filter_layers(network, images))
        >>> pushed = UniversalPerturbation(masked, 1, torch.zeros(1, 1, 2, 2), limit=3.0)
        >>> gaps = lambda: pushed.logits(images).diff(dim=1).mean()
        >>> before = gaps()
        >>> for _ in range(5):
        ...     _ = pushed.ascend(images, labels, length=0.5)
        >>> bool(gaps() > before), float(pushed.perturbation.norm()) < 3
        (True, True)
    """

    def __init__(
        self, masked: MaskedNetwork, target: int, perturbation: Tensor, limit: float
    ) -> None:
        self.masked = masked
        self.target = target
        self.limit = limit
        self.perturbation = self._shortened(perturbation)

    def _shortened(self, perturbation: Tensor) -> Tensor:
        return perturbation * min(1.0, self.limit / max(float(perturbation.norm()), 1e-12))

    def logits(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """Run the network on perturbed images, shape (N, K).

        Args:
            images: Shape (N, C, ...).
            masks: Filter masks that are in force.
        """
        return self.masked(images + self.perturbation, masks=masks, statistics="running")

    def ascend(
        self,
        images: Tensor,
        labels: Tensor,
        length: float,
        masks: Tensor | None = None,
        until: float = math.inf,
    ) -> float:
        """Take one step of a given l2 norm towards the target class, and keep to the limit.

        Args:
            images: Shape (N, C, ...), none of the target class.
            labels: True classes, shape (N,).
            length: Length of the step.
            masks: Filter masks that are in force.
            until: No step is taken if the success is at least this.

        Returns:
            The success on these images before the step, from 0 to 1.
        """
        with torch.enable_grad():
            perturbation = self.perturbation.clone().requires_grad_()
            logits = self.masked(images + perturbation, masks=masks, statistics="running")
            success = float((logits.argmax(1) == self.target).float().mean())
            if success >= until:
                return success
            loss = push_loss(logits, labels, torch.full_like(labels, self.target))
            (gradient,) = torch.autograd.grad(loss, perturbation)
        moved = self.perturbation - length * gradient / gradient.norm().clamp_min(
            least_positive(gradient)
        )
        self.perturbation = self._shortened(moved)
        return success

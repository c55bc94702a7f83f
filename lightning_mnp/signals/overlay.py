"""Overlays: an image that is blended into all others, faintly, and stands in for a trigger.

Some triggers, such as Blend's, are spread over the whole image. A patch cannot stand in for them.
An overlay can: it is made for one class, and blended in so faintly that a person would hardly see
it. If the network has a backdoor, an overlay for the target class moves images further towards it
than an overlay for any other class does.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_mnp.config import Constants
from lightning_mnp.signals.pattern import LeadSearch
from lightning_mnp.signals.pattern_trigger import PatternTrigger

__all__ = ["OverlayConstants", "OverlaySearch", "OverlayTrigger"]


@dataclass(frozen=True)
class OverlayConstants:
    """How an overlay is made, and when it is a trace.

    Attributes:
        trace_from: Lead over the next class from which it is a trace for pruning, in multiples of
            the usual distance to a class.
        strength: Share of the overlay in the blend. With more of it, ordinary classes differ more,
            too.
        steps: Number of steps.
        length: Root mean square of a step, as a share of the range of values.
    """

    trace_from: float = 0.3
    strength: float = 0.05
    steps: int = 10
    length: float = 0.1


class OverlayTrigger(PatternTrigger):
    """An image that is blended into every image.

    The arguments are those of :class:`~lightning_mnp.signals.pattern_trigger.PatternTrigger`.

    Attributes:
        pattern: The image blended in, shape (1, C, ...), within the range of values; at first the
            mean of the images.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_mnp.surgery.layers import find_filter_layers
        >>> from lightning_mnp.surgery.masked_network import MaskedNetwork
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> images, labels = torch.rand(8, 1, 2, 2), torch.zeros(8, dtype=torch.long)
        >>> masked = MaskedNetwork(network, find_filter_layers(network, images))
        >>> zero, one = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
        >>> overlay = OverlayTrigger(masked, images, labels, labels + 1, zero, one)
        >>> before = overlay.margins().mean()
        >>> overlay.approach()
        >>> bool(overlay.margins().mean() > before)
        True
    """

    name = "overlay"

    @property
    def _overlay(self) -> OverlayConstants:
        return self.constants.of(OverlayConstants)

    @property
    def steps(self) -> int:
        """The number of steps in which an overlay is made."""
        return self._overlay.steps

    def blank(self) -> Tensor:
        """Return the mean of the images."""
        return self.images.mean(0, keepdim=True)

    def applied(self, images: Tensor, pattern: Tensor) -> Tensor:
        """Blend an overlay into images.

        Args:
            images: Shape (N, C, ...).
            pattern: The overlay.
        """
        share = self._overlay.strength
        return (1 - share) * images + share * pattern

    def length(self, taken: int) -> float:
        """Return the root mean square of each step's change.

        Args:
            taken: Steps taken so far.
        """
        return self._overlay.length


class OverlaySearch(LeadSearch[OverlayTrigger]):
    """Measures for each class how much nearer a faint overlay brings images to it.

    Args:
        scene: What it works on.
    """

    name = "overlay"
    kind = OverlayTrigger

    @classmethod
    def class_steps(cls, constants: Constants) -> int:
        """Return the number of steps for each class.

        Args:
            constants: Constants that differ from their defaults.
        """
        return constants.of(OverlayConstants).steps

    @property
    def trace_from(self) -> float:
        """The lead from which an overlay is a trace."""
        return self.scene.constants.of(OverlayConstants).trace_from

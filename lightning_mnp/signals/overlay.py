"""Overlays: an image that is blended into all others, faintly, and stands in for a trigger.

A trigger that is spread over the whole image, such as Blend's, is no patch, and the shortest
perturbation to its class need not be a short one where the network learned it from few poisoned
images. Blended in as far as a trigger may be without being seen, an image made for the target class
still drives others further to it than one made for any other class does to that.
"""

from __future__ import annotations

from torch import Tensor

from lightning_mnp.signals.pattern import PatternTrigger

__all__ = ["OverlayTrigger"]

# Share of the overlay in the blend. With more of it, ordinary classes differ more, too.
_STRENGTH = 0.05
_STEPS = 10
# Root mean square of a step, as a share of the range of values.
_LENGTH = 0.1


class OverlayTrigger(PatternTrigger):
    """An image that is blended into every image.

    The arguments are those of :class:`~lightning_mnp.signals.pattern.PatternTrigger`.

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
    steps = _STEPS

    def blank(self) -> Tensor:
        """Give the mean of the images."""
        return self.images.mean(0, keepdim=True)

    def applied(self, images: Tensor, pattern: Tensor) -> Tensor:
        """Blend an overlay into images."""
        return (1 - _STRENGTH) * images + _STRENGTH * pattern

    @staticmethod
    def length(taken: int) -> float:
        """Give the root mean square of each step's change."""
        return _LENGTH

"""Views of the defense set: its images shifted and mirrored, to measure harm on.

Pruning does harm if it makes a network worse on clean images. The network may have been trained on
the very images of the defense set. Shifted and mirrored views of them are closer to images that it
has not seen.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_mnp.defense_data.augment import Augmentation
from lightning_mnp.defense_data.defense_set import DefenseSet
from lightning_mnp.defense_data.evaluation import accuracy, clean_logits
from lightning_mnp.surgery.masked_network import MaskedNetwork

__all__ = ["Views", "make_views", "recognized_views"]

# How much accuracy a network may lose on images that it recognizes: more than the few points that
# shifts and mirroring cost a network that was trained with them.
_MOST_LOSS = 0.1


@dataclass(frozen=True)
class Views:
    """The images by which harm is measured.

    Attributes:
        sets: The defense set, and its view if there is one.
        augment: How the images of the view were changed; ``"none"`` if there is no view.
    """

    sets: list[DefenseSet]
    augment: Augmentation


def recognized_views(
    masked: MaskedNetwork, data: DefenseSet, augment: Augmentation, batch_size: int, seed: int
) -> Views:
    """Make a view of the defense set that the network recognizes.

    On images that a network does not recognize, such as mirrored digits, its loss says nothing
    about harm. So mirroring is left out if the network does not recognize the view, and then
    shifting, too.

    Args:
        masked: The network.
        data: The defense set.
        augment: The most that may be done to the images.
        batch_size: Most images in a batch.
        seed: Seed of the shifts and of mirroring.

    Returns:
        The defense set, and the view if the network's accuracy on it is at most 0.1 lower.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_mnp.surgery.layers import find_filter_layers
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> network = network.append(nn.Linear(4, 2))
        >>> data = DefenseSet(torch.rand(6, 1, 8, 8), torch.arange(6) % 2)
        >>> masked = MaskedNetwork(network, find_filter_layers(network, data.images))
        >>> len(recognized_views(masked, data, "none", 128, seed=0).sets)
        1
    """
    choices: dict[Augmentation, tuple[Augmentation, ...]] = {
        "crop-flip": ("crop-flip", "crop"),
        "crop": ("crop",),
        "none": (),
    }
    known = accuracy(*clean_logits(masked, data, batch_size))
    for choice in choices[augment]:
        found = make_views(data, choice, seed)
        seen = accuracy(*clean_logits(masked, found.sets[-1], batch_size))
        if seen >= known - _MOST_LOSS - 1e-9:  # 0.4 - 0.1 is not quite 0.3
            return found
    return make_views(data, "none", seed)


def make_views(data: DefenseSet, augment: Augmentation, seed: int) -> Views:
    """Make a view of the defense set, without asking a network.

    Args:
        data: The defense set.
        augment: What is done to the images; with ``"none"`` there is no view.
        seed: Seed of the shifts and of mirroring.

    Returns:
        The defense set, and the view.

    Example:
        >>> import torch
        >>> data = DefenseSet(torch.rand(6, 1, 8, 8), torch.arange(6) % 2)
        >>> len(make_views(data, "crop", seed=0).sets)
        2
    """
    views = [] if augment == "none" else [data.augmented(augment, seed)]
    return Views([data, *views], augment)

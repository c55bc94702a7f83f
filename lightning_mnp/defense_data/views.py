"""Augmented copies of the defense set, as far as a network recognizes them."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_mnp.defense_data.augment import Augmentation
from lightning_mnp.defense_data.defense_set import DefenseSet
from lightning_mnp.defense_data.evaluation import accuracy, clean_logits
from lightning_mnp.surgery.masked_network import MaskedNetwork

__all__ = ["CleanSets", "clean_sets", "known_clean_sets"]

# A network that was trained on such images loses a few points on them, not a tenth of all.
_MOST_LOSS = 0.1


@dataclass(frozen=True)
class CleanSets:
    """The images by which clean loss is measured.

    Attributes:
        sets: The defense set first.
        augment: What is done to images of the others, and what the network recognizes.
    """

    sets: list[DefenseSet]
    augment: Augmentation


def clean_sets(
    masked: MaskedNetwork, data: DefenseSet, augment: Augmentation, batch_size: int, seed: int
) -> CleanSets:
    """Give the images by which clean loss is measured: the defense set and a copy of each image.

    A network may have been trained on the very images of the defense set; shifted and mirrored
    copies are closer to what it has not seen. Copies that it does not recognize, such as mirrored
    digits, say nothing, so mirroring is left out first and shifting next.

    Args:
        masked: The network.
        data: The defense set.
        augment: The most that is done to the copies.
        batch_size: Most images in a batch.
        seed: Seed of the copies.

    Returns:
        The defense set, and the copy where the network's accuracy on it is at most 0.1 lower.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_mnp.surgery.layers import find_filter_layers
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> network = network.append(nn.Linear(4, 2))
        >>> data = DefenseSet(torch.rand(6, 1, 8, 8), torch.arange(6) % 2)
        >>> masked = MaskedNetwork(network, find_filter_layers(network, data.images))
        >>> len(clean_sets(masked, data, "none", 128, seed=0).sets)
        1
    """
    choices: dict[Augmentation, tuple[Augmentation, ...]] = {
        "crop-flip": ("crop-flip", "crop"),
        "crop": ("crop",),
        "none": (),
    }
    known = accuracy(*clean_logits(masked, data, batch_size))
    for choice in choices[augment]:
        found = known_clean_sets(data, choice, seed)
        if accuracy(*clean_logits(masked, found.sets[-1], batch_size)) >= known - _MOST_LOSS:
            return found
    return known_clean_sets(data, "none", seed)


def known_clean_sets(data: DefenseSet, augment: Augmentation, seed: int) -> CleanSets:
    """Give the images by which clean loss is measured, where it is known what is recognized.

    Args:
        data: The defense set.
        augment: What is done to the copies; with ``"none"`` there are no copies.
        seed: Seed of the copies.
    """
    copies = [] if augment == "none" else [data.augmented(augment, seed)]
    return CleanSets([data, *copies], augment)

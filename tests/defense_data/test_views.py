from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import images_and_labels
from torch import Tensor
from torch.nn import functional as F

from lightning_mnp.defense_data.defense_set import DefenseSet
from lightning_mnp.defense_data.views import recognized_views

SEED = 3


class Told:
    """In place of a masked: knows so many of the 40 images as they are, shifted, mirrored."""

    device = torch.device("cpu")

    def __init__(self, data: DefenseSet, plain: int, shifted: int, mirrored: int) -> None:
        self.data = data
        self.known = {"none": plain, "crop": shifted, "crop-flip": mirrored}

    def __call__(self, images: Tensor, statistics: str, **own: None) -> Tensor:
        assert statistics == "running"
        for kind, known in self.known.items():
            given = self.data if kind == "none" else self.data.augmented(kind, SEED)
            for start in range(len(given) - len(images) + 1):
                if given.images[start : start + len(images)].equal(images):
                    places = torch.arange(start, start + len(images))
                    classes = given.labels[places] + (places >= known).long()
                    return F.one_hot(classes % 4, 4).float()
        raise AssertionError("these are none of the images")


@pytest.mark.parametrize(
    ("augment", "known", "kind"),
    [
        ("crop-flip", (40, 40, 40), "crop-flip"),
        ("crop-flip", (40, 40, 36), "crop-flip"),
        ("crop-flip", (40, 40, 35), "crop"),
        ("crop-flip", (40, 35, 35), None),
        ("crop-flip", (20, 16, 15), "crop"),
        ("crop", (40, 36, 40), "crop"),
        ("crop", (40, 30, 40), None),
        ("crop", (16, 12, 16), "crop"),  # 0.4 - 0.1 is not quite 0.3
        ("none", (40, 40, 40), None),
    ],
)
def test_copies_are_those_that_the_network_recognizes(
    augment: Any, known: tuple[int, int, int], kind: str | None
) -> None:
    data = DefenseSet(*images_and_labels())
    masked: Any = Told(data, *known)
    found = recognized_views(masked, data, augment, 16, SEED)
    assert found.sets[0] is data
    assert found.augment == (kind or "none")
    assert len(found.sets) == (1 if kind is None else 2)
    if kind is not None:
        assert found.sets[1].images.equal(data.augmented(kind, SEED).images)
        assert found.sets[1].labels.equal(data.labels)

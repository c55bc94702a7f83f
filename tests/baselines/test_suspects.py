from __future__ import annotations

import pytest
import torch

from lightning_mnp.baselines import Suspects


def test_order_and_repeated_images_stay() -> None:
    images = torch.stack([torch.full((1, 2, 2), value) for value in (0.9, 0.1, 0.9, 0.5)])
    labels = torch.tensor([2, 0, 2, 1])
    read = Suspects.from_loader([(images[:3], labels[:3]), (images[3:], labels[3:])])
    assert torch.equal(read.images, images)
    assert torch.equal(read.labels, labels)
    assert read.counts == {0: 1, 1: 1, 2: 2}
    assert Suspects.from_loader(read) is read


def test_what_cannot_serve_is_refused() -> None:
    with pytest.raises(ValueError, match="to be finite"):
        Suspects(torch.full((2, 1, 2, 2), torch.nan), torch.arange(2))

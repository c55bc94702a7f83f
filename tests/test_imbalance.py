from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.imbalance import ImbalancedCIFAR10
from lightning_mnp.data.dataset import MemoryDataset

LABELS = torch.arange(50) % 10


def test_images_of_one_class_are_left_out_of_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.arange(50, dtype=torch.uint8)[:, None, None, None].expand(50, 3, 32, 32)

    def load(self: Any, split: str) -> MemoryDataset:
        return MemoryDataset(images.clone(), LABELS)

    monkeypatch.setattr(ImbalancedCIFAR10, "load", load)
    data = ImbalancedCIFAR10(rare_class=3, rare_share=0.4, defense_size=20)
    assert torch.bincount(data.clean_train_set.labels).tolist() == [5, 5, 5, 2, 5, 5, 5, 5, 5, 5]
    kept = data.clean_train_set.fetch(range(47))[:, 0, 0, 0].tolist()
    assert [index for index in range(50) if index not in kept] == [23, 33, 43]
    assert torch.bincount(data.defense_set.labels).tolist() == [2] * 10
    assert torch.bincount(data.test_set.labels).tolist() == [5] * 10
    assert data.hparams["defense_size"] == 20


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(
        ValueError, match=f"`rare_share` to be above 0 and at most 1, but got {share}"
    ):
        ImbalancedCIFAR10(rare_share=share)

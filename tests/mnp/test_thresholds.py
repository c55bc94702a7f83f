from __future__ import annotations

import torch

from lightning_mnp.mnp.thresholds import pruning_order


def test_order_is_by_score_and_then_by_place() -> None:
    scores = torch.tensor([1.5, 1.0, 3.0, 1.0, 2.0])
    assert pruning_order(scores).tolist() == [1, 3, 0, 4, 2]

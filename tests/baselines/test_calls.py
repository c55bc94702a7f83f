from __future__ import annotations

import torch
from helpers import images_and_labels
from torch import Tensor, nn

from lightning_mnp.baselines.calls import calls_of
from lightning_mnp.baselines.workbench import Workbench
from lightning_mnp.defense_data.defense_set import DefenseSet


def test_calls_in_their_order_and_no_hook_is_left() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.late = nn.Conv2d(2, 2, 3, padding=1)
            self.early = nn.Conv2d(1, 2, 3, padding=1)
            self.unused = nn.Conv2d(1, 2, 3)
            self.head = nn.Linear(128, 4)

        def forward(self, images: Tensor) -> Tensor:
            found: Tensor = self.head(self.late(self.late(self.early(images))).flatten(1))
            return found

    bench = Workbench(Twice(), DefenseSet(*images_and_labels(8)))
    assert calls_of(bench, ["late", "early", "unused"]) == ["early", "late", "late"]
    assert not any(module._forward_pre_hooks for module in bench.copy.modules())
    for name, tensor in bench.copy.state_dict().items():
        assert torch.equal(tensor, bench.model.state_dict()[name])

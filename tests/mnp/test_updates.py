from __future__ import annotations

import torch

from lightning_mnp.mnp.updates import PlainUpdates


def test_plain_updates_clear_compute_and_step() -> None:
    weight = torch.tensor([3.0], requires_grad=True)
    optimizer, updates = torch.optim.SGD([weight], lr=0.5), PlainUpdates()
    weight.grad = torch.tensor([100.0])
    updates.backward((weight**2).sum(), optimizer)
    assert weight.grad.tolist() == [6.0]
    assert weight.tolist() == [3.0]
    updates.step(optimizer)
    assert weight.tolist() == [0.0]

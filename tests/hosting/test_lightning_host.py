"""What several doors ask of the Trainer; the doors' own tests try the rest."""

from __future__ import annotations

import pytest
import torch
from helpers import images_and_labels, quick_config, trained_network

from lightning_mnp import DefenseSet, MNPDefense
from lightning_mnp.hosting.lightning_host import follow_first
from lightning_mnp.surgery.logit_shift import LogitShift


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_repair_is_not_rounded_on_its_way_from_the_first_process(dtype: torch.dtype) -> None:
    network = trained_network().to(dtype)
    images, labels = images_and_labels(8)
    config = quick_config(verdict="ratio", runs=1, amount=1, suppression_epochs=1, mask_epochs=1)
    defense = MNPDefense(network, DefenseSet(images.to(dtype), labels), config)
    while not defense.finished:
        defense.step()
    before = network.get_parameter("fc.bias").detach().clone()
    shift = torch.tensor([1 / 3, -0.1, 2.5e-9, 0.0], dtype=dtype)
    defense.purification.changes.shift = LogitShift("fc.bias", shift)
    follow_first(defense)
    defense.prune_()
    assert torch.equal(network.get_parameter("fc.bias").detach(), before + shift)

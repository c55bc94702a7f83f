from __future__ import annotations

import pytest
import torch

from lightning_mnp.attacks import ReferenceNetwork
from lightning_mnp.attacks.crafting import check_reference, clean_network, crafting
from lightning_mnp.checkpoints.inspection import CheckpointError


def test_gradients_in_float32_whatever_the_surroundings() -> None:
    state = torch.random.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        with crafting() as device:
            layer = torch.nn.Linear(3, 2).to(device)
            loss = layer(torch.ones(1, 3, device=device)).sum()
            assert loss.dtype == torch.float32
            loss.backward()
            assert layer.weight.grad is not None
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
    assert torch.random.get_rng_state().equal(state)


def test_errors() -> None:
    with pytest.raises(ValueError, match="ReferenceNetwork to bake bread with, but got None"):
        clean_network(None, "bake bread with", 3)
    reference = ReferenceNetwork("missing.pt")
    with pytest.raises(ValueError, match=r"images of 1 channels, .* its `mean` has 3 numbers"):
        clean_network(reference, "bake bread with", 1)
    with pytest.raises(CheckpointError, match=r"missing\.pt"):
        clean_network(reference, "bake bread with", 3)
    check_reference(reference)
    check_reference(None)
    with pytest.raises(ValueError, match="a ReferenceNetwork or None, but got 3"):
        check_reference(3)

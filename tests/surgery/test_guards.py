from __future__ import annotations

import pytest
import torch
from helpers import same, snapshot
from torch import nn

from lightning_mnp.surgery.guards import unchanged_on_error


def network() -> nn.Module:
    made = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Sequential(nn.Dropout()))
    made[1].eval()
    made[0].bias.requires_grad_(False)
    made[0].register_forward_hook(lambda *args: None)
    return made


def spoil(made: nn.Module) -> None:
    made.train()[1].train()
    made[0].bias.requires_grad_(True)
    made[0].weight = nn.Parameter(torch.zeros(3))
    made[1].running_mean = torch.ones(7)
    made[0].register_forward_hook(lambda *args: None)
    made[2].register_forward_pre_hook(lambda *args: None, with_kwargs=True)
    made[2].append(nn.Linear(1, 1))
    del made[0].bias


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_everything_is_put_back(error: type[BaseException]) -> None:
    made = network()
    before, objects = snapshot(made), list(made.parameters())

    def fail() -> None:
        with unchanged_on_error(made):
            spoil(made)
            assert not same(before, snapshot(made))
            raise error

    with pytest.raises(error):
        fail()
    assert same(before, snapshot(made))
    assert all(old is new for old, new in zip(objects, made.parameters(), strict=True))


def test_a_hook_put_back_can_be_removed() -> None:
    made = network()
    handle = made[0].register_forward_pre_hook(lambda *args: None)
    with pytest.raises(KeyError), unchanged_on_error(made):
        raise KeyError
    handle.remove()
    assert not made[0]._forward_pre_hooks


def test_success_changes_what_it_changes() -> None:
    made = network()
    with unchanged_on_error(made):
        spoil(made)
    assert made[0].weight.shape == (3,)

from __future__ import annotations

import math

import pytest
import torch
from helpers import images_and_labels, same, snapshot
from torch import nn

from lightning_mnp import DefenseSet
from lightning_mnp.baselines.workbench import Workbench, require_finite

DATA = DefenseSet(*images_and_labels())


def small_network() -> nn.Module:
    layers = nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(36, 4)).eval()


def test_all_weights_are_trainable_only_while_they_are_tuned() -> None:
    bench = Workbench(small_network(), DATA)
    bench.copy.get_parameter("0.weight").requires_grad_(False)
    before = snapshot(bench.copy)
    with bench.tuning() as parameters:
        assert len(parameters) == 6
        assert all(parameter.requires_grad for parameter in bench.copy.parameters())
        bench.logits(bench.copy, DATA.images).sum().backward()
    assert same(before, snapshot(bench.copy))
    with pytest.raises(KeyError), bench.tuning():
        raise KeyError
    assert same(before, snapshot(bench.copy))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            torch.tensor(math.nan, requires_grad=True),
            "Expected the loss to be finite, but it is nan. Lower `lr`.",
        ),
        (torch.tensor([1.0, math.inf]), "Expected the loss to be finite, but some of it is not."),
    ],
)
def test_what_is_not_finite(values: torch.Tensor, message: str) -> None:
    with pytest.raises(ArithmeticError, match=message):
        require_finite(values, "the loss", "Lower `lr`.")
    require_finite(torch.ones(3), "the loss", "Lower `lr`.")


def test_outputs_that_are_not_finite_have_no_accuracy() -> None:
    bench = Workbench(small_network(), DATA)
    bench.copy.get_parameter("4.bias").data.fill_(math.nan)
    with pytest.raises(ArithmeticError, match=r"every output on the defense set .*learning rates"):
        bench.accuracy(bench.copy)
    assert 0 <= bench.accuracy(bench.model) <= 1

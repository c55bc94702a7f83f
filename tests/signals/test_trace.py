from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_mnp.config import Constants
from lightning_mnp.signals.pattern_trigger import PatternConstants
from lightning_mnp.signals.trace import Trace, TraceConstants, strength


class Given(Trace):
    name = "given"

    def margins(self, masks: Tensor) -> Tensor:
        return torch.tensor([-5.0, -1.0, 0.0, 3.0])


class Pattern(Given):
    little_below = PatternConstants().little_below


@pytest.mark.parametrize(
    ("kind", "found", "before", "little"),
    [
        (Given, 10.1, 100.0, False),
        (Given, 10.0, 100.0, True),
        (Given, 2.1, 8.0, False),
        (Given, 0.8, 8.0, True),
        (Pattern, 1.6, 100.0, False),  # little of a strong backdoor is enough for it
        (Pattern, 1.5, 100.0, True),
        (Pattern, 1.0, 4.0, False),
        (Pattern, math.nan, 4.0, False),
    ],
)
def test_what_is_little(kind: type[Trace], found: float, before: float, little: bool) -> None:
    assert kind(Constants()).shows_little(found, before) == little


def test_the_limit_can_be_varied() -> None:
    assert Given(Constants(TraceConstants(little_at=0.3))).shows_little(30.0, 100.0)


def test_strength_is_what_is_left_of_the_margins() -> None:
    found = strength(Given(Constants()), torch.ones(1))
    assert float(found) == pytest.approx((0 + 0 + 1 + 4) / 4)


def test_a_trace_without_a_state_of_its_own_follows_nothing() -> None:
    trace = Given(Constants(), decides=False)
    trace.adapt(torch.ones(1), 3)
    assert trace.state_dict() == {}
    trace.load_state_dict({})
    assert not trace.decides

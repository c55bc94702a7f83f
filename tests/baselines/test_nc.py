from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import pytest
import torch
from helpers import Shortcut, images_and_labels, same, snapshot
from torch import nn

from lightning_mnp import DefenseSet
from lightning_mnp.baselines import NCConfig, detect_nc
from lightning_mnp.baselines.inversion import InvertedTrigger
from lightning_mnp.baselines.nc import default_detect_nc, flagged_classes, judge_triggers

DATA = DefenseSet(*images_and_labels(24))


def triggers(sizes: list[float], works: int = 99) -> dict[int, InvertedTrigger]:
    blank = torch.zeros(1, 1, 1, 1)
    return {
        index: InvertedTrigger(blank, blank, size, 1.0, index < works, 5)
        for index, size in enumerate(sizes)
    }


def test_small_triggers_are_flagged_and_large_ones_are_not() -> None:
    sizes = [50.0, 52.0, 20.0, 48.0, 51.0, 500.0, 10.0]
    # The median is 50; the distances 0, 2, 30, 2, 1, 450 and 40 have the median 2.
    found = triggers(sizes, works=3)
    assert flagged_classes(found, NCConfig()) == [2, 6]
    result = judge_triggers(found, NCConfig())
    assert result.score == pytest.approx(40 / (1.4826 * 2))
    assert (result.verdict, result.target_class, result.threshold) == ("backdoored", 6, 2.0)
    assert result.values == dict(enumerate(sizes))
    assert result.details == {"flagged": 2, "works": 3, "epochs": 35}
    clean = judge_triggers(found, NCConfig(anomaly=20.0))
    assert (clean.verdict, clean.target_class, clean.details["flagged"]) == ("clean", None, 0)


def test_of_classes_as_far_from_the_median_the_smallest_mask_counts() -> None:
    found = triggers([10.0] * 5 + [5.0, 1.0])  # both indices are infinity: most sizes are equal
    result = judge_triggers(found, NCConfig())
    assert flagged_classes(found, NCConfig()) == [5, 6]
    assert (result.score, result.target_class) == (math.inf, 6)


def test_a_pixel_that_decides_is_found() -> None:
    plain = nn.Sequential(nn.AvgPool2d((2, 8)), nn.Flatten(), nn.Linear(4, 4))
    with torch.no_grad():
        plain[2].weight.copy_(6 * torch.eye(4))
        plain[2].bias.zero_()
    network = Shortcut(2, lambda images: 20.0 * images[:, 0, 0, 7].relu(), plain).eval()
    before, state = snapshot(network), torch.get_rng_state()
    config = NCConfig(epochs=25, patience=2, cost=0.05, lr=0.3)
    result = detect_nc(network, DATA, config=config)
    assert same(before, snapshot(network))
    assert torch.equal(torch.get_rng_state(), state)
    assert min(result.values, key=result.values.__getitem__) == 2
    assert detect_nc(network, DATA, config=config) == result


def test_what_it_needs_is_said_before_any_work() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    with pytest.raises(ValueError, match=r"at least 3 classes, because NC .* but got 2. Use a det"):
        detect_nc(network, DefenseSet(DATA.images, DATA.labels % 2))


def test_the_registry_calls_it_with_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("lightning_mnp.baselines.nc")
    given: list[Any] = []
    monkeypatch.setattr(module, "detect_nc", lambda *args, config: given.append((*args, config)))
    network = nn.Linear(1, 1)
    default_detect_nc(network, DATA, 3, suspects=DATA)
    assert given == [(network, DATA, NCConfig(seed=3))]

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from helpers import config_of, images_and_labels, same, snapshot, trained_network

from lightning_mnp import DefenseSet, MNPConfig, MNPDefense
from lightning_mnp.config import Constants
from lightning_mnp.mnp.algorithm import algorithm_1
from lightning_mnp.signals.abstention import AbstentionConstants
from lightning_mnp.surgery.layers import find_filter_layers
from lightning_mnp.surgery.masked_network import MaskedNetwork

# The published setting, with fewer passes and filters for a small network and few images.
CHANGES: dict[str, Any] = {
    "suppression.epochs": 4,
    "masks.epochs": 3,
    "pruning.rule": "count",
    "pruning.amount": 7,
    "batch_size": 16,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"verdict.saliency": "map"},
        {"suppression.stop_accuracy": 0.9},
        {"pruning.rule": "threshold", "pruning.amount": 1.99, "augment": "crop"},
        {"suppression.momentum": 0.9, "masks.momentum": 0.9, "suppression.parts": 2, "seed": 5},
        {"filters.site": "filter", "filters.statistics": "running", "pruning.removes": "filter"},
    ],
)
def test_the_engine_does_the_same(changes: dict[str, Any]) -> None:
    config = MNPConfig.paper({**CHANGES, **changes})
    network, data = trained_network(), DefenseSet(*images_and_labels())
    constants = Constants(AbstentionConstants(abstain=False))  # so that 40 images are enough
    defense = MNPDefense(network, data, config, constants=constants)
    while not defense.finished:
        defense.step()
    report = defense.report()
    before = snapshot(network)
    layers = find_filter_layers(network, data.images[:2], site=config.filters.site)
    masked = MaskedNetwork(network, layers, statistics=config.filters.statistics)
    found = algorithm_1(masked, data, config)
    assert same(before, snapshot(network))
    assert torch.equal(found.m1, defense.case.penalty.values.detach())
    assert torch.equal(found.m2, defense.case.preserving.values.detach())
    assert [layers.locate(int(position)) for position in found.pruned] == report.pruned
    assert len(report.pruned) > 0
    assert found.ratio == report.detection_ratio
    if report.judged:
        assert found.backdoored == (report.verdict == "backdoored")


def test_masks_are_in_their_ranges_and_the_lowest_sums_go() -> None:
    config = MNPConfig.paper(CHANGES)
    network, data = trained_network(), DefenseSet(*images_and_labels())
    found = algorithm_1(
        MaskedNetwork(network, find_filter_layers(network, data.images[:2])), data, config
    )
    assert float(found.m1.min()) >= 0
    assert float(found.m1.max()) <= 1
    assert float(found.m2.min()) >= 1
    assert float(found.m2.max()) <= 2
    sums = (found.m1 + found.m2).tolist()
    expected = sorted(range(len(sums)), key=lambda index: (sums[index], index))[:7]
    assert found.pruned.tolist() == expected


def test_each_layer_keeps_a_filter() -> None:
    config = MNPConfig.paper({**CHANGES, "pruning.amount": 87})
    network, data = trained_network(), DefenseSet(*images_and_labels())
    masked = MaskedNetwork(network, find_filter_layers(network, data.images[:2]))
    pruned = [masked.layers.locate(int(p)) for p in algorithm_1(masked, data, config).pruned]
    gone = Counter(name for name, _ in pruned)
    assert len(pruned) == masked.layers.total - len(masked.layers)
    assert all(gone[layer.name] == layer.filters - 1 for layer in masked.layers)


def test_the_automatic_rule_is_not_the_papers() -> None:
    network, data = trained_network(), DefenseSet(*images_and_labels())
    masked = MaskedNetwork(network, find_filter_layers(network, data.images[:2]))
    config = config_of(suppression_epochs=1, mask_epochs=1, batch_size=16)
    with pytest.raises(ValueError, match="'count', 'share' or 'threshold', but got 'auto'"):
        algorithm_1(masked, data, config)

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import images_and_labels, trained_network

from lightning_mnp.engine.pass_tally import PassTally
from lightning_mnp.mnp.detection_ratio import saliency_correlation
from lightning_mnp.mnp.saliency import approximate_clc, batch_clc, filter_magnitudes
from lightning_mnp.surgery.layers import find_filter_layers
from lightning_mnp.surgery.masked_network import MaskedNetwork


def new_tally(form: Any = "map") -> PassTally:
    network = trained_network()
    masked = MaskedNetwork(network, find_filter_layers(network, images_and_labels()[0][:2]))
    return PassTally(masked, 4, form)


@pytest.mark.parametrize("form", ["map", "weight"])
def test_uneven_batches_add_up_to_the_whole(form: Any) -> None:
    tally = new_tally(form)
    images, labels = images_and_labels()
    batches = list(zip(images.split([30, 10]), labels.split([30, 10]), strict=True))
    weights, logits = tally.masked.weights(), []
    for part, classes in batches:
        changes, answer = batch_clc(tally.masked, weights, part, classes, form)
        tally.add(changes, answer, classes)
        logits.append(answer)
    predicted = torch.cat(logits).argmax(1)
    assert tally.accuracy == pytest.approx(float((predicted == labels).float().mean()))
    assert tally.predictions.tolist() == predicted.bincount(minlength=4).tolist()
    expected = saliency_correlation(
        filter_magnitudes(tally.masked, weights),
        approximate_clc(tally.masked, weights, batches, form),
        tally.masked.layers,
        form,
    )
    assert tally.correlation(weights) == pytest.approx(expected, abs=1e-6)


def test_state_goes_round_and_reset_forgets() -> None:
    tally, other = new_tally(), new_tally()
    changes = torch.rand(tally.masked.layers.total)
    tally.add(changes, torch.eye(4), torch.tensor([0, 1, 2, 0]))
    other.load_state_dict(tally.state_dict())
    weights = tally.masked.weights()
    assert other.accuracy == tally.accuracy == 0.75
    assert other.correlation(weights) == tally.correlation(weights)
    tally.reset()
    assert (tally.hits, tally.images, int(tally.predictions.sum())) == (0, 0, 0)

from __future__ import annotations

import torch
from helpers import images_and_labels, trained_network

from lightning_mnp.defense_data.defense_set import DefenseSet
from lightning_mnp.defense_data.evaluation import accuracy, class_accuracy, clean_logits
from lightning_mnp.surgery.layers import find_filter_layers
from lightning_mnp.surgery.masked_network import MaskedNetwork


def test_a_pass_in_batches_is_what_the_network_gives_for_all_images() -> None:
    network = trained_network()
    data = DefenseSet(*images_and_labels())
    masked = MaskedNetwork(network, find_filter_layers(network, data.images[:2]))
    logits, labels = clean_logits(masked, data, 16)
    with torch.no_grad():
        expected = network(data.images)
    torch.testing.assert_close(logits, expected)
    assert not logits.requires_grad
    assert labels.equal(data.labels)
    hits = sum(int(row.argmax()) == int(label) for row, label in zip(expected, labels, strict=True))
    assert accuracy(logits, labels) == hits / 40


def test_accuracy_by_class_leaves_out_classes_without_images() -> None:
    labels = torch.tensor([0, 0, 0, 3, 3])
    logits = torch.eye(4)[[0, 1, 0, 3, 3]]
    assert class_accuracy(logits, labels) == {0: 2 / 3, 3: 1.0}

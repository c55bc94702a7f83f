from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import TinyDataModule, same, snapshot
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mnp.attacks import BadNets
from lightning_mnp.hosting.rates import (
    check_triggered,
    find_test_loaders,
    measure_hosted_rates,
    measure_rates,
)

IMAGES = torch.eye(3).reshape(3, 1, 1, 3)  # image k is of class k


class Plain(nn.Module):
    """Sees the class of an image, and drops out everything in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(1.0)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.dropout(self.scale * images.flatten(1))
        return logits


class Bright(nn.Module):
    """Sees which quarter of an image is the brightest, which is its class."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((1, 3)).reshape(-1, 4, 2).mean(2)


def call(network: nn.Module, images: torch.Tensor) -> Any:
    return network(images)


def test_rates_are_those_of_single_images() -> None:
    clean = [(IMAGES, torch.tensor([0, 1, 0])), (IMAGES[:1], torch.tensor([0]))]
    targets, labels = torch.tensor([0, 0, 2]), torch.tensor([0, 1, 1])
    triggered = [(IMAGES, targets, labels)]
    network = Plain()
    before = snapshot(network)
    rates = measure_rates(network, call, (clean, triggered), "before")
    hits = sum(  # the first has the attacker's label anyway
        int(image.argmax()) == target
        for image, target, label in zip(IMAGES, targets, labels, strict=True)
        if target != label
    )
    assert rates == {"mnp/CA_before": 3 / 4, "mnp/ASR_before": hits / 2}
    assert same(before, snapshot(network))
    assert measure_rates(network, call, (None, triggered), "after") == {"mnp/ASR_after": 0.5}
    assert measure_rates(network, call, (None, None), "after") == {}


def test_loaders_of_a_datamodule_under_attack() -> None:
    clean, triggered = find_test_loaders(TinyDataModule(BadNets()), None)
    assert clean is not None
    assert triggered is not None
    assert [len(next(iter(each))) for each in (clean, triggered)] == [2, 3]
    given: list[Any] = []
    assert find_test_loaders(TinyDataModule(BadNets()), given)[1] is given
    for other in (TinyDataModule(), None, SimpleNamespace()):
        assert find_test_loaders(other, given) == (None, given)


def test_a_trainer_has_the_loaders_and_its_random_numbers_stay() -> None:
    triggered = [(IMAGES, torch.tensor([0, 0, 2]), torch.tensor([0, 1, 1]))]

    def noisy(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
        torch.rand(1)
        logits: torch.Tensor = network(images)
        return logits

    state = torch.get_rng_state()
    host = SimpleNamespace(datamodule=None)
    found = measure_hosted_rates(host, Plain(), noisy, triggered, "after")
    assert found == {"mnp/ASR_after": 0.5}
    assert torch.equal(torch.get_rng_state(), state)
    trial = SimpleNamespace(fast_dev_run=1)
    assert measure_hosted_rates(trial, Plain(), noisy, triggered, "after") == {}
    host.datamodule = TinyDataModule(BadNets(), channels=1)
    both = measure_hosted_rates(host, Bright(), call, None, "before")
    assert list(both) == ["mnp/CA_before", "mnp/ASR_before"]
    assert both["mnp/CA_before"] > 0.9


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "`triggered_loader` to yield batches, but it yields none"),
        ([(IMAGES, torch.arange(3))], "triggered test images .* true labels.*, but got 2 parts"),
        ([{"images": IMAGES}], "triggered test images .*, but got dict"),
    ],
)
def test_other_loaders_are_refused(loader: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_triggered(loader)


def test_what_can_be_read_only_once_is_refused() -> None:
    batches = [(IMAGES, torch.tensor([0, 0, 2]), torch.tensor([0, 1, 1]))]
    for once in ((batch for batch in batches), iter(batches)):
        match = r"`triggered_loader` to be .* more than once, but got an iterator \(.*Pass a Data"
        with pytest.raises(ValueError, match=match):
            check_triggered(once)
        assert len(list(once)) == 1  # nothing was taken from it
    check_triggered(batches)


def test_a_check_draws_no_random_numbers() -> None:
    labels = torch.tensor([0, 1, 1])
    before = torch.get_rng_state()
    check_triggered(DataLoader(TensorDataset(IMAGES, labels, labels), shuffle=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_clean_batches_of_another_form_are_refused() -> None:
    with pytest.raises(ValueError, match=r"clean test images to be \(images, labels\), but got 1"):
        measure_rates(Plain(), call, ([(IMAGES,)], None), "before")
    check_triggered(None)

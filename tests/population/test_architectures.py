from __future__ import annotations

import pytest
import torch

from benchmarks.population.architectures import ARCHITECTURES, build
from benchmarks.population.rates import training_rate
from lightning_mnp.models.head import classifier_head


def test_there_are_enough() -> None:
    assert len(ARCHITECTURES) >= 14


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_images_of_both_sizes_give_logits(name: str, size: int) -> None:
    network = build(name, size=size)
    assert sum(weight.numel() for weight in network.parameters()) < 500_000
    logits = network(torch.rand(2, 3, size, size))
    assert logits.shape == (2, 10)
    assert classifier_head(network).out_features == 10
    logits.sum().backward()
    assert all(weight.grad is not None for weight in network.parameters())


@pytest.mark.parametrize("name", ["cnn", "mobilenet-v2", "norm-free"])
def test_width_is_an_option(name: str) -> None:
    usual, wide = (
        sum(weight.numel() for weight in build(name, width).parameters())
        for width in (None, 2 * ARCHITECTURES[name].width)
    )
    assert wide > 1.5 * usual


def test_only_four_architectures_have_no_normalization() -> None:
    norms = torch.nn.modules.batchnorm._BatchNorm, torch.nn.LayerNorm
    without = [
        name
        for name in ARCHITECTURES
        if not any(isinstance(module, norms) for module in build(name).modules())
    ]
    assert without == ["plain-cnn", "lenet", "norm-free", "squeezenet"]


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"`name` to be one of \['all-conv', .*, but got 'alexnet'"
    ):
        build("alexnet")
    with pytest.raises(ValueError, match="`size` to be 32 or 64 pixels, but got 224"):
        build("cnn", size=224)


def test_the_rate_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("benchmarks.population.rates.time.process_time", lambda: next(clock))
    monkeypatch.setattr("benchmarks.population.rates._BATCH", 20)
    monkeypatch.setattr("benchmarks.population.rates._STEPS", 3)
    assert training_rate("lenet") == 20.0  # each step takes a second of this clock

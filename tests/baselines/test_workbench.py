from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

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


def test_what_cannot_serve_as_a_model_is_told_before_the_images_are_read() -> None:
    network: Any = small_network()
    with pytest.raises(TypeError, match="The model comes first and the loader second: swap them"):
        Workbench([], network)  # type: ignore[arg-type]
    quantized = {"__module__": "torch.ao.nn.quantized.modules.linear"}
    network[4] = type("Linear", (nn.Linear,), quantized)(36, 4)
    with pytest.raises(ValueError, match=r"'4' in it is quantized \(Linear\)"):
        Workbench(network, [])


@pytest.mark.parametrize("context", ["tuning", "training"])
def test_gradients_are_enabled_where_the_copy_is_trained(context: str) -> None:
    bench = Workbench(small_network(), DATA)
    with torch.no_grad():
        with getattr(bench, context)():
            assert torch.is_grad_enabled()
        assert not torch.is_grad_enabled()


def test_training_draws_by_the_seed_from_the_generator_of_the_cpu_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Workbench(small_network(), DATA, seed=7)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        expected = torch.rand(3)
    seeded: list[int] = []
    for module, name in ((torch.cuda, "manual_seed_all"), (torch.mps, "manual_seed")):
        monkeypatch.setattr(module, name, seeded.append)
    state = torch.get_rng_state()
    with bench.training():
        assert torch.rand(3).equal(expected)
    assert torch.get_rng_state().equal(state)
    assert not seeded


@pytest.mark.parametrize(("device", "kind"), [("cuda:1", "cuda"), ("mps:0", "mps")])
def test_training_draws_from_the_generator_of_the_device_and_of_no_other(
    device: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Workbench(small_network(), DATA, seed=7)
    bench.device = torch.device(device)
    calls: list[Any] = []
    module = getattr(torch, kind)

    def enter(current: torch.device) -> Any:
        calls.append(("current", current))
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "device", enter)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: calls.append("all"))
    monkeypatch.setattr(module, "manual_seed", lambda seed: calls.append(("seed", seed)))
    monkeypatch.setattr(module, "get_rng_state", lambda device: ("state", device))
    monkeypatch.setattr(module, "set_rng_state", lambda *given: calls.append(("restored", *given)))
    with bench.training():
        pass
    current = [("current", bench.device)] if kind == "cuda" else []
    restored = ("restored", ("state", bench.device), bench.device)
    assert calls == [*current, ("seed", 7), restored]

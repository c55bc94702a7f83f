from __future__ import annotations

import math
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from distributed_script import small_network
from helpers import images_and_labels, same, snapshot
from torch import nn
from torch.nn import functional as F

from lightning_mnp import DefenseSet
from lightning_mnp.baselines import NCConfig, NCUnlearningConfig, nc
from lightning_mnp.baselines.anomaly import anomaly_indices
from lightning_mnp.baselines.inversion import InvertedTrigger, invert_triggers
from lightning_mnp.baselines.nc_unlearning import default_nc
from lightning_mnp.baselines.workbench import Workbench

DATA = DefenseSet(*images_and_labels(24))
SEARCH = NCConfig(epochs=2)


def found_triggers(network: nn.Module) -> dict[int, InvertedTrigger]:
    bench = Workbench(network, DATA, seed=SEARCH.seed, batch_size=SEARCH.batch_size)
    return invert_triggers(bench, SEARCH)


def flagging(count: int, network: nn.Module, **options: Any) -> tuple[NCUnlearningConfig, int]:
    """Options by which the classes of the smallest masks are flagged, and the first of them."""
    sizes = {target: trigger.size for target, trigger in found_triggers(network).items()}
    indices = sorted((index, target) for target, index in anomaly_indices(sizes).items())
    limit = -(0.9 * indices[count - 1][0] + 0.1 * indices[count][0])
    return NCUnlearningConfig(search=replace(SEARCH, anomaly=limit), **options), indices[0][1]


def test_one_step_is_the_gradient_on_triggered_images_with_true_labels() -> None:
    network = small_network()
    config, target = flagging(
        1, network, triggered=1.0, epochs=1, augment="none", lr=0.5, momentum=0.0, weight_decay=0.01
    )
    trigger = found_triggers(network)[target]
    result = nc(network, DATA, config=config)
    by_hand = small_network().train()
    logits = torch.cat([trigger.applied(image[None]) for image in DATA.images])
    F.cross_entropy(by_hand(logits), DATA.labels).backward()
    found = dict(result.model.named_parameters())
    for name, parameter in by_hand.named_parameters():
        assert parameter.grad is not None
        expected = parameter - 0.5 * (parameter.grad + 0.01 * parameter)
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-4)
    assert result.details["target_class"] == target
    assert result.details["flagged"] == 1


def test_the_tuned_network_is_the_one_that_is_returned_and_measured() -> None:
    network = small_network()
    network[0].weight.requires_grad_(False)
    before, state = snapshot(network), torch.get_rng_state()
    config, target = flagging(2, network, epochs=2)
    result = nc(network, DATA, config=config)
    assert same(before, snapshot(network))
    assert torch.equal(torch.get_rng_state(), state)
    for key in ("modes", "gradients", "hooks"):
        assert snapshot(result.model)[key] == before[key]
    assert not torch.equal(result.model.state_dict()["0.weight"], before["tensors"]["0.weight"])
    trigger = found_triggers(network)[target]
    others = DATA.images[DATA.labels != target]
    with torch.no_grad():
        for model, when in ((network, "before"), (result.model, "after")):
            success = (model(trigger.applied(others)).argmax(1) == target).float().mean()
            assert result.details[f"success_{when}"] == pytest.approx(float(success))
            accuracy = (model(DATA.images).argmax(1) == DATA.labels).float().mean()
            assert getattr(result, f"accuracy_{when}") == pytest.approx(float(accuracy))
    assert result.details["flagged"] == 2
    assert result.pruned == result.scores == []
    again = nc(network, DATA, config=config)
    assert same(snapshot(result.model), snapshot(again.model))


@pytest.mark.parametrize(("share", "carriers"), [(0.2, 5), (0.01, 1), (0.5, 12)])
def test_a_share_of_the_images_carries_a_trigger(
    share: float, carriers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = small_network()
    config, _ = flagging(1, network, epochs=1, augment="none", triggered=share)
    counts = []
    original = Workbench.logits

    def count(bench: Workbench, model: nn.Module, images: Any) -> Any:
        if model.training:
            known = (images[:, None] == DATA.images[None]).flatten(2).all(2).any(1)
            counts.append(int((~known).sum()))
        return original(bench, model, images)

    monkeypatch.setattr(Workbench, "logits", count)
    nc(network, DATA, config=config)
    assert counts == [carriers]


def test_a_network_that_is_called_clean_stays_as_it_is() -> None:
    network = small_network()
    config = NCUnlearningConfig(search=replace(SEARCH, anomaly=1e9))
    result = nc(network, DATA, config=config)
    assert result.model is not network
    found = result.model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in network.state_dict().items())
    assert result.accuracy_after == result.accuracy_before
    assert result.details["flagged"] == 0
    assert math.isnan(result.details["target_class"])


def test_a_loss_that_overflows() -> None:
    network = small_network()
    config, _ = flagging(1, network, lr=1e38, epochs=3)
    with pytest.raises(ArithmeticError, match=r"finite in unlearning, .* pass [23]\. Lower `lr`"):
        nc(network, DATA, config=config)


def test_weights_are_frozen_again_if_unlearning_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    network = small_network()
    network[0].weight.requires_grad_(False)
    config, _ = flagging(1, network, lr=1e38, epochs=3)
    benches: list[Workbench] = []

    def keep(*args: Any, **options: Any) -> Workbench:
        benches.append(Workbench(*args, **options))
        return benches[-1]

    module = import_module("lightning_mnp.baselines.nc_unlearning")
    monkeypatch.setattr(module, "Workbench", keep)
    with pytest.raises(ArithmeticError):
        nc(network, DATA, config=config)
    (bench,) = benches
    for (name, parameter), given in zip(
        bench.copy.named_parameters(), network.parameters(), strict=True
    ):
        assert parameter.requires_grad == given.requires_grad == (name != "0.weight")
        assert parameter.grad is None


def test_the_registry_calls_it_with_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("lightning_mnp.baselines.nc_unlearning")
    monkeypatch.setattr(module, "nc", lambda network, images, config: (network, images, config))
    network = small_network()
    expected = (network, DATA, NCUnlearningConfig(search=NCConfig(seed=3)))
    assert default_nc(network, DATA, 3) == expected


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("batch_size", 2, "a whole number of at least 3, so that no batch holds a single image"),
        ("augment", "mixup", "one of ('none', 'crop', 'crop-flip')"),
        ("triggered", 0.0, "a number above 0 to 1"),
        ("epochs", 0, "a whole number of at least 1"),
        ("lr", 0.0, "a number above 0"),
        ("momentum", 1.0, "a number from 0 to below 1"),
        ("weight_decay", -0.1, "a number of at least 0"),
    ],
)
def test_options_out_of_range(option: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=f"Expected argument `{option}`") as caught:
        NCUnlearningConfig(**{option: value})
    assert f"to be {expected}, but got {value!r}." in str(caught.value)

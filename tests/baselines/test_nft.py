from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from distributed_script import small_network
from helpers import images_and_labels, loader, same, snapshot, trained_network
from scipy.stats import kstest
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mnp.baselines import NFTConfig, nft
from lightning_mnp.baselines.nft import _draw_pairs, mask_floors
from lightning_mnp.defense_data.defense_set import DefenseSet
from lightning_mnp.surgery.layers import FilterLayer, FilterLayers

DATA = DefenseSet(*images_and_labels())
NETWORK = small_network()  # convolutions "0" of 8 and "4" of 12 filters, normalized by "1" and "5"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def quick(**changes: Any) -> NFTConfig:
    return NFTConfig(**{"epochs": 3, "augment": "none", "lr": 0.5, **changes})


def masks_of(model: nn.Module) -> Tensor:
    """What the scales of the second network are of those of the first, and the shifts as well."""
    scales, shifts = (
        torch.cat([model.get_parameter(f"{n}.{what}") / NETWORK.get_parameter(f"{n}.{what}")
                   for n in (1, 5)])
        for what in ("weight", "bias")
    )  # fmt: skip
    torch.testing.assert_close(scales, shifts)
    return scales.detach()


def logits_by_hand(masks: Tensor, images: Tensor) -> Tensor:
    net: Any = NETWORK
    x = net[1](net[0](images)) * masks[:8, None, None]
    x = net[5](net[4](net[3](x.relu()))) * masks[8:, None, None]
    logits: Tensor = net[8](x.relu().flatten(1))
    return logits


def masks_by_hand(config: NFTConfig) -> tuple[Tensor, float]:
    """The training of the masks written out, one batch in a pass."""
    floors = torch.tensor([config.alpha * math.exp(-config.beta)] * 8
                          + [config.alpha * math.exp(-2 * config.beta)] * 12)  # fmt: skip
    masks, speed, value = torch.ones(20), torch.zeros(20), math.nan
    for epoch in range(config.epochs):
        key = (config.seed, "nft", epoch)
        images, labels = DATA.batch(0, config.batch_size, CPU, "none", key)
        share, others = _draw_pairs(40, config.mixup, (config.seed, "nft", "mixup", epoch, 0))
        leaf = masks.clone().requires_grad_()
        loss = config.penalty * (1 - leaf).abs().sum()
        for image, label, other in zip(images, labels, others.tolist(), strict=True):
            mixed = share * image + (1 - share) * images[other]
            logs = F.log_softmax(logits_by_hand(leaf, mixed[None])[0], 0)
            loss = loss - (share * logs[label] + (1 - share) * logs[labels[other]]) / 40
        (gradient,) = torch.autograd.grad(loss, leaf)
        gradient = gradient - config.penalty * (masks == 1)  # |1 - m| grows with lower m
        speed = config.momentum * speed + gradient
        masks = torch.maximum((masks - config.lr * speed).clamp(max=1.0), floors)
        value = loss.item()
    return masks, value


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"penalty": 0.05, "momentum": 0.5, "mixup": 0.3},
        {"alpha": 0.95, "beta": 0.01, "lr": 5.0, "seed": 4},
    ],
    ids=["plain", "penalized", "near the floors"],
)
def test_the_masks_are_those_by_hand(options: dict[str, Any]) -> None:
    config = quick(**options)
    result = nft(NETWORK, DATA, config=config)
    expected, loss = masks_by_hand(config)
    assert expected.min() < 0.95
    assert len(expected.unique()) > 2
    found = masks_of(result.model)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert result.details["loss"] == pytest.approx(loss, rel=1e-3)
    assert result.details["mean_mask"] == pytest.approx(float(found.mean()), rel=1e-5)
    assert result.details["lowest_mask"] == pytest.approx(float(found.min()), rel=1e-5)


def test_only_scales_and_shifts_change() -> None:
    result = nft(NETWORK, DATA, config=quick())
    before, after = NETWORK.state_dict(), result.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"1.weight", "1.bias", "5.weight", "5.bias"}
    assert result.pruned == result.scores == []
    for model, rate in ((NETWORK, result.accuracy_before), (result.model, result.accuracy_after)):
        hits = (model(DATA.images).argmax(1) == DATA.labels).float().mean()
        assert rate == pytest.approx(float(hits))


def test_a_great_penalty_leaves_the_network_as_it_is() -> None:
    found = nft(NETWORK, DATA, config=quick(penalty=1e6)).model.state_dict()
    assert all(torch.equal(found[name], old) for name, old in NETWORK.state_dict().items())


def test_no_mask_falls_below_its_floor() -> None:
    masks = masks_of(nft(NETWORK, DATA, config=quick(lr=1e6, alpha=0.5, beta=1.0)).model)
    floors = torch.tensor([0.5 * math.exp(-1)] * 8 + [0.5 * math.exp(-2)] * 12)
    at_floor = (masks - floors).abs() < 1e-5
    assert bool(at_floor.any())
    assert bool((at_floor | (masks == 1)).all())


def test_floors_fall_from_layer_to_layer() -> None:
    layers = FilterLayers(tuple(FilterLayer(str(n), n, str(n), 1) for n in (1, 2, 3)))
    expected = [0.8 * math.exp(-0.3 * n) for n in (1, 2, 2, 3, 3, 3)]
    assert mask_floors(layers, 0.8, 0.3).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("mixup", [0.2, 1.0, 4.0])
def test_weights_of_mixup_follow_the_beta_distribution(mixup: float) -> None:
    drawn = [_draw_pairs(9, mixup, (0, "test", number)) for number in range(300)]
    assert kstest([share for share, _ in drawn], "beta", (mixup, mixup)).pvalue > 0.01
    assert all(sorted(others.tolist()) == list(range(9)) for _, others in drawn)
    assert len({tuple(others.tolist()) for _, others in drawn}) > 290


def test_without_normalization_filters_are_scaled() -> None:
    network: Any = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(64, 4)),
    )
    model: Any = nft(network, DATA, config=quick(lr=1e6)).model
    ratios = model[0].bias / network[0].bias
    torch.testing.assert_close(model[0].weight, network[0].weight * ratios[:, None, None, None])
    assert min(ratios) < 1
    assert torch.equal(model[5].weight, network[5].weight)


def test_layers_that_no_number_scales_take_no_part() -> None:
    network: Any = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Conv2d(4, 4, 3)),
        *(nn.Flatten(), nn.Linear(64, 4)),
    ).eval()
    model: Any = nft(network, DATA, config=quick(lr=1e6, alpha=0.5, beta=1.0)).model
    assert torch.equal(model[0].weight, network[0].weight)
    ratios = (model[3].bias / network[3].bias).tolist()
    # The floor is that of the second layer, although the first takes no part.
    assert min(ratios) == pytest.approx(0.5 * math.exp(-2))


def test_a_network_that_no_mask_can_scale_is_refused() -> None:
    network = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=False)), *(nn.Flatten(), nn.Linear(144, 4))
    )
    with pytest.raises(ValueError, match=r"which is what NFT trains, but none of 4 is\. Use"):
        nft(network, DATA)
    with pytest.raises(ValueError, match="at least one convolution"):
        nft(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), DATA)


@pytest.mark.parametrize("training", [False, True])
def test_the_model_and_the_random_state_stay(training: bool) -> None:
    network = trained_network(steps=2).train(training)
    before, state = snapshot(network), torch.get_rng_state()
    with torch.no_grad():
        result = nft(network, loader(shuffle=True), config=NFTConfig(epochs=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert same(before, snapshot(network))
    after = snapshot(result.model)
    assert all(after[key] == before[key] for key in ("modes", "gradients", "has_grad", "hooks"))


def test_the_seed_decides() -> None:
    first, second, other = (
        nft(NETWORK, loader(size), config=quick(seed=seed, batch_size=16, augment="crop-flip"))
        for size, seed in ((16, 0), (7, 0), (16, 1))
    )
    assert first == second
    assert same(snapshot(first.model), snapshot(second.model))
    assert first != other


def test_a_loss_that_overflows(monkeypatch: pytest.MonkeyPatch) -> None:
    data = DefenseSet(*images_and_labels())
    original = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda *given: original(*given) * float("inf"))
    with pytest.raises(ArithmeticError, match=r"in pass 1\. Lower `lr` or raise `alpha`"):
        nft(NETWORK, data, config=quick())


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("augment", "mixup", "one of ('none', 'crop', 'crop-flip')"),
        ("batch_size", 2, "a whole number of at least 3, so that no batch holds a single image"),
        ("epochs", 0, "a whole number of at least 1"),
        ("lr", 0.0, "a number above 0"),
        ("momentum", 1.0, "a number from 0 to below 1"),
        ("mixup", 0.0, "a number above 0"),
        ("penalty", -1.0, "a number of at least 0"),
        ("alpha", 1.5, "a number from 0 to 1"),
        ("beta", -0.1, "a number of at least 0"),
    ],
)
def test_options_out_of_range(option: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=f"Expected argument `{option}`") as caught:
        NFTConfig(**{option: value})
    assert f"to be {expected}, but got {value!r}." in str(caught.value)

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from helpers import images_and_labels, loader, same, snapshot, trained_network
from scipy.stats import kstest
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torchvision.ops import FrozenBatchNorm2d
from unusual_layers import Standardized

from lightning_mnp.baselines import NFTConfig, nft
from lightning_mnp.baselines.nft import _batches, _draw_pairs, mask_floors
from lightning_mnp.baselines.workbench import Workbench
from lightning_mnp.defense_data.defense_set import DefenseSet
from lightning_mnp.surgery.layers import FilterLayer, FilterLayers

DATA = DefenseSet(*images_and_labels())
CPU = torch.device("cpu")


def make_network() -> nn.Sequential:
    """Convolutions "0", "3" and "6", normalized by "1", "4" and "7"; the last two have masks."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        layers: list[nn.Module] = []
        for before, after in ((1, 6), (6, 8), (8, 10)):
            norm = nn.BatchNorm2d(after)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
            layers += [nn.Conv2d(before, after, 3), norm, nn.ReLU()]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(40, 4)).eval()


NETWORK = make_network()


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def quick(**changes: Any) -> NFTConfig:
    return NFTConfig(**{"steps": 3, "augment": "none", "lr": 0.5, **changes})


def masks_of(model: nn.Module) -> Tensor:
    """What the scales of the last two convolutions are of those of the network before."""
    parts = [
        model.get_parameter(name) / NETWORK.get_parameter(name) for name in ("4.weight", "7.weight")
    ]
    return torch.cat(parts).detach()


def logits_by_hand(masks: Tensor, images: Tensor) -> Tensor:
    """The network in training mode, with masks on the scales of the last two convolutions."""
    net: Any = NETWORK
    x = images
    for index, part in ((0, torch.ones(6)), (3, masks[:8]), (6, masks[8:])):
        x, norm = net[index](x), net[index + 1]
        mean, spread = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        x = (x - mean) / (spread + norm.eps).sqrt()
        x = (x * (norm.weight * part)[:, None, None] + norm.bias[:, None, None]).relu()
    logits: Tensor = net[10](x.flatten(1))
    return logits


def masks_by_hand(config: NFTConfig) -> tuple[Tensor, float]:
    """The training of the masks written out, one batch in a pass."""
    floors = torch.tensor([config.alpha * math.exp(-config.beta)] * 8
                          + [config.alpha * math.exp(-2 * config.beta)] * 10)  # fmt: skip
    masks, speed, value = torch.ones(18), torch.zeros(18), math.nan
    for step in range(config.steps):
        key = (config.seed, "nft", step)
        images, labels = DATA.batch(0, config.batch_size, CPU, "none", key)
        share, others = _draw_pairs(40, config.mixup, (config.seed, "nft", "mixup", step))
        leaf = masks.clone().requires_grad_()
        loss = config.penalty / (40 / 4) * (1 - leaf).abs().sum()
        logs = logits_by_hand(leaf, share * images + (1 - share) * images[others]).log_softmax(1)
        for row, label, other in zip(logs, labels, others.tolist(), strict=True):
            loss = loss - (share * row[label] + (1 - share) * row[labels[other]]) / 40
        (gradient,) = torch.autograd.grad(loss, leaf)
        speed = config.momentum * speed + gradient
        fallen = (1 + math.cos(math.pi * step / config.steps)) / 2
        rate = config.last_lr + (config.lr - config.last_lr) * fallen
        masks = torch.maximum((masks - rate * speed).clamp(max=1.0), floors)
        value = loss.item()
    return masks, value


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"penalty": 0.5, "momentum": 0.5, "mixup": 0.3, "last_lr": 0.0},
        {"alpha": 0.95, "beta": 0.02, "lr": 0.2, "seed": 4},
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


def test_only_scales_and_stored_statistics_change() -> None:
    result = nft(NETWORK, DATA, config=quick())
    before, after = NETWORK.state_dict(), result.model.state_dict()
    assert list(before) == list(after)
    assert [n for n, _ in NETWORK.named_parameters()] == [
        n for n, _ in result.model.named_parameters()
    ]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    stored = ("running_mean", "running_var", "num_batches_tracked")
    assert changed == {
        *("4.weight", "7.weight"),
        *(f"{norm}.{name}" for norm in (1, 4, 7) for name in stored),
    }
    assert int(after["1.num_batches_tracked"]) == 3
    assert result.pruned == result.scores == []
    for model, rate in ((NETWORK, result.accuracy_before), (result.model, result.accuracy_after)):
        hits = (model(DATA.images).argmax(1) == DATA.labels).float().mean()
        assert rate == pytest.approx(float(hits))


def test_a_great_penalty_turns_masks_back() -> None:
    # Of the last three batches, two pull masks back that the loss has turned down before.
    free = nft(NETWORK, DATA, config=quick(steps=6, penalty=0.0)).details["mean_mask"]
    assert nft(NETWORK, DATA, config=quick(steps=6, penalty=10.0)).details["mean_mask"] > free


def test_no_mask_falls_below_its_floor() -> None:
    options = quick(lr=1e6, last_lr=1e6, alpha=0.5, beta=1.0)
    masks = masks_of(nft(NETWORK, DATA, config=options).model)
    floors = torch.tensor([0.5 * math.exp(-1)] * 8 + [0.5 * math.exp(-2)] * 10)
    at_floor = (masks - floors).abs() < 1e-5
    assert bool(at_floor.any())
    assert bool((at_floor | (masks == 1)).all())


def test_passes_follow_one_another() -> None:
    bench = Workbench(NETWORK, DATA, batch_size=16)
    sizes = [len(labels) for _, labels in _batches(bench, 7)]
    assert sizes == [14, 13, 13, 14, 13, 13, 14]
    first, fourth = (images for images, _ in islice(_batches(bench, 7), 0, 4, 3))
    assert not torch.equal(first, fourth)


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


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_without_normalization_weights_are_scaled(kind: Any, groups: int) -> None:
    network: Any = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.ReLU(), kind(4, 20, 3, padding=1, groups=groups), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(720, 4)),
    )
    model: Any = nft(network, DATA, config=quick(steps=1, lr=1e6)).model
    for name in ("0.weight", "0.bias", "2.bias", "5.weight", "5.bias"):
        assert torch.equal(model.get_parameter(name), network.get_parameter(name))
    ratios = (model[2].weight / network[2].weight).detach()
    if kind is nn.Conv2d:
        ratios = ratios.flatten(1)
    else:
        ratios = ratios.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1)
    torch.testing.assert_close(ratios, ratios[:, :1].expand_as(ratios))
    assert float(ratios.min()) < 1
    assert len(ratios) == 20


def test_the_convolution_that_is_called_first_has_no_masks() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.Conv2d(4, 20, 3)
            self.first = nn.Conv2d(1, 4, 3)
            self.head = nn.Linear(320, 4)

        def forward(self, images: Tensor) -> Tensor:
            found: Tensor = self.head(self.second(self.first(images).relu()).flatten(1))
            return found

    network = Turned()
    model: Any = nft(network, DATA, config=quick(steps=1, lr=1e6)).model
    assert torch.equal(model.first.weight, network.first.weight)
    assert not torch.equal(model.second.weight, network.second.weight)


def test_gains_are_scaled_where_weights_are_standardized() -> None:
    network: Any = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.ReLU(), Standardized(4, 20, 3, gain=True), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(720, 4)),
    )
    model: Any = nft(network, DATA, config=quick(steps=1, lr=1e6)).model
    ratios = (model[2].factor / network[2].factor).detach()
    assert float(ratios.min()) < 1
    assert torch.equal(model[2].weight, network[2].weight)


def test_a_normalization_layer_under_torchs_pruning_takes_no_part() -> None:
    network = copy.deepcopy(NETWORK)
    prune.random_unstructured(network[4], "weight", 0.5)
    model = nft(network, DATA, config=quick(steps=1, lr=1e6)).model
    assert torch.equal(model.get_parameter("4.weight_orig"), network.get_parameter("4.weight_orig"))
    assert not torch.equal(model.get_parameter("7.weight"), network.get_parameter("7.weight"))


def test_the_penalty_goes_by_the_classes_that_occur() -> None:
    network: Any = copy.deepcopy(NETWORK)
    wide = nn.Linear(40, 90)
    network[10] = wide
    nn.init.zeros_(wide.weight)
    nn.init.constant_(wide.bias, -99.0)
    wide.weight.data[:4], wide.bias.data[:4] = NETWORK[10].weight.data, NETWORK[10].bias.data
    found, expected = (nft(n, DATA, config=quick(penalty=2.0)).details for n in (network, NETWORK))
    assert found["mean_mask"] == pytest.approx(expected["mean_mask"], rel=1e-4)


def test_a_single_convolution_has_masks() -> None:
    network: Any = nn.Sequential(nn.Conv2d(1, 20, 3), nn.Flatten(), nn.Linear(720, 4))
    model: Any = nft(network, DATA, config=quick(steps=1, lr=1e6, alpha=0.5, beta=1.0)).model
    lowest = (model[0].weight / network[0].weight).detach().min()
    assert float(lowest) == pytest.approx(0.5 * math.exp(-1))


def test_layers_that_no_number_scales_take_no_part() -> None:
    network: Any = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=False)),
        *(nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 4)),
    ).eval()
    model: Any = nft(network, DATA, config=quick(steps=1, lr=1e6, alpha=0.5, beta=1.0)).model
    assert torch.equal(model[2].weight, network[2].weight)
    ratios = (model[5].weight / network[5].weight).flatten().tolist()
    # The floor is that of the second layer with masks, although the first takes no part.
    assert min(ratios) == pytest.approx(0.5 * math.exp(-2))


def test_frozen_scales_are_masked_and_stay_frozen() -> None:
    network: Any = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), FrozenBatchNorm2d(4), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(144, 4)),
    )
    model: Any = nft(network, DATA, config=quick(steps=1, lr=1e6)).model
    assert "3.weight" in dict(model.named_buffers())
    assert type(model[3]) is FrozenBatchNorm2d
    assert float(model[3].weight.min()) < 1


def test_a_network_that_no_mask_can_scale_is_refused() -> None:
    network = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=False)), *(nn.Flatten(), nn.Linear(144, 4))
    )
    with pytest.raises(ValueError, match=r"none of those that .* 4 in all, is\. Use"):
        nft(network, DATA)
    with pytest.raises(ValueError, match="at least one convolution"):
        nft(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), DATA)


@pytest.mark.parametrize("training", [False, True])
def test_the_model_and_the_random_state_stay(training: bool) -> None:
    network = trained_network(steps=2).train(training)
    before, state = snapshot(network), torch.get_rng_state()
    with torch.no_grad():
        result = nft(network, loader(shuffle=True), config=NFTConfig(steps=2))
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
    with pytest.raises(ArithmeticError, match=r"in batch 1\. Lower `lr` and `last_lr`"):
        nft(NETWORK, data, config=quick())


def test_a_learning_rate_that_would_rise() -> None:
    with pytest.raises(ValueError, match=r"`last_lr` to be at most `lr`, 0\.01, but got 0\.02"):
        NFTConfig(lr=0.01)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("augment", "mixup", "one of ('none', 'crop', 'crop-flip')"),
        ("batch_size", 2, "a whole number of at least 3, so that no batch holds a single image"),
        ("steps", 0, "a whole number of at least 1"),
        ("lr", 0.0, "a number above 0"),
        ("last_lr", -0.1, "a number of at least 0"),
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

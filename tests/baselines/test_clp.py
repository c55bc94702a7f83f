from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from distributed_script import small_network
from helpers import images_and_labels, loader, same, snapshot
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d
from unusual_layers import Standardized

from lightning_mnp.baselines import CLPConfig, clp
from lightning_mnp.baselines.clp import channel_bounds
from lightning_mnp.defense_data.defense_set import DefenseSet
from lightning_mnp.surgery.layers import find_filter_layers

DATA = DefenseSet(*images_and_labels())
NETWORK = small_network()  # convolutions "0" of 8 and "4" of 12 filters


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def chain(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)).eval()


def randomize(norm: Any) -> Any:
    generator = torch.Generator().manual_seed(2)
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(norm, name)
        if tensor is not None:
            tensor.data.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    if norm.weight is not None:
        norm.weight.data[1] *= -1
    return norm


def greatest_singular_value(matrix: Tensor) -> float:
    """The root of the greatest eigenvalue of the matrix times its transpose."""
    return float(torch.linalg.eigvalsh(matrix @ matrix.T)[-1]) ** 0.5


def kernel_of(convolution: Any, index: int) -> Tensor:
    """The weights of one filter, a row for each input channel, read off unit images."""
    inputs, size = convolution.in_channels, convolution.kernel_size[0]
    rows = []
    for channel in range(inputs):
        image = torch.zeros(1, inputs, 2 * size - 1, 2 * size - 1)
        image[0, channel, size - 1, size - 1] = 1.0
        maps = convolution(image) - convolution(torch.zeros_like(image))
        rows.append(maps[0, index].flatten())
    matrix = torch.stack(rows).double().detach()
    return matrix[matrix.abs().sum(1) > 0]  # other groups' channels do not reach it


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(4, 12, 3),
        lambda: nn.Conv2d(4, 12, 3, groups=2, bias=False),
        lambda: nn.Conv2d(4, 12, 3, groups=4),
        lambda: nn.Conv2d(4, 12, 1),
        lambda: nn.ConvTranspose2d(4, 12, 3),
        lambda: nn.ConvTranspose2d(4, 12, 3, groups=2),
    ],
    ids=["plain", "grouped", "depthwise", "1x1", "transposed", "transposed grouped"],
)
@pytest.mark.parametrize(
    "norm",
    [
        nn.Identity(),
        randomize(nn.BatchNorm2d(12, eps=0.1)),
        randomize(nn.BatchNorm2d(12, affine=False)),
        randomize(FrozenBatchNorm2d(12)),
    ],
    ids=["none", "batch", "no scale", "frozen"],
)
def test_bounds_are_greatest_singular_values_times_the_factor_of_normalization(
    make: Callable[[], Any], norm: Any
) -> None:
    convolution = make()
    network = chain(nn.Conv2d(1, 4, 3), convolution, norm)
    layer = find_filter_layers(network, DATA.images[:2])[1]
    bounds = channel_bounds(network, layer)
    assert bounds.shape == (12,)
    for index in (0, 1, 7):
        expected = greatest_singular_value(kernel_of(convolution, index))
        if not isinstance(norm, nn.Identity):
            expected /= (float(norm.running_var[index]) + norm.eps) ** 0.5
            expected *= 1.0 if norm.weight is None else abs(norm.weight[index].item())
        assert float(bounds[index]) == pytest.approx(expected, rel=1e-4)


def test_bounds_of_a_convolution_in_one_dimension() -> None:
    network = nn.Sequential(nn.Conv1d(2, 3, 5), nn.Flatten(), nn.Linear(12, 2))
    layer = find_filter_layers(network, torch.rand(2, 2, 8))[0]
    weight = network[0].weight.detach().double()
    expected = [greatest_singular_value(weight[index]) for index in range(3)]
    assert channel_bounds(network, layer).tolist() == pytest.approx(expected, rel=1e-5)


def planted() -> nn.Module:
    """A network in which two filters of the second layer, and one of the first, stand out."""
    network = chain(
        nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 3, bias=False)
    )
    network[1].weight.data[5] = -30.0
    network[3].weight.data[9] *= 40.0
    return network


def scores_by_hand(network: nn.Module) -> dict[tuple[str, int], float]:
    scores = {}
    for layer in find_filter_layers(network, DATA.images[:2]):
        bounds = channel_bounds(network, layer).tolist()
        mean = sum(bounds) / len(bounds)
        variance = sum((bound - mean) ** 2 for bound in bounds) / (len(bounds) - 1)
        for index, bound in enumerate(bounds):
            scores[layer.name, index] = (bound - mean) / variance**0.5
    return scores


@pytest.mark.parametrize("u", [3.0, 1.0, 0.2])
def test_filters_above_the_mean_by_u_standard_deviations_go(u: float) -> None:
    network = planted()
    scores = scores_by_hand(network)
    expected = sorted((place for place in scores if scores[place] > u), key=lambda p: -scores[p])
    assert {("0", 5), ("3", 9)} <= set(expected)
    result = clp(network, DATA, config=CLPConfig(u=u))
    assert result.pruned == expected
    assert result.scores == pytest.approx([scores[place] for place in expected])


def test_only_pruned_filters_change_and_their_maps_are_zero() -> None:
    network: Any = planted()
    result = clp(network, DATA)
    assert sorted(result.pruned) == [("0", 5), ("3", 9)]
    expected = copy.deepcopy(network)
    for tensor in (expected[0].weight, expected[0].bias, expected[1].weight, expected[1].bias):
        tensor.data[5] = 0.0
    expected[1].running_mean[5] = 0.0
    expected[3].weight.data[9] = 0.0
    found = result.model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.state_dict().items())
    for model, rate in ((network, result.accuracy_before), (expected, result.accuracy_after)):
        hits = (model(DATA.images).argmax(1) == DATA.labels).float().mean()
        assert rate == pytest.approx(float(hits))


@pytest.mark.parametrize(("rule", "amount", "count"), [("number", 4, 4), ("share", 0.25, 5)])
def test_a_number_or_share_of_the_highest_scores(rule: Any, amount: float, count: int) -> None:
    scores = scores_by_hand(NETWORK)
    result = clp(NETWORK, DATA, config=CLPConfig(rule=rule, amount=amount))
    assert result.pruned == sorted(scores, key=lambda place: -scores[place])[:count]


def test_too_many() -> None:
    with pytest.raises(ValueError, match=r"leave one of the 20 filters .*which are 20 filters"):
        clp(NETWORK, DATA, config=CLPConfig(rule="number", amount=20))


def test_ten_filters_or_fewer_are_never_pruned_by_the_default() -> None:
    network = chain(nn.Conv2d(1, 10, 3), nn.ReLU(), nn.Conv2d(10, 12, 3))
    network[0].weight.data[3] *= 1e4
    assert ("0", 3) not in clp(network, DATA).pruned
    assert ("0", 3) in clp(network, DATA, config=CLPConfig(u=2.8)).pruned


def test_filters_that_are_all_alike_have_no_score() -> None:
    network = chain(nn.Conv2d(1, 12, 3, bias=False))
    network[0].weight.data[:] = network[0].weight.data[:1]
    assert clp(network, DATA, config=CLPConfig(u=1e-6)).pruned == []


def test_layers_without_stored_statistics_or_plain_weights_take_no_part() -> None:
    network = chain(
        nn.Conv2d(1, 12, 3),
        nn.GroupNorm(3, 12),
        Standardized(12, 12, 3),
        nn.Conv2d(12, 12, 1),
        nn.BatchNorm2d(12, track_running_stats=False),
        nn.Conv2d(12, 12, 1),
    )
    result = clp(network, DATA, config=CLPConfig(rule="number", amount=11))
    assert {name for name, _ in result.pruned} == {"5"}


def test_a_network_with_no_such_layer_is_refused() -> None:
    network = chain(nn.Conv2d(1, 12, 3), nn.GroupNorm(3, 12))
    with pytest.raises(ValueError, match=r"with stored statistics.*but none of 1 is\. Use"):
        clp(network, DATA)
    with pytest.raises(ValueError, match="at least one convolution"):
        clp(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), DATA)


def test_a_bound_that_is_not_finite() -> None:
    network: Any = planted()
    layer = find_filter_layers(network, DATA.images[:2])[0]
    network[1].running_var[4] = -1.0
    with pytest.raises(ArithmeticError, match=r"'0' to be finite.*variance of '1' is zero or neg"):
        channel_bounds(network, layer)


@pytest.mark.parametrize("training", [False, True])
def test_the_model_and_the_random_state_stay_and_nothing_is_drawn(training: bool) -> None:
    network = copy.deepcopy(NETWORK).train(training)
    before, state = snapshot(network), torch.get_rng_state()
    config = CLPConfig(u=1.0)
    first, second = (clp(network, loader(size), config=config) for size in (16, 7))
    assert torch.equal(torch.get_rng_state(), state)
    assert same(before, snapshot(network))
    assert first.pruned
    assert first == second
    assert same(snapshot(first.model), snapshot(second.model))
    assert snapshot(first.model)["modes"] == before["modes"]


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("rule", "asr", "one of ('own', 'number', 'share')"),
        ("u", 0.0, "a number above 0"),
        ("batch_size", 2, "a whole number of at least 3"),
        ("amount", float("inf"), "a number"),
    ],
)
def test_options_out_of_range(option: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=f"Expected argument `{option}`") as caught:
        CLPConfig(**{option: value})
    assert f"to be {expected}, but got {value!r}." in str(caught.value)


def test_an_amount_that_does_not_fit_the_rule() -> None:
    with pytest.raises(ValueError, match="`amount` to be a share from 0 to below 1"):
        CLPConfig(rule="share", amount=1.0)

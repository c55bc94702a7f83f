from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from distributed_script import small_network
from helpers import images_and_labels, loader, same, snapshot
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mnp import DefenseSet
from lightning_mnp.baselines import NADConfig, nad
from lightning_mnp.baselines.nad import attention, distance
from lightning_mnp.baselines.stages import Stage

IMAGES, LABELS = images_and_labels(40)
DATA = DefenseSet(IMAGES, LABELS)


def quick(**changes: Any) -> NADConfig:
    quick = {"augment": "none", "teacher_epochs": 1, "epochs": 1, "lr": 0.05}
    return NADConfig(**{**quick, **changes})


def attention_by_hand(maps: Tensor) -> list[list[float]]:
    """Sum the squares of the channels place by place, and divide by the length."""
    rows = []
    for image in maps.flatten(2):
        places = [sum(float(v) ** 2 for v in image[:, place]) for place in range(image.shape[1])]
        length = sum(place**2 for place in places) ** 0.5
        rows.append([place / length for place in places])
    return rows


def test_the_attention_is_the_scaled_sum_of_squares() -> None:
    maps = torch.randn(3, 4, 2, 5)
    torch.testing.assert_close(attention(maps), torch.tensor(attention_by_hand(maps)))
    torch.testing.assert_close(attention(-7.0 * maps), attention(maps))
    assert not attention(torch.zeros(2, 3, 4)).any()


def test_the_distance_sums_the_mean_squares_of_the_stages() -> None:
    stages = [Stage("a", (2, 5)), Stage("b", (3,))]
    first = {stages[0]: torch.randn(3, 4, 2, 5), stages[1]: torch.randn(3, 2, 3)}
    second = {stage: torch.randn_like(maps) for stage, maps in first.items()}
    expected = 0.0
    for stage, weight in zip(stages, (2.0, 3.0), strict=True):
        pairs = zip(
            torch.tensor(attention_by_hand(first[stage])).flatten().tolist(),
            torch.tensor(attention_by_hand(second[stage])).flatten().tolist(),
            strict=True,
        )
        squares = [(a - b) ** 2 for a, b in pairs]
        expected += weight * sum(squares) / len(squares)
    found = distance(first, second, dict(zip(stages, (2.0, 3.0), strict=True)))
    assert float(found) == pytest.approx(expected, rel=1e-5)


def make_network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layers = nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3, stride=2), nn.Tanh()
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 4)).eval()


def test_training_by_hand() -> None:
    network: Any = make_network()
    config = quick(lr=0.2, weight_decay=0.1, middle_weight=30.0, last_weight=50.0)

    def stepped(loss_of: Any, network: Any) -> Any:
        """Return a copy after one step of SGD."""
        tuned = copy.deepcopy(network)
        gradients = torch.autograd.grad(loss_of(tuned), list(tuned.parameters()))
        with torch.no_grad():
            for weight, gradient in zip(tuned.parameters(), gradients, strict=True):
                weight -= 0.2 * (gradient + 0.1 * weight)
        return tuned

    def plain(network: Any) -> Tensor:
        return F.cross_entropy(network(IMAGES), LABELS)

    teacher = stepped(plain, network)

    def drawn(network: Any) -> Tensor:
        loss = plain(network)
        for end, weight in ((2, 30.0), (4, 50.0)):  # two stages: the last two weights
            taught, found = (
                F.normalize((each[:end](IMAGES) ** 2).sum(1).flatten(1))
                for each in (teacher, network)
            )
            loss = loss + weight * ((found - taught.detach()) ** 2).mean()
        return loss

    expected = stepped(drawn, network)
    result = nad(network, DATA, config=config)
    for found, wanted in zip(result.model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert result.details["stages"] == 2
    apart = float(drawn(network).detach() - plain(network).detach())
    assert result.details["distillation"] == pytest.approx(apart, rel=1e-3)
    hits = (teacher(IMAGES).argmax(1) == LABELS).float().mean()
    assert result.details["teacher_accuracy"] == pytest.approx(float(hits))
    hits = (result.model(IMAGES).argmax(1) == LABELS).float().mean()
    assert result.accuracy_after == pytest.approx(float(hits))
    assert result.pruned == result.scores == []


def test_the_learning_rate_stays() -> None:
    options = {"momentum": 0.0, "weight_decay": 0.0, "middle_weight": 0.0, "last_weight": 0.0}
    network = make_network()
    for weight in network.parameters():
        weight.data.zero_()  # only the last bias learns, from a gradient that hardly changes
    data = DefenseSet(IMAGES, torch.arange(40) % 2)

    def moved(epochs: int) -> float:
        result = nad(network, data, config=quick(epochs=epochs, lr=0.001, **options))
        return float(result.model.get_parameter("5.bias").detach()[0])

    for epochs in (2, 3, 4):
        assert moved(epochs) == pytest.approx(epochs * moved(1), rel=1e-2)


@pytest.mark.parametrize("training", [False, True])
def test_the_model_and_the_random_state_stay(training: bool) -> None:
    network = nn.Sequential(small_network(), nn.Dropout(0.3)).train(training)
    network.get_parameter("0.0.weight").requires_grad_(False)
    before, state = snapshot(network), torch.get_rng_state()
    result = nad(network, loader(shuffle=True), config=quick(batch_size=16, augment="crop-flip"))
    assert same(before, snapshot(network))
    assert torch.equal(torch.get_rng_state(), state)
    after = snapshot(result.model)
    assert all(after[key] == before[key] for key in ("modes", "gradients", "hooks"))
    assert all(parameter.grad is None for parameter in result.model.parameters())
    assert not torch.equal(after["tensors"]["0.0.weight"], before["tensors"]["0.0.weight"])


def test_the_seed_decides() -> None:
    network = small_network()
    first, second, other = (
        nad(network, loader(size), config=quick(seed=seed, batch_size=16))
        for size, seed in ((16, 0), (7, 0), (16, 1))
    )
    assert same(snapshot(first.model), snapshot(second.model))
    assert not same(snapshot(first.model), snapshot(other.model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_epochs": 2, "lr": 1e30}, r"a loss of (nan|inf) in pass 2\. Lower `lr`, or the"),
        ({"last_weight": 1e39}, r"a loss of (nan|inf) in pass 1\. Lower `lr`, or"),
    ],
)
def test_what_overflows(options: dict[str, Any], message: str) -> None:
    network = small_network()
    before = snapshot(network)
    with pytest.raises(ArithmeticError, match=message):
        nad(network, DATA, config=quick(**options))
    assert same(before, snapshot(network))


def test_what_does_not_fit_is_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match="labels to be below 4"):
        nad(small_network(), DefenseSet(IMAGES, LABELS + 1))
    with pytest.raises(ValueError, match="maps of more than one value"):
        nad(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), DATA)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("augment", "mixup", "one of ('none', 'crop', 'crop-flip')"),
        ("batch_size", 2, "a whole number of at least 3, so that no batch holds a single image"),
        ("teacher_epochs", 0, "a whole number of at least 1"),
        ("epochs", 0, "a whole number of at least 1"),
        ("lr", 0.0, "a number above 0"),
        ("momentum", 1.0, "a number from 0 to below 1"),
        ("weight_decay", -0.1, "a number of at least 0"),
        ("first_weight", -1.0, "a number of at least 0"),
        ("middle_weight", -1.0, "a number of at least 0"),
        ("last_weight", -1.0, "a number of at least 0"),
    ],
)
def test_options_out_of_range(option: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=f"Expected argument `{option}`") as caught:
        NADConfig(**{option: value})
    assert f"to be {expected}, but got {value!r}." in str(caught.value)

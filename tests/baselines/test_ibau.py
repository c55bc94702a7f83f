from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from distributed_script import small_network
from helpers import images_and_labels, loader, same, snapshot
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.nn import functional as F

from lightning_mnp import DefenseSet
from lightning_mnp.baselines import IBAUConfig, ibau
from lightning_mnp.baselines.ibau import _draw_carriers, _ranges, hypergradient

IMAGES, LABELS = images_and_labels(40)
DATA = DefenseSet(IMAGES, LABELS)


def quick(**changes: Any) -> IBAUConfig:
    return IBAUConfig(**{"rounds": 2, **changes})


@pytest.mark.parametrize("terms", [1, 2, 5])
def test_the_hypergradient_against_dense_matrices(terms: int) -> None:
    # (1/2) d' A d - d' B w is lowest for d; the loss depends on both.
    root, mixed = torch.randn(4, 4, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    square = root @ root.T / 10
    target = torch.randn(4, dtype=torch.float64)
    d = torch.randn(4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, dtype=torch.float64, requires_grad=True)
    unused = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def step(d: Tensor) -> Tensor:
        return d - 0.3 * (square @ d - mixed @ w)

    loss = (d - target).square().sum() + w.square().sum()
    found = hypergradient(loss, step, d, [w, unused], terms)
    by_step, by_weights = torch.eye(4, dtype=torch.float64) - 0.3 * square, 0.3 * mixed
    summed = sum(torch.linalg.matrix_power(by_step.T, k) for k in range(terms))
    expected = 2 * w + by_weights.T @ summed @ (2 * (d - target))
    torch.testing.assert_close(found[0], expected)
    assert not found[1].any()


def test_many_terms_give_the_gradient_of_the_loss_at_the_solution() -> None:
    root, mixed = torch.randn(4, 4, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    square = root @ root.T / 10 + torch.eye(4, dtype=torch.float64)
    w = torch.randn(3, dtype=torch.float64)

    def solved_loss(w: Tensor) -> Tensor:
        return torch.linalg.solve(square, mixed @ w).sin().sum()

    leaf = w.clone().requires_grad_()
    d = torch.linalg.solve(square, mixed @ w).requires_grad_()
    found = hypergradient(
        d.sin().sum(), lambda d: d - 0.3 * (square @ d - mixed @ leaf), d, [leaf], 300
    )
    torch.testing.assert_close(found[0], jacobian(solved_loss, w))


def logits_of(images: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """The network of the next test, in evaluation mode."""
    x = F.conv2d(images, weights["0.weight"], weights["0.bias"], stride=4)
    x = x * (weights["1.weight"] / 1.00001**0.5).view(1, -1, 1, 1)
    x = (x + weights["1.bias"].view(1, -1, 1, 1)).tanh().flatten(1)
    return x @ weights["4.weight"].T + weights["4.bias"]


@pytest.mark.parametrize(("share", "scale"), [(1.0, 0.25), (0.3, 0.25), (0.3, 0.5)])
def test_a_round_by_hand(share: float, scale: float) -> None:
    torch.manual_seed(3)
    given = DefenseSet(IMAGES * scale - 0.5, LABELS)  # as normalized images
    unit = float(IMAGES.max() - IMAGES.min()) * scale
    network = nn.Sequential(
        *(nn.Conv2d(1, 2, 4, stride=4), nn.BatchNorm2d(2), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(8, 4)),
    ).eval()
    config = quick(
        **{"rounds": 1, "lr": 0.01, "share": share, "response_lr": 0.5},
        **{"trigger_lr": 9.0, "trigger_epochs": 3, "trigger_norm": 1.0},
    )
    images, labels = given.batch(0, 100, torch.device("cpu"), "none", (0, "i-bau unlearning", 0))
    carriers = _draw_carriers(40, config, 0, 0)
    assert carriers.sum() == share * 40

    def marked(trigger: Tensor) -> Tensor:
        return images + carriers.view(-1, 1, 1, 1) * unit * trigger.view(1, 1, 8, 8)

    names, tensors = zip(*network.named_parameters(), strict=True)
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])

    def unflat(flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split([tensor.numel() for tensor in tensors])
        return {n: p.view_as(t) for n, p, t in zip(names, parts, tensors, strict=True)}

    def inner(trigger: Tensor, flat: Tensor) -> Tensor:
        logits = logits_of(given.images + unit * trigger.view(1, 1, 8, 8), unflat(flat))
        return 0.001 * trigger.square().sum() - F.cross_entropy(logits, given.labels)

    trigger = torch.zeros(64)
    for _ in range(3):
        trigger = trigger - 9.0 * jacobian(lambda each: inner(each, flat), trigger)
    assert trigger.norm() > 1.0
    trigger = trigger / trigger.norm()
    (by_trigger, by_both), _ = hessian(inner, (trigger, flat))
    outer, direct = jacobian(
        lambda d, w: F.cross_entropy(logits_of(marked(d), unflat(w)), labels),
        (trigger, flat),
    )
    moved = torch.eye(64) - 0.5 * by_trigger
    vector = torch.zeros(64)
    for _ in range(5):
        vector = moved.T @ vector + outer
    gradient = direct - 0.5 * by_both.T @ vector
    expected = flat - 0.01 * gradient / (gradient.abs() + 1e-8)  # the first step of Adam
    result = ibau(network, given, config=config)
    found = torch.cat([p.detach().flatten() for p in result.model.parameters()])
    clear = gradient.abs() > 1e-4 * gradient.abs().max()  # rounding may turn a sign elsewhere
    assert clear.float().mean() > 0.9
    torch.testing.assert_close(found[clear], expected[clear], rtol=1e-4, atol=1e-4)
    assert result.details["trigger_norm"] == pytest.approx(1.0, rel=1e-4)
    loss = F.cross_entropy(logits_of(marked(trigger), unflat(flat)), labels)
    assert result.details["loss"] == pytest.approx(float(loss), rel=1e-3)


def test_carriers_are_drawn_for_each_batch() -> None:
    config = IBAUConfig()
    drawn = [_draw_carriers(100, config, *place) for place in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert [int(each.sum()) for each in drawn] == [1] * 4
    assert len({int(each.argmax()) for each in drawn[:3]}) == 3
    assert torch.equal(drawn[0], drawn[3])
    assert int(_draw_carriers(99, config, 0, 0).sum()) == 1
    assert int(_draw_carriers(250, config, 0, 0).sum()) == 2
    assert int(_draw_carriers(100, IBAUConfig(share=0.29), 0, 0).sum()) == 29


def test_each_batch_of_each_round_has_its_own_carriers(monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[tuple[int, int, int]] = []

    def draw(images: int, config: IBAUConfig, number: int, index: int) -> Tensor:
        places.append((images, number, index))
        return _draw_carriers(images, config, number, index)

    module = sys.modules["lightning_mnp.baselines.ibau"]  # the package has a function of this name
    monkeypatch.setattr(module, "_draw_carriers", draw)
    ibau(small_network(), DATA, config=quick(batch_size=20))
    assert places == [(20, 0, 0), (20, 0, 1), (20, 1, 0), (20, 1, 1)]


def test_several_passes_of_a_round_follow_each_other() -> None:
    steps = [ibau(small_network(), DATA, config=quick(rounds=1, epochs=n)) for n in (1, 2)]
    assert not same(snapshot(steps[0].model), snapshot(steps[1].model))
    orders = [
        DATA.batch(0, 20, torch.device("cpu"), "none", (0, "i-bau unlearning", n))[0]
        for n in (0, 1)
    ]
    assert not torch.equal(*orders)


def test_the_range_of_each_channel() -> None:
    images = torch.stack([torch.rand(5, 4, 4), 3 * torch.rand(5, 4, 4) - 1], dim=1)
    images[0, :, 0, :2] = torch.tensor([[0.0, 1.0], [-1.0, 2.0]])
    assert _ranges(images).equal(torch.tensor([1.0, 3.0]).view(1, 2, 1, 1))


def test_a_short_trigger_keeps_its_length() -> None:
    short = ibau(small_network(), DATA, config=quick(trigger_lr=0.01)).details["trigger_norm"]
    assert 0 < short < 1


def test_a_network_that_no_trigger_changes() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(64, 4)

        def forward(self, images: Tensor) -> Tensor:
            found: Tensor = self.head(0.0 * images.flatten(1))
            return found

    assert ibau(Constant(), DATA, config=quick()).details["trigger_norm"] == 0.0


@pytest.mark.parametrize("training", [False, True])
def test_the_model_and_the_random_state_stay(training: bool) -> None:
    network = nn.Sequential(small_network(), nn.Dropout(0.3)).train(training)
    network.get_parameter("0.0.weight").requires_grad_(False)
    before, state = snapshot(network), torch.get_rng_state()
    result = ibau(network, loader(shuffle=True), config=quick(batch_size=16, augment="crop-flip"))
    assert same(before, snapshot(network))
    assert torch.equal(torch.get_rng_state(), state)
    after = snapshot(result.model)
    assert all(after[key] == before[key] for key in ("modes", "gradients", "hooks"))
    assert all(parameter.grad is None for parameter in result.model.parameters())
    tensors = before["tensors"]
    for name, tensor in after["tensors"].items():  # evaluation mode: no stored statistics change
        stored = "running" in name or "tracked" in name
        assert torch.equal(tensor, tensors[name]) == stored, name
    assert result.pruned == result.scores == []


def test_the_seed_decides() -> None:
    network = small_network()
    first, second, other = (
        ibau(network, loader(size), config=quick(seed=seed, batch_size=20, rounds=1, terms=1))
        for size, seed in ((16, 0), (7, 0), (16, 1))
    )
    assert same(snapshot(first.model), snapshot(second.model))
    assert not same(snapshot(first.model), snapshot(other.model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trigger_lr": 1e38}, r"Expected the trigger in round 1 of I-BAU.*Lower `trigger_lr`"),
        ({"response_lr": 1e38}, r"Expected every gradient in round 1 of I-BAU to be finite"),
        ({"lr": 1e30}, r"every output on the defense set.*Lower the learning rates"),
    ],
)
def test_what_overflows(options: dict[str, Any], message: str) -> None:
    network = small_network()
    before = snapshot(network)
    with pytest.raises(ArithmeticError, match=message):
        ibau(network, DATA, config=quick(rounds=1, penalty=10.0, trigger_epochs=3, **options))
    assert same(before, snapshot(network))


def test_what_does_not_fit_is_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match="labels to be below 4"):
        ibau(small_network(), DefenseSet(IMAGES, LABELS + 1))


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("augment", "mixup", "one of ('none', 'crop', 'crop-flip')"),
        ("batch_size", 0, "a whole number of at least 1"),
        ("rounds", 0, "a whole number of at least 1"),
        ("epochs", 0, "a whole number of at least 1"),
        ("lr", 0.0, "a number above 0"),
        ("share", 0.0, "a number above 0 to 1"),
        ("share", 1.5, "a number above 0 to 1"),
        ("terms", 0, "a whole number of at least 1"),
        ("trigger_lr", 0.0, "a number above 0"),
        ("trigger_epochs", 0, "a whole number of at least 1"),
        ("trigger_norm", 0.0, "a number above 0"),
        ("penalty", -1.0, "a number of at least 0"),
        ("response_lr", 0.0, "a number above 0"),
    ],
)
def test_options_out_of_range(option: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=f"Expected argument `{option}`") as caught:
        IBAUConfig(**{option: value})
    assert f"to be {expected}, but got {value!r}." in str(caught.value)

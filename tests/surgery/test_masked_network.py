from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d
from unusual_layers import NormThen

from lightning_mnp.surgery.layers import find_filter_layers
from lightning_mnp.surgery.masked_network import MaskedNetwork
from lightning_mnp.surgery.masks import FilterMasks


class Net(nn.Module):
    """Dropout, all kinds of statistics, and a buffer that every call counts up."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, bias=False),
            nn.BatchNorm2d(4, momentum=None),
            nn.Dropout(0.5),
            nn.Conv2d(4, 4, 1),
            nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
            FrozenBatchNorm2d(4),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 3),
        )
        self.register_buffer("calls", torch.zeros(1))
        with torch.no_grad():
            for name, buffer in self.named_buffers():
                if buffer.is_floating_point() and name != "calls":
                    buffer.uniform_(0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        logits: Tensor = self.layers(x)
        return logits


@pytest.fixture
def network() -> Net:
    network = Net().train()
    network.layers[4].eval()
    network.layers[0].requires_grad_(False)
    return network


IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def make(network: nn.Module, **options: Any) -> MaskedNetwork:
    return MaskedNetwork(network, find_filter_layers(copy.deepcopy(network), IMAGES), **options)


def reference(network: nn.Module, statistics: str) -> Tensor:
    """Set the modes by hand on a copy, and run it."""
    network = copy.deepcopy(network).eval()
    if statistics == "batch":
        for module in network.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.InstanceNorm2d)):
                module.train()
    logits: Tensor = network(IMAGES)
    return logits


def traces(network: nn.Module) -> tuple[Any, ...]:
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    return (
        buffer.getvalue(),
        [(module.training, len(module._forward_hooks)) for module in network.modules()],
        [(name, id(p), p.requires_grad, p.grad) for name, p in network.named_parameters()],
        [(name, id(b)) for name, b in network.named_buffers()],
        torch.get_rng_state().tolist(),
    )


@pytest.mark.parametrize("override", [False, True])
@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_statistics(network: Net, statistics: Any, override: bool) -> None:
    expected = reference(network, statistics)
    if override:
        other = "batch" if statistics == "running" else "running"
        logits = make(network, statistics=other)(IMAGES, statistics=statistics)
    else:
        logits = make(network, statistics=statistics)(IMAGES)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    assert not torch.equal(reference(network, "batch"), reference(network, "running"))


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_the_network_stays_bit_for_bit_what_it_was(network: Net, statistics: Any) -> None:
    masked = make(network, statistics=statistics)
    before = traces(network)
    weights = {name: w.clone().requires_grad_() for name, w in masked.weights().items()}
    masks = torch.ones(masked.layers.total, requires_grad=True)
    for _ in range(3):
        masked(IMAGES, weights=weights, masks=masks).sum().backward()
    assert traces(network) == before
    assert masks.grad is not None
    assert all(weight.grad is not None for weight in weights.values())


def test_the_network_stays_when_it_fails(network: Net) -> None:
    masked = make(network)
    before = traces(network)
    masks = torch.ones(masked.layers.total)
    with pytest.raises(RuntimeError, match="channels"):
        masked(IMAGES[:, :2], weights=masked.weights(), masks=masks)
    assert traces(network) == before


def test_repeated_calls_agree(network: Net) -> None:
    masked = make(network)
    first = masked(IMAGES)
    assert torch.equal(first, masked(IMAGES))  # no dropout, no statistics carried over


def test_weights_are_swapped(network: Net) -> None:
    masked = make(network)
    weights = {name: 2 * weight + 0.1 for name, weight in masked.weights().items()}
    other = copy.deepcopy(network)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(weights[name])
    torch.testing.assert_close(masked(IMAGES, weights=weights), reference(other, "batch"))
    assert torch.equal(masked(IMAGES), reference(network, "batch"))


def test_masks_and_weights_together(network: Net) -> None:
    masked = make(network)
    weights = {name: 2 * weight + 0.1 for name, weight in masked.weights().items()}
    masks = torch.rand(masked.layers.total)
    other = copy.deepcopy(network)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(weights[name])
    attached = FilterMasks(other, masked.layers, masks)
    with attached:
        for module in other.eval().modules():
            module.training = isinstance(module, (nn.BatchNorm2d, nn.InstanceNorm2d))
        expected = other(IMAGES)
    torch.testing.assert_close(masked(IMAGES, weights=weights, masks=masks), expected)


def test_own_weights_share_memory_and_carry_no_gradient(network: Net) -> None:
    masked = make(network)
    weights = masked.weights()
    assert list(weights) == [name for name, _ in network.named_parameters()]
    for name, parameter in network.named_parameters():
        assert weights[name].data_ptr() == parameter.data_ptr()
        assert not weights[name].requires_grad
    filters = masked.filter_weights(weights)
    names = ["layers.0.weight", "layers.3.weight", "layers.6.weight"]
    assert [f.data_ptr() for f in filters] == [weights[name].data_ptr() for name in names]
    assert masked.device == torch.device("cpu")


def test_forward_and_autocast(network: Net) -> None:
    seen: list[torch.dtype] = []

    def forward(module: nn.Module, images: Tensor) -> Any:
        logits = module(2 * images)
        seen.append(logits.dtype)
        return {"logits": logits}

    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16)

    layers = find_filter_layers(copy.deepcopy(network), IMAGES)
    exact = MaskedNetwork(network, layers, forward)(IMAGES)
    low = MaskedNetwork(network, layers, forward, autocast=autocast)(IMAGES)
    assert seen == [torch.float32, torch.bfloat16]
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, exact, rtol=0.1, atol=0.1)
    torch.testing.assert_close(exact, make(network)(2 * IMAGES))


def test_tied_parameters_are_swapped_together() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(144, 2)
    )
    network[2].weight = network[1].weight
    masked = make(network)
    weights = {name: weight + 1 for name, weight in masked.weights().items()}
    other = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    assert "2.weight" not in weights
    torch.testing.assert_close(masked(IMAGES, weights=weights), other(IMAGES))


def test_held_statistics_give_what_those_of_the_batch_give() -> None:
    network = Net()
    network.layers[5].p = 0.0
    masked = make(network)
    held, of_batch = (masked(IMAGES, statistics=kind) for kind in ("held", "batch"))
    torch.testing.assert_close(held, of_batch)
    assert not torch.allclose(held, masked(IMAGES, statistics="running"), atol=1e-2)


def test_without_autocast_the_rest_of_the_context_stays(network: Net) -> None:
    entered: list[str] = []

    @contextmanager
    def context() -> Iterator[None]:
        entered.append("in")
        with torch.autocast("cpu", torch.bfloat16):
            yield

    masked = make(network, autocast=context)
    plain = masked.without_autocast()
    assert (masked.precision, plain.precision) == ("torch.bfloat16", "torch.float32")
    assert entered == ["in", "in"]
    expected = make(network)(IMAGES, statistics="running")
    assert torch.equal(plain(IMAGES, statistics="running"), expected)


def test_wrong_statistics(network: Net) -> None:
    with pytest.raises(ValueError, match="`statistics` to be 'batch' or 'running', but got 'x'"):
        make(network, statistics="x")


@pytest.mark.parametrize("statistics", ["batch", "running"])
@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(4),
        nn.BatchNorm2d(4, affine=False),
        nn.GroupNorm(2, 4),
        nn.RMSNorm([6, 6]),
        FrozenBatchNorm2d(4),
        NormThen(nn.SiLU()),
        nn.Identity(),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_masks_in_scale_and_shift_equal_masks_on_maps(norm: nn.Module, statistics: Any) -> None:
    """The gradient with respect to the masks included."""
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    ).double()
    images = torch.rand(5, 3, 8, 8, dtype=torch.float64)
    layers = find_filter_layers(network, images[:2])
    masked = MaskedNetwork(network, layers, statistics=statistics)
    results = []
    for folded in (True, False):
        masks = torch.tensor([0.0, 0.3, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
        if folded:
            logits = masked(images, masks=masks)
        else:
            with FilterMasks(network, layers, masks):
                logits = masked(images)
        results.append((logits, *torch.autograd.grad(logits.square().sum(), masks)))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_other_weights_are_those_of_a_network_of_its_own(network: Net) -> None:
    masked = make(network)
    doubled = {name: 2 * weight for name, weight in masked.weights().items()}
    other = masked.with_weights(doubled)
    torch.testing.assert_close(other(IMAGES), masked(IMAGES, weights=doubled))
    assert all(weight.equal(doubled[name]) for name, weight in other.weights().items())
    name = "layers.0.weight"
    assert not masked.weights()[name].equal(doubled[name])
    assert other.seen is masked.seen


def test_raised_logits_are_those_of_a_network_of_its_own(network: Net) -> None:
    masked = make(network)
    raised = masked.with_raised({1: 2.5, 0: 1.0})
    again = raised.with_raised({2: 4.0})
    for other, expected in ((raised, {0: 1.0, 1: 2.5}), (again, {2: 4.0})):
        difference = (other(IMAGES) - masked(IMAGES)).mean(0).tolist()
        wanted = [expected.get(index, 0.0) for index in range(len(difference))]
        assert difference == pytest.approx(wanted, abs=1e-4)

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mnp.surgery.forward import (
    NoLogitsError,
    call_network,
    call_on_copies,
    evaluating,
    find_logits,
    holding_statistics,
    probe_network,
)

IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Counting(nn.Module):
    """Writes its buffers in every mode: one in place, one anew; draws random numbers."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("latest", torch.zeros(1, 3, 8, 8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.latest = x[:1].clone()
        x = F.dropout(self.norm(self.conv(x)), training=True).mean((2, 3))
        logits: Tensor = self.head(x) + self.calls
        return logits


def traces(network: nn.Module) -> tuple[Any, ...]:
    buffer = io.BytesIO()
    torch.save(dict(network.named_buffers()), buffer)
    return (
        buffer.getvalue(),
        [module.training for module in network.modules()],
        [(name, id(p), p.requires_grad, p.grad) for name, p in network.named_parameters()],
        [(name, id(b)) for name, b in network.named_buffers()],
    )


# --- logits ------------------------------------------------------------------------------------

LOGITS = torch.rand(4, 2)


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        (LOGITS, "more"),
        [LOGITS],
        {"features": 1, "logits": LOGITS},
        OrderedDict(out=LOGITS),
        SimpleNamespace(logits=LOGITS),
    ],
    ids=lambda output: type(output).__name__,
)
def test_outputs(output: Any) -> None:
    assert find_logits(output) is LOGITS

    class Network(nn.Module):
        def forward(self, x: Tensor) -> Any:
            assert x is IMAGES
            return output

    assert call_network(Network(), IMAGES) is LOGITS


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (
            {"a": 1, "b": 2},
            r"got dict with the keys \['a', 'b'\]. Pass as argument `forward` a",
        ),
        ({"logits": 3}, r"but got dict with the keys \['logits'\]"),
        ((), "but got tuple"),
        (("x",), "but got tuple"),
        (None, "but got NoneType"),
        (torch.zeros(2, 3, 4), r"the shape \(N, classes\), but got \(2, 3, 4\)"),
        ((torch.zeros(5),), r"the shape \(N, classes\), but got \(5,\)"),
    ],
)
def test_outputs_without_logits(output: Any, message: str) -> None:
    with pytest.raises(NoLogitsError, match=message) as error:
        find_logits(output)
    assert isinstance(error.value, TypeError)


# --- modes -------------------------------------------------------------------------------------


def mixed() -> Counting:
    network = Counting().train()
    network.conv.eval()
    network.head.requires_grad_(False)
    return network


def test_modes_come_back() -> None:
    network = mixed()
    before = traces(network)
    with evaluating(network, (nn.BatchNorm2d, nn.Linear)):
        modes = {name: module.training for name, module in network.named_modules()}
    assert modes == {"": False, "conv": False, "norm": True, "head": True}
    assert traces(network) == before


def test_modes_come_back_after_an_error() -> None:
    network = mixed()
    before = traces(network)
    context = evaluating(network)
    context.__enter__()
    assert not any(module.training for module in network.modules())
    assert not context.__exit__(KeyError, KeyError("on purpose"), None)  # it goes on its way
    assert traces(network) == before


# --- nothing is changed ------------------------------------------------------------------------


def run_apart(network: nn.Module, forward: Callable[..., Any] = call_network) -> Tensor:
    torch.manual_seed(0)
    return call_on_copies(network, IMAGES, forward)


def test_buffers_stay_and_every_call_begins_with_them() -> None:
    network = mixed()
    before = traces(network)
    first, second = run_apart(network), run_apart(network)
    assert traces(network) == before
    assert torch.equal(first, second)  # the counter is 1 in both
    torch.manual_seed(0)
    assert torch.equal(network(IMAGES), first)
    assert int(network.calls) == 1
    assert not torch.equal(run_apart(network), first)  # what is copied is what is there now


def test_weights_of_the_call_get_the_gradient() -> None:
    network = mixed()
    before = traces(network)
    weights = {name: 2 * w.detach() for name, w in network.named_parameters()}
    for weight in weights.values():
        weight.requires_grad_()
    torch.manual_seed(0)
    logits = call_on_copies(network, IMAGES, weights=weights)
    logits.sum().backward()
    assert all(weight.grad is not None for weight in weights.values())
    assert traces(network) == before
    assert not torch.equal(logits, run_apart(network))


def test_buffers_stay_where_the_call_fails() -> None:
    def fail(network: nn.Module, images: Tensor) -> Any:
        network(images)
        raise KeyError("on purpose")

    network = mixed()
    before, random = traces(network), torch.get_rng_state()
    for call in (call_on_copies, probe_network):
        with pytest.raises(KeyError, match="on purpose"):
            call(network, IMAGES, fail)
        assert traces(network) == before
        if call is call_on_copies:
            torch.set_rng_state(random)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()


def test_a_probe_leaves_everything() -> None:
    def forward(network: nn.Module, images: Tensor) -> Tensor:
        assert not any(module.training for module in network.modules())
        logits: Tensor = network(images.add_(1))
        return logits

    network, images = mixed(), IMAGES.clone()
    before, random = traces(network), torch.get_rng_state()
    logits = probe_network(network, images, forward)
    assert not logits.requires_grad
    assert traces(network) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(images, IMAGES)


def test_a_network_that_works_in_place_leaves_the_images() -> None:
    class InPlace(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            x -= 0.5
            return super().forward(x)

    images = torch.rand(3, 2)
    before = images.clone()
    network = InPlace(2, 4)
    expected = network(images.clone())
    assert call_on_copies(network, images).equal(expected)
    assert call_on_copies(network, images.requires_grad_()).equal(expected)
    assert images.detach().equal(before)


class TwiceNormed(nn.Module):
    """Calls one normalization layer twice, once by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.own = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.own(self.norm(input=self.norm(self.conv(x)).relu().square()))
        logits: Tensor = self.head(x.square().mean((2, 3)))
        return logits


def test_held_statistics_are_those_of_the_batch_without_their_gradients() -> None:
    network = TwiceNormed()
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    trained = call_on_copies(network.train(), IMAGES)
    with evaluating(network), holding_statistics(network):
        held = call_on_copies(network, IMAGES)
        held[:, 0].sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(held, trained)
    assert all(torch.equal(buffers[name], buffer) for name, buffer in network.named_buffers())
    assert not network.norm._forward_pre_hooks
    # A constant of the convolution would be taken off by the gradient through the mean.
    images = torch.rand(6, 3, requires_grad=True)
    norm = nn.BatchNorm1d(3)
    with evaluating(norm), holding_statistics(norm):
        [gradient] = torch.autograd.grad(call_on_copies(norm, images).sum(), images)
    deviation = (images.detach().var(0, correction=0) + norm.eps).sqrt()
    torch.testing.assert_close(gradient, (1 / deviation).expand(6, 3))


def test_statistics_are_no_longer_held_after_an_error() -> None:
    network = TwiceNormed().eval()
    with pytest.raises(RuntimeError), holding_statistics(network):
        call_on_copies(network, IMAGES[:, :2])
    assert not network.norm._forward_pre_hooks

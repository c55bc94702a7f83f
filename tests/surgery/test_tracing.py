from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_mnp.surgery.forward import call_network
from lightning_mnp.surgery.tracing import ConvolutionUse, RunTracer, trace_run

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two convolutions, a norm layer, a head, and a forward that a test gives."""

    def __init__(self, run: Callable[..., Any], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.run = run
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = norm or nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)

    def classify(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def trace(run: Callable[..., Any], norm: nn.Module | None = None) -> RunTracer:
    return trace_run(Net(run, norm), IMAGES, call_network)[0]


def test_what_is_recorded_of_a_run() -> None:
    def run(net: Any, x: Tensor) -> Any:
        y = net.norm(net.conv2(F.relu(net.conv1(x))))
        return net.classify(y + net.norm(net.conv2(y)))

    tracer = trace(run)
    assert tracer.uses == {
        "conv1": ConvolutionUse(elsewhere=True),
        "conv2": ConvolutionUse(norms={("norm", 1)}),
    }
    assert tracer.feeders == {"norm": {"conv2"}}


def test_the_logits_and_their_makers() -> None:
    network = Net(lambda net, x: net.classify(net.norm(net.conv1(x))) * 2 + net.conv2.bias[:2])
    tracer, logits = trace_run(network, IMAGES, call_network)
    assert tracer.makers([logits]) == {"head"}
    assert tracer.makers([logits, logits.clone()]) == {"head"}
    assert tracer.makers([IMAGES]) == frozenset()
    torch.testing.assert_close(logits, network.eval()(IMAGES).detach())


def test_a_norm_passes_on_the_makers_of_its_input() -> None:
    network = Net(lambda net, x: (net.norm(net.conv1(x)) + net.conv2(net.conv1(x))).mean((2, 3)))
    tracer, logits = trace_run(network, IMAGES, call_network)
    assert tracer.makers([logits]) == {"conv1", "conv2"}


def test_a_norm_that_the_input_feeds() -> None:
    tracer = trace(lambda net, x: net.classify(net.conv1(net.norm(x))), nn.BatchNorm2d(3))
    assert tracer.feeders == {"norm": {None}}
    assert tracer.uses["conv1"].norms == set()


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.RMSNorm(8)], ids=str)
def test_a_norm_along_another_dimension(norm: nn.Module) -> None:
    assert trace(lambda net, x: net.classify(norm(net.conv1(x)))).uses["conv1"].crossed == set()
    tracer = trace(lambda net, x: net.classify(net.norm(net.conv1(x))), norm)
    assert tracer.uses["conv1"].crossed == {"norm"}


@pytest.mark.parametrize(
    "move",
    [
        lambda x: x.permute(0, 2, 3, 1),
        lambda x: torch.permute(x, (0, 2, 3, 1)).contiguous(),
        lambda x: x.movedim(1, -1),
        lambda x: x.transpose(1, 3).clone(),
        lambda x: x.flatten(2).transpose(1, 2),
        lambda x: x.reshape(x.shape[0], 4, -1).swapaxes(1, 2).to(torch.float32),
        lambda x: x.unsqueeze(0).squeeze(0).permute(0, 2, 3, 1).float(),
    ],
)
def test_channels_are_followed_through_layout_functions(move: Callable[[Tensor], Tensor]) -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        return net.head(net.norm(move(net.conv1(x))).flatten(1, -2).mean(1))  # type: ignore[no-any-return]

    use = trace(run, nn.LayerNorm(4)).uses["conv1"]
    assert use.norms == {("norm", move(torch.zeros(1, 4, 2, 2)).ndim - 1)}
    assert (use.elsewhere, use.crossed) == (False, set())


class NoDoubles(TorchDispatchMode):
    """A device without float64, such as Apple's GPUs."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        assert not (isinstance(result, Tensor) and result.dtype == torch.float64), func
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_are_followed_on_devices_without_float64(dtype: torch.dtype) -> None:
    def run(net: Any, x: Tensor) -> Any:
        moved = net.conv1(x).permute(0, 2, 3, 1).to(dtype).float()
        return net.classify(net.norm(moved).permute(0, 3, 1, 2))

    with NoDoubles():
        use = trace(run, nn.LayerNorm(4)).uses["conv1"]
    assert use == ConvolutionUse(norms={("norm", 3)})


@pytest.mark.parametrize(
    "use",
    [
        lambda net, y: net.norm(y) + y,
        lambda net, y: net.norm(y) + net.conv2(y),
        lambda net, y: net.norm(y) + net.conv2(input=y),
        lambda net, y: net.norm(y) + torch.cat([y[:, :2], y[:, 2:]], 1),
        lambda net, y: net.norm(y) * y.mean((2, 3), keepdim=True),
        lambda net, y: net.norm(F.relu_(y)),
        lambda net, y: net.norm(y) + 0 * y.view(torch.int16).sum(),
    ],
)
def test_an_output_that_also_goes_elsewhere(use: Callable[[Any, Tensor], Tensor]) -> None:
    assert trace(lambda net, x: net.classify(use(net, net.conv1(x)))).uses["conv1"].elsewhere


def test_questions_about_a_map_are_no_use_of_it() -> None:
    def run(net: Any, x: Tensor) -> Any:
        y = net.conv1(x)
        assert y.shape[1] == y.size(1) == 4
        assert y.ndim == y.dim() == 4
        assert y.is_floating_point()
        return net.classify(net.norm(input=y))  # also by keyword

    assert trace(run).uses["conv1"] == ConvolutionUse(norms={("norm", 1)})

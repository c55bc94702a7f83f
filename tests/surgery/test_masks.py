from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import FrozenBatchNorm2d, Permute
from unusual_layers import NormThen, Standardized

from lightning_mnp.surgery.layers import FilterLayer, FilterLayers, find_filter_layers
from lightning_mnp.surgery.masked_network import MaskedNetwork
from lightning_mnp.surgery.masks import FilterMasks, undone_masks

Build = Callable[[], nn.Sequential]

# Channels-last norms stand between two permutations.
LAST, FIRST = [0, 2, 3, 1], [0, 3, 1, 2]

CONVOLUTIONS: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "1d": (1, lambda: nn.Conv1d(4, 4, 3)),
    "2d": (2, lambda: nn.Conv2d(4, 4, 3)),
    "2d without bias": (2, lambda: nn.Conv2d(4, 4, 3, bias=False)),
    "3d": (3, lambda: nn.Conv3d(4, 4, 2)),
    "grouped": (2, lambda: nn.Conv2d(4, 4, 3, groups=2)),
    "depthwise": (2, lambda: nn.Conv2d(4, 4, 3, groups=4)),
    "transposed 1d": (1, lambda: nn.ConvTranspose1d(4, 4, 3)),
    "transposed 2d": (2, lambda: nn.ConvTranspose2d(4, 4, 3)),
    "transposed grouped": (2, lambda: nn.ConvTranspose2d(4, 4, 3, groups=2)),
    "transposed 3d": (3, lambda: nn.ConvTranspose3d(4, 4, 2)),
}
NORMS: dict[str, Callable[[], list[nn.Module]]] = {
    "none": lambda: [],
    "batch": lambda: [nn.BatchNorm2d(4)],
    "batch, not affine": lambda: [nn.BatchNorm2d(4, affine=False)],
    "instance": lambda: [nn.InstanceNorm2d(4, affine=True, track_running_stats=True)],
    "instance, not affine": lambda: [nn.InstanceNorm2d(4)],
    "frozen": lambda: [FrozenBatchNorm2d(4)],
    "group": lambda: [nn.GroupNorm(2, 4)],
    "layer, channels first": lambda: [LayerNorm2d(4)],
    "layer, channels last": lambda: [Permute(LAST), nn.LayerNorm(4), Permute(FIRST)],
    "layer, no bias": lambda: [Permute(LAST), nn.LayerNorm(4, bias=False), Permute(FIRST)],
    "rms": lambda: [Permute(LAST), nn.RMSNorm(4), Permute(FIRST)],
}
POOLS = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}


def randomize(network: nn.Module) -> nn.Module:
    """Return every parameter and statistic a value of its own."""
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 2.0) if "running" in name else tensor.normal_()
    return network


def build(convolution: str = "2d", norm: str = "none") -> tuple[nn.Sequential, Tensor]:
    """One convolution and a norm, ReLU, another convolution, a head; in float64, eval mode."""
    dims, make = CONVOLUTIONS[convolution]
    after = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims](4, 4, 1)
    head = [POOLS[dims](1), nn.Flatten(), nn.Linear(4, 2)]
    network = nn.Sequential(make(), *NORMS[norm](), nn.ReLU(), after, *head)
    return randomize(network.double()).eval(), torch.randn(3, 4, *[5] * dims).double()  # type: ignore[return-value]


def by_hand(network: nn.Sequential, layers: FilterLayers, values: Tensor, x: Tensor) -> Tensor:
    """Run layer by layer, scaling one map after the other."""
    sites = {
        layer.site: (layer, part)
        for layer, part in zip(layers, values.split(layers.sizes), strict=True)
    }
    for name, module in network.named_children():
        x = module(x)
        if name in sites:
            layer, part = sites[name]
            x = x.clone()
            for index in range(layer.filters):
                x.select(layer.channel_dim, index).mul_(part[index])
    return x


def state_bytes(network: nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    return buffer.getvalue()


def traces(network: nn.Module) -> tuple[Any, ...]:
    return (
        state_bytes(network),
        [(module.training, len(module._forward_hooks)) for module in network.modules()],
        [(name, id(p), p.requires_grad) for name, p in network.named_parameters()],
    )


PAIRS = [(name, "none") for name in CONVOLUTIONS] + [("2d", name) for name in NORMS]


# --- attached ----------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["norm", "filter"])
@pytest.mark.parametrize(("convolution", "norm"), PAIRS)
def test_masked_equals_maps_scaled_by_hand(convolution: str, norm: str, site: Any) -> None:
    network, images = build(convolution, norm)
    layers = find_filter_layers(network, images, site=site)
    assert layers[0].site == ("0" if site == "filter" or norm == "none" else layers[0].norm)
    values = torch.tensor([0, 0.5, 1, 2] * 2).double()[: layers.total]
    before, plain = traces(network), network(images)
    with FilterMasks(network, layers, values) as masks:
        assert masks.attached
        masked = network(images)
        assert state_bytes(network) == before[0]
        assert not any("mask" in name for name in network.state_dict())
    torch.testing.assert_close(masked, by_hand(network, layers, values, images), rtol=0, atol=0)
    assert not torch.equal(masked, plain)
    assert not masks.attached
    assert traces(network) == before
    assert torch.equal(network(images), plain)


def test_ones_change_nothing() -> None:
    network, images = build("2d", "batch")
    plain = network(images)
    with FilterMasks(network, find_filter_layers(network, images)):
        assert torch.equal(network(images), plain)


def test_attach_returns_a_context_and_remove_can_be_repeated() -> None:
    network, images = build()
    plain = network(images)
    masks = FilterMasks(network, find_filter_layers(network, images), torch.zeros(8))
    assert repr(masks) == "FilterMasks(2 layers, 8 filters, not attached)"
    with masks.attach() as same:
        assert same is masks
        assert repr(masks).endswith(", attached)")
        assert torch.equal(network(images), network[-1].bias.expand(3, 2))
    masks.remove()
    masks.remove()
    assert torch.equal(network(images), plain)


def test_masks_come_off_when_the_network_fails() -> None:
    network, images = build()
    before = traces(network)
    with (
        pytest.raises(RuntimeError),
        FilterMasks(network, find_filter_layers(network, images)),
    ):
        network(images[:, :2])
    assert traces(network) == before


def test_gradients_are_those_of_finite_differences() -> None:
    network, images = build("grouped", "batch")
    layers = find_filter_layers(network, images)
    start = torch.rand(layers.total).double()

    def loss(values: Tensor) -> Tensor:
        with FilterMasks(network, layers, values):
            return network(images).square().sum()  # type: ignore[no-any-return]

    values = start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(values), values)
    step = 1e-6 * torch.eye(layers.total).double()
    with torch.no_grad():
        slopes = torch.stack([(loss(start + h) - loss(start - h)) / 2e-6 for h in step])
    torch.testing.assert_close(gradient, slopes, rtol=1e-5, atol=1e-5)


def test_a_module_that_is_called_twice_is_masked_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.conv(self.norm(self.conv(x)).relu()))
            logits: Tensor = self.head(x.mean((2, 3)))
            return logits

    network = randomize(Twice().double()).eval()
    images, values = torch.randn(2, 4, 5, 5).double(), torch.tensor([0, 0.5, 1, 2]).double()
    layers = find_filter_layers(network, images)
    with FilterMasks(network, layers, values):
        masked = network(images)
    factor = values[:, None, None]
    x = network.norm(network.conv(images)) * factor
    x = network.norm(network.conv(x.relu())) * factor
    torch.testing.assert_close(masked, network.head(x.mean((2, 3))))
    FilterMasks(network, layers, values).bake()
    torch.testing.assert_close(network(images), masked)


def test_masks_under_autocast() -> None:
    network, images = build("2d", "batch")
    network, images = network.float(), images.float()
    layers = find_filter_layers(network, images)
    values = torch.full((layers.total,), 0.5, requires_grad=True)
    with (
        torch.autocast("cpu", torch.bfloat16),
        FilterMasks(network, layers, values),
    ):
        low = network(images)
    assert low.dtype == torch.bfloat16
    low.float().sum().backward()
    assert values.grad is not None
    assert values.grad.dtype == torch.float32
    assert values.grad.abs().sum() > 0
    with FilterMasks(network, layers, values.detach()):
        torch.testing.assert_close(low.float(), network(images), rtol=0.1, atol=0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_masks_keep_the_dtype_of_the_network(dtype: torch.dtype) -> None:
    network, images = build("2d", "batch")
    network, images = network.to(dtype), images.to(dtype)
    with FilterMasks(network, find_filter_layers(network, images)) as masks:
        assert masks.values.dtype == torch.float32
        assert network(images).dtype == dtype


# --- baked -------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["norm", "filter"])
@pytest.mark.parametrize(("convolution", "norm"), PAIRS)
def test_baked_equals_masked_in_evaluation_mode(convolution: str, norm: str, site: Any) -> None:
    network, images = build(convolution, norm)
    layers = find_filter_layers(network, images, site=site)
    values = torch.tensor([0, 0.5, 1, 2] * 2).double()[: layers.total]
    if network.get_submodule(layers[0].site).weight is None:
        values = values.clamp(0, 1).ceil()
    with FilterMasks(network, layers, values):
        masked = network(images)
    names = list(network.state_dict())
    baked = copy.deepcopy(network)
    FilterMasks(baked, layers, values).bake()
    torch.testing.assert_close(baked(images), masked, rtol=1e-10, atol=1e-10)
    assert list(baked.state_dict()) == names
    maps = {}
    baked.get_submodule(layers[0].site).register_forward_hook(
        lambda module, args, output: maps.update({"0": output})
    )
    baked(images)
    assert maps["0"].select(layers[0].channel_dim, 0).abs().max() == 0  # exactly
    untouched = [n for n in names if int(n.split(".")[0]) > int(layers[-1].site)]
    assert all(torch.equal(baked.state_dict()[n], network.state_dict()[n]) for n in untouched)


def test_a_filter_without_a_map_holds_nothing_that_could_bring_it_back() -> None:
    network, images = build("2d", "batch")
    layers = find_filter_layers(network, images)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    values = torch.ones(layers.total)
    values[2] = 0.0
    FilterMasks(network, layers, values).bake()
    changed = {
        name: (tensor != before[name]).flatten(1).any(1).tolist()
        if tensor.ndim > 1
        else (tensor != before[name]).tolist()
        for name, tensor in network.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
    third = [False, False, True, False]
    assert changed == dict.fromkeys(
        ["0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean"], third
    )
    assert all(network.state_dict()[name][2].abs().max() == 0 for name in changed)
    network.train()
    assert network[1](network[0](images))[:, 2].abs().max() == 0


@pytest.mark.parametrize("norm", ["group", "layer, channels first", "rms"])
def test_a_norm_over_several_channels_keeps_its_inputs(norm: str) -> None:
    network, images = build("2d", norm)
    layers = find_filter_layers(network, images)
    weight = network[0].weight.clone()
    FilterMasks(network, layers, torch.zeros(layers.total)).bake()
    assert torch.equal(network[0].weight, weight)


@pytest.mark.parametrize("convolution", list(CONVOLUTIONS))
def test_baking_scales_rows(convolution: str) -> None:
    network, images = build(convolution)
    layers = find_filter_layers(network, images)
    before = copy.deepcopy(network[0])
    values = torch.tensor([0, 0.5, 1, 2] * 2).double()
    FilterMasks(network, layers, values).bake()
    rows, old = (layers[0].rows(conv.weight) for conv in (network[0], before))
    torch.testing.assert_close(rows, old * values[:4, None], rtol=0, atol=0)
    assert network[0].weight.requires_grad


def test_baking_leaves_modes_and_frozen_parameters() -> None:
    network, images = build("2d", "batch")
    layers = find_filter_layers(network, images)
    network.train()
    network[0].requires_grad_(False)
    before = traces(network)
    FilterMasks(network, layers, torch.ones(layers.total)).bake()
    assert traces(network) == before


# --- layers that do more than PyTorch's own ----------------------------------------------------


@pytest.mark.parametrize("conv", ["2d", "grouped"])
def test_masks_act_in_front_of_the_activation_of_a_norm(conv: str) -> None:
    inside, images = build(conv, "batch")
    inside.insert(2, nn.Identity())
    behind = copy.deepcopy(inside)
    inside[1], inside[2] = NormThen(nn.SiLU()).double().eval(), nn.Identity()
    inside[1].load_state_dict(behind[1].state_dict())
    behind[2] = nn.SiLU()
    values = torch.tensor([0, 0.5, 1, 2] * 2).double()
    layers = find_filter_layers(inside, images)
    before = traces(inside)
    with FilterMasks(inside, layers, values):
        masked = inside(images)
        assert state_bytes(inside) == before[0]
    assert traces(inside) == before
    with FilterMasks(behind, find_filter_layers(behind, images), values):
        torch.testing.assert_close(masked, behind(images))
    FilterMasks(inside, layers, values).bake()
    torch.testing.assert_close(inside(images), masked)


def test_scale_and_shift_come_back_when_the_norm_fails() -> None:
    network, images = build("2d", "batch")
    network[1] = NormThen(nn.SiLU()).double().eval()
    layers = find_filter_layers(network, images)

    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ArithmeticError("on purpose")

    network[1].then = Failing()
    before = traces(network)
    with (
        pytest.raises(ArithmeticError, match="on purpose"),
        FilterMasks(network, layers, torch.full((layers.total,), 0.5)),
    ):
        network(images)
    assert traces(network) == before


def test_gradients_through_scale_and_shift() -> None:
    network, images = build("2d", "batch")
    network[1] = NormThen(nn.SiLU()).double().eval()
    layers = find_filter_layers(network, images)
    values = torch.rand(layers.total).double().requires_grad_()

    def run(values: Tensor) -> Tensor:
        with FilterMasks(network, layers, values):
            return network(images)  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(run, [values])


def standardized(gain: bool) -> tuple[nn.Sequential, Tensor]:
    network, images = build("2d")
    network[0] = Standardized(4, 4, 3, gain=gain).double()
    return network, images


@pytest.mark.parametrize("gain", [False, True])
def test_standardized_weights_are_baked(gain: bool) -> None:
    network, images = standardized(gain)
    layers = find_filter_layers(network, images)
    values = torch.tensor([0, 0.5, 1, 2] * 2).double()
    if not gain:
        values[:4].clamp_(0, 1).ceil_()
    with FilterMasks(network, layers, values):
        masked = network(images)
    FilterMasks(network, layers, values).bake()
    torch.testing.assert_close(network(images), masked)
    assert network[0].weight[0].abs().max() == 0
    assert network[0].weight[1].abs().max() > 0


def test_standardized_weights_without_a_gain_take_only_zeros_and_ones() -> None:
    network, images = standardized(gain=False)
    layers = find_filter_layers(network, images)
    values = torch.zeros(layers.total)
    values[2] = 0.5
    before = traces(network)
    with pytest.raises(RuntimeError, match="into '0', whose output does not scale with its wei"):
        FilterMasks(network, layers, values).bake()
    assert traces(network) == before


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (torch.ones(7), r"torch.float32 of shape \(7,\)"),
        (torch.ones(8, 1), r"torch.float32 of shape \(8, 1\)"),
        (torch.ones(8).long(), r"torch.int64 of shape \(8,\)"),
    ],
)
def test_wrong_values(values: Tensor, found: str) -> None:
    network, images = build()
    layers = find_filter_layers(network, images)
    with pytest.raises(ValueError, match=f"each of the 8 filters, but got {found}"):
        FilterMasks(network, layers, values)


def test_attached_twice_and_baked_while_attached() -> None:
    network, images = build()
    before = traces(network)
    with FilterMasks(network, find_filter_layers(network, images)) as masks:
        with pytest.raises(RuntimeError, match="attached already; call `remove` first"):
            masks.attach()
        with pytest.raises(RuntimeError, match="attached; call `remove` before `bake`"):
            masks.bake()
        assert masks.attached
    assert traces(network) == before


@pytest.mark.parametrize("norm", ["batch, not affine", "instance, not affine"])
def test_a_norm_without_scale_takes_only_zeros_and_ones(norm: str) -> None:
    network, images = build("2d", norm)
    layers = find_filter_layers(network, images)
    values = torch.full((layers.total,), 0.5)
    values[-1] = 0.0
    before = traces(network)
    with pytest.raises(RuntimeError, match=r"into '1', which has no scale .* `site='filter'`"):
        FilterMasks(network, layers, values).bake()
    assert traces(network) == before


@pytest.mark.parametrize("action", ["attach", "bake"])
def test_layers_of_another_network(action: str) -> None:
    network, images = build()
    layers = find_filter_layers(network, images)
    other = FilterLayers((*layers.layers, FilterLayer("x", 1, "x", 1)))
    before = traces(network)
    with pytest.raises(AttributeError, match="x"):
        getattr(FilterMasks(network, other, torch.zeros(9)), action)()
    assert traces(network) == before


@pytest.mark.parametrize("statistics", ["batch", "running"])
@pytest.mark.parametrize("norm", [*NORMS, "batch, not tracked", "group of one"])
def test_masks_are_undone_where_the_loss_has_no_slope(norm: str, statistics: Any) -> None:
    norms = {
        **NORMS,
        "batch, not tracked": lambda: [nn.BatchNorm2d(4, track_running_stats=False)],
        "group of one": lambda: [nn.GroupNorm(4, 4)],
    }[norm]()
    network = nn.Sequential(nn.Conv2d(3, 4, 3), *norms, nn.Flatten(), nn.Linear(144, 2))
    network.double()
    images = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    layers = find_filter_layers(network, images, site="filter")
    masks = torch.ones(4, dtype=torch.float64, requires_grad=True)
    logits = MaskedNetwork(network, layers, statistics=statistics)(images, masks=masks)
    (slopes,) = torch.autograd.grad(F.cross_entropy(logits, torch.arange(4) % 2), masks)
    found = undone_masks(network, layers, statistics == "running")
    assert found == (["0"] if float(slopes.abs().max()) < 1e-3 else [])

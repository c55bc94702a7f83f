from __future__ import annotations

import copy
import io
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import FrozenBatchNorm2d, Permute
from unusual_layers import NormThen, Standardized

from lightning_mnp.surgery.forward import NoLogitsError
from lightning_mnp.surgery.layers import (
    FilterLayer,
    FilterLayers,
    filter_rows,
    find_filter_layers,
)
from lightning_mnp.surgery.masks import FilterMasks

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two convolutions, a head, and a forward that a test gives."""

    def __init__(self, run: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)

    def classify(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class TallNorm(nn.BatchNorm2d):
    """A normalization layer whose weight has a dimension for each of those of a map."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.weight = nn.Parameter(self.weight.detach()[:, None, None])
        self.bias = nn.Parameter(self.bias.detach()[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        mean, variance = self.running_mean[:, None, None], self.running_var[:, None, None]
        return (images - mean) / (variance + self.eps).sqrt() * self.weight + self.bias


def chain(*layers: nn.Module, width: int = 4, dims: int = 2) -> nn.Sequential:
    pools = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
    return nn.Sequential(*layers, pools[dims](1), nn.Flatten(), nn.Linear(width, 2))


def only(network: nn.Module, images: Tensor = IMAGES, **options: Any) -> FilterLayer:
    layers = find_filter_layers(network, images, **options)
    assert len(layers) == 1
    layer: FilterLayer = layers[0]
    return layer


def site_of(network: nn.Module, name: str) -> tuple[str, str]:
    layer = next(layer for layer in find_filter_layers(network, IMAGES) if layer.name == name)
    return layer.site, layer.note


def fingerprint(network: nn.Module) -> tuple[Any, ...]:
    """All that looking at a network must leave alone."""
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    return (
        buffer.getvalue(),
        [(name, module.training, type(module)) for name, module in network.named_modules()],
        [(name, p.requires_grad, p.grad, id(p)) for name, p in network.named_parameters()],
        [(name, id(b)) for name, b in network.named_buffers()],
        [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in network.modules()
        ],
        [
            (len(m._forward_hooks_with_kwargs), len(m._forward_pre_hooks_with_kwargs))
            for m in network.modules()
        ],
        torch.get_rng_state().tolist(),
    )


# --- what is found -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("convolution", "transposed", "groups"),
    [
        (nn.Conv1d(4, 4, 3), False, 1),
        (nn.Conv2d(4, 4, 3), False, 1),
        (nn.Conv3d(4, 4, 3), False, 1),
        (nn.Conv2d(4, 4, 3, groups=2), False, 2),
        (nn.Conv2d(4, 4, 3, groups=4, bias=False), False, 4),
        (nn.ConvTranspose1d(4, 4, 3), True, 1),
        (nn.ConvTranspose2d(4, 4, 3, groups=2), True, 2),
        (nn.ConvTranspose3d(4, 4, 3), True, 1),
    ],
    ids=str,
)
def test_convolutions_in_all_dimensions(convolution: Any, transposed: bool, groups: int) -> None:
    dims = convolution.weight.ndim - 2
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims](4)
    images = torch.rand(2, 4, *[5] * dims)
    assert only(chain(convolution, norm, dims=dims), images) == FilterLayer(
        "0", 4, "1", 1, "1", transposed, groups
    )
    bare = only(chain(convolution, nn.ReLU(), dims=dims), images)
    assert (bare.site, bare.norm, bare.note) == ("0", None, "no normalization layer follows")


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(4),
        nn.BatchNorm2d(4, affine=False),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm2d(4),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        nn.GroupNorm(2, 4),
        LayerNorm2d(4),
        FrozenBatchNorm2d(4),
    ],
    ids=str,
)
def test_a_norm_layer_with_channels_first_is_the_site(norm: nn.Module) -> None:
    layer = only(chain(nn.Conv2d(3, 4, 3), norm, nn.ReLU()))
    assert (layer.site, layer.channel_dim, layer.norm, layer.note) == ("1", 1, "1", "")


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.RMSNorm(4)], ids=str)
def test_a_norm_layer_with_channels_last_is_the_site(norm: nn.Module) -> None:
    to_last, to_first = Permute([0, 2, 3, 1]), Permute([0, 3, 1, 2])
    layer = only(chain(nn.Conv2d(3, 4, 3), to_last, norm, to_first))
    assert (layer.site, layer.channel_dim, layer.norm) == ("2", 3, "2")


def test_a_flattened_map_keeps_its_channels() -> None:
    layer = only(
        nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 2))
    )
    assert (layer.site, layer.channel_dim) == ("2", 1)


def test_a_norm_over_mixed_channels_is_not_paired() -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 7), nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 2))
    assert only(network).note == "no normalization layer follows"  # flattening mixed (C, H, W)


def test_a_single_channel() -> None:
    to_last, to_first = Permute([0, 2, 3, 1]), Permute([0, 3, 1, 2])
    network = chain(nn.Conv2d(3, 1, 3), to_last, nn.LayerNorm(1), to_first, width=1)
    assert only(network).site == "0"  # one channel leaves no trace to follow
    assert only(chain(nn.Conv2d(3, 1, 3), nn.BatchNorm2d(1), width=1)).site == "1"


@pytest.mark.parametrize(
    ("norm", "note"),
    [
        (nn.LayerNorm([4, 6, 6]), "the normalization layer 1 has other channels"),
        (nn.LayerNorm(6), "the normalization layer 1 has other channels"),
        (TallNorm(4), "the weight of the normalization layer 1 has several dimensions"),
        (
            nn.GroupNorm(2, 4, affine=False),
            "the normalization layer 1 has no weight to prune",
        ),
    ],
    ids=str,
)
def test_a_norm_that_does_not_do_is_said(norm: nn.Module, note: str) -> None:
    layer = only(chain(nn.Conv2d(3, 4, 3), norm))
    assert (layer.site, layer.note) == ("0", note)


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.RMSNorm(4)], ids=str)
def test_a_norm_along_the_width_is_not_taken_for_one_along_the_channels(norm: nn.Module) -> None:
    layer = only(chain(nn.Conv2d(3, 4, 5), norm))  # the map is as wide as it has channels
    assert (layer.site, layer.note) == (
        "0",
        "the normalization layer 1 normalizes another dimension",
    )


def test_preactivation_order() -> None:
    def run(net: Any, x: Tensor) -> Any:
        x = net.conv1(x)
        x = x + net.conv2(F.relu(net.norm(x)))
        return net.classify(F.relu(net.last(x)))

    network = Net(run, norm=nn.BatchNorm2d(4), last=nn.BatchNorm2d(4))
    # The stem also feeds the shortcut, and the last norm sees a sum.
    assert site_of(network, "conv1") == ("conv1", "its output goes elsewhere, too")
    assert site_of(network, "conv2") == ("conv2", "no normalization layer follows")


def test_preactivation_without_a_shortcut() -> None:
    network = chain(
        nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)
    )
    layers = find_filter_layers(network, IMAGES)
    assert [(layer.name, layer.site) for layer in layers] == [("2", "3"), ("4", "4")]


def test_used_twice_with_one_norm() -> None:
    def run(net: Any, x: Tensor) -> Any:
        x = net.conv1(x)
        for _ in range(2):
            x = net.norm(net.conv2(F.relu(x)))
        return net.classify(x)

    assert site_of(Net(run, norm=nn.BatchNorm2d(4)), "conv2") == ("norm", "")


def test_used_twice_with_two_norms() -> None:
    def run(net: Any, x: Tensor) -> Any:
        x = net.norm(net.conv2(F.relu(net.conv1(x))))
        return net.classify(net.second(net.conv2(x)))

    network = Net(run, norm=nn.BatchNorm2d(4), second=nn.BatchNorm2d(4))
    assert site_of(network, "conv2") == ("conv2", "several normalization layers follow")


@pytest.mark.parametrize("other", ["convolution", "input"])
def test_a_norm_fed_by_others_too(other: str) -> None:
    def run(net: Any, x: Tensor) -> Any:
        y = net.norm(net.conv1(x))
        y = y + net.norm(net.conv2(F.relu(y)) if other == "convolution" else F.relu(y))
        return net.classify(y)

    note = "the normalization layer norm is fed by other layers, too"
    assert site_of(Net(run, norm=nn.BatchNorm2d(4)), "conv1") == ("conv1", note)


def test_site_filter() -> None:
    layer = only(chain(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), site="filter")
    assert (layer.site, layer.channel_dim, layer.norm, layer.note) == ("0", 1, "1", "")


def test_dtypes_and_modes() -> None:
    network = chain(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double().train()
    assert only(network, IMAGES.double()).site == "1"


def test_a_norm_that_ends_with_an_activation() -> None:
    layer = only(chain(nn.Conv2d(3, 4, 3), NormThen(nn.SiLU())))
    assert (layer.site, layer.active, layer.note) == ("1", True, "")
    at_filter = only(chain(nn.Conv2d(3, 4, 3), NormThen(nn.SiLU())), site="filter")
    assert (at_filter.site, at_filter.active) == ("0", False)
    assert not only(chain(nn.Conv2d(3, 4, 3), NormThen(nn.ReLU()))).active  # no need


def test_a_norm_that_does_more() -> None:
    layer = only(chain(nn.Conv2d(3, 4, 3), NormThen(lambda x: x.softmax(1))))
    assert (layer.site, layer.active) == ("0", False)
    assert layer.note == "the normalization layer 1 does more than normalize"


def test_what_scales_the_filters() -> None:
    assert only(chain(nn.Conv2d(3, 4, 3))).scale == "weight"
    assert only(chain(Standardized(3, 4, 3))).scale == ""
    assert only(chain(Standardized(3, 4, 3, gain=True))).scale == "factor"


class Words(nn.Module):
    """Linear layers along the last dimension, with a norm behind the first and one at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 4, 4, 4)
        self.wide, self.norm = nn.Linear(4, 6), nn.LayerNorm(6)
        self.narrow, self.head = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = self.norm(self.wide(x))
        return self.head(F.relu(self.narrow(x)).mean(1))  # type: ignore[no-any-return]


def test_hidden_linear_layers_take_part_if_asked_for() -> None:
    network = Words()
    assert [layer.name for layer in find_filter_layers(network, IMAGES)] == ["patches"]
    layers = find_filter_layers(network, IMAGES, linear=True)
    assert layers[1:] == (
        FilterLayer("wide", 6, "norm", 2, "norm"),
        FilterLayer("narrow", 5, "narrow", -1, note="no normalization layer follows"),
    )
    assert layers.skipped == (("head", "classifier head: its filters are classes"),)
    own = find_filter_layers(network, IMAGES, linear=True, site="filter", include=["wide"])
    assert own[0] == FilterLayer("wide", 6, "wide", -1, "norm")


def test_units_of_linear_layers_are_masked_and_pruned_as_filters_are() -> None:
    network = Words()
    layers = find_filter_layers(network, IMAGES, linear=True)
    masks = torch.ones(layers.total)
    masks[[2, 5, 12]] = 0.0
    with FilterMasks(network, layers, masks):
        expected = network(IMAGES)
    narrow = network.narrow.weight.detach().clone()
    FilterMasks(network, layers, masks).bake()
    torch.testing.assert_close(network(IMAGES), expected)
    narrow[2] = 0.0
    assert network.narrow.weight.equal(narrow)
    assert network.narrow.bias[2] == network.norm.weight[1] == network.norm.bias[1] == 0


def test_a_linear_layer_with_a_forward_of_its_own_takes_no_part() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    network = nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten(), Doubled(4, 4), nn.Linear(4, 2))
    layers = find_filter_layers(network, IMAGES, linear=True)
    assert [layer.name for layer in layers] == ["0"]
    assert layers.skipped[0][0] == "2"


def test_linear_layers_alone_are_not_enough() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="to hold at least one convolution"):
        find_filter_layers(network, IMAGES, linear=True)


# --- what is left out --------------------------------------------------------------------------


def test_layers_that_are_never_called() -> None:
    network = Net(lambda net, x: net.classify(net.conv1(x)), norm=nn.BatchNorm2d(4))
    layers = find_filter_layers(network, IMAGES)
    assert [layer.name for layer in layers] == ["conv1"]
    assert layers.skipped == (("conv2", "not called by the network"),)


def head_reason(name: str) -> tuple[tuple[str, str], ...]:
    return ((name, "classifier head: its filters are classes"),)


@pytest.mark.parametrize(
    "tail",
    [
        [nn.Dropout(), nn.Conv2d(4, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()],
        [nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 2, 1), nn.Flatten()],
        [nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2), nn.AdaptiveMaxPool2d(1), nn.Flatten()],
    ],
)
def test_a_convolution_as_head(tail: list[nn.Module]) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), *tail)
    layers = find_filter_layers(network, IMAGES)
    assert [layer.name for layer in layers] == ["0"]
    position = next(i for i, m in enumerate(network) if i > 0 and isinstance(m, nn.Conv2d))
    assert layers.skipped == head_reason(str(position))


def test_two_heads_summed() -> None:
    def run(net: Any, x: Tensor) -> Any:
        x = F.relu(net.conv1(x))
        return net.a(x).mean((2, 3)) + 2 * net.b(x).mean((2, 3))

    network = Net(run, a=nn.Conv2d(4, 2, 1), b=nn.Conv2d(4, 2, 1))
    assert [layer.name for layer in find_filter_layers(network, IMAGES)] == ["conv1"]


@pytest.mark.parametrize(
    "product",
    [
        lambda x, weight: F.linear(x, weight),
        lambda x, weight: x @ weight.T,
        lambda x, weight: torch.einsum("nc,kc->nk", x, weight),
        lambda x, weight: 10 * F.linear(F.normalize(x), F.normalize(weight)),
        lambda x, weight: torch.matmul(x, (weight / weight.norm(dim=1, keepdim=True)).t()),
    ],
)
def test_a_head_of_a_parameter_of_its_own(product: Callable[..., Tensor]) -> None:
    def run(net: Any, x: Tensor) -> Any:
        return product(net.conv1(x).mean((2, 3)), net.head.weight)

    layers = find_filter_layers(Net(run), IMAGES)
    assert [layer.name for layer in layers] == ["conv1"]


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_patterns(argument: str) -> None:
    network = nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(3, 4, 3),
            stage1=nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)),
            tail=chain(nn.Conv2d(4, 4, 1)),
        )
    )
    patterns = ("stage?.*", "stem")
    layers = find_filter_layers(network, IMAGES, **{argument: patterns})
    stage, others = ["stem", "stage1.0", "stage1.1"], ["tail.0"]
    kept, left = (stage, others) if argument == "include" else (others, stage)
    assert [layer.name for layer in layers] == kept
    assert layers.skipped == tuple((name, "left out by name") for name in left)


def test_exclude_wins_over_include() -> None:
    network = chain(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    assert only(network, include=["0", "1"], exclude=["1"]).name == "0"


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize(
    "parametrize",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        torch.nn.utils.weight_norm,
        lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    ],
)
def test_computed_weights_are_left_alone(parametrize: Callable[[nn.Module], Any]) -> None:
    network = chain(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    parametrize(network[1])
    before = fingerprint(network)
    layers = find_filter_layers(network, IMAGES)
    assert layers.skipped == (("1", "its weight is computed by a parametrization"),)
    assert [layer.name for layer in layers] == ["0"]
    assert fingerprint(network) == before


def test_weights_that_two_layers_share_are_left_alone() -> None:
    network = chain(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    network[2].weight = network[1].weight
    layers = find_filter_layers(network, IMAGES)
    assert [layer.name for layer in layers] == ["0"]
    assert [name for name, _ in layers.skipped] == ["1", "2"]
    assert layers.skipped[0][1] == "its weights belong to another layer, too"


def test_norm_weights_that_two_layers_share_are_left_alone() -> None:
    network = chain(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    network[3].weight = network[1].weight
    assert [layer.site for layer in find_filter_layers(network, IMAGES)] == ["0", "2"]
    note = "the normalization layer 1 does not own its weights alone"
    assert site_of(network, "0") == ("0", note)


class ConvNorm(nn.Conv2d):
    """A convolution that holds its own norm layer, as some detection libraries write it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.norm = nn.BatchNorm2d(self.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        normalized: Tensor = self.norm(super().forward(x))
        return normalized


def test_a_convolution_that_holds_layers_is_left_alone() -> None:
    layers = find_filter_layers(chain(ConvNorm(3, 4, 3), nn.Conv2d(4, 4, 1)), IMAGES)
    assert [layer.name for layer in layers] == ["1"]
    assert layers.skipped == (("0", "it holds layers of its own"),)


class PadThenConv(nn.Conv2d):
    """A convolution that pads by a layer of its own, as efficientnet_pytorch has it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.static_padding = nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self.static_padding(x), self.weight, self.bias)


def test_a_convolution_that_pads_by_a_layer_of_its_own_takes_part() -> None:
    depthwise = PadThenConv(4, 4, 3, groups=4)
    network = chain(PadThenConv(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), depthwise)
    layers = find_filter_layers(network, IMAGES)
    assert [(layer.name, layer.site) for layer in layers] == [("0", "1"), ("3", "3")]
    assert not any(name in ("0", "3") for name, _ in layers.skipped)


def test_an_empty_place_for_a_layer_is_none() -> None:
    network = chain(nn.Conv2d(3, 4, 3))
    network[0].register_module("norm", None)
    assert only(network).name == "0"


class Shifted(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1.0


def test_a_convolution_whose_maps_outlive_its_weights_is_left_alone() -> None:
    layers = find_filter_layers(chain(Shifted(3, 4, 3), nn.Conv2d(4, 4, 1)), IMAGES)
    assert [layer.name for layer in layers] == ["1"]
    assert layers.skipped == (("0", "its maps do not vanish one by one with its weights"),)


# --- outputs -----------------------------------------------------------------------------------


def test_an_output_without_logits() -> None:
    network = Net(lambda net, x: {"a": net.conv1(x)})
    with pytest.raises(NoLogitsError, match="to return logits"):
        find_filter_layers(network, IMAGES)


def test_a_forward_function_tells_how_the_network_is_called() -> None:
    network = Net(lambda net, x: {"answers": [net.classify(net.conv1(x["pixels"]))]})

    def forward(network: nn.Module, images: Tensor) -> Tensor:
        logits: Tensor = network({"pixels": images})["answers"][0]
        return logits

    assert only(network, forward=forward).name == "conv1"


# --- errors ------------------------------------------------------------------------------------


def test_no_convolution() -> None:
    message = "hold at least one convolution, but Sequential has none"
    with pytest.raises(ValueError, match=message):
        find_filter_layers(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), IMAGES)


def test_wrong_site() -> None:
    with pytest.raises(ValueError, match="`site` to be 'norm' or 'filter', but got 'weight'"):
        find_filter_layers(Net(Net.classify), IMAGES, site="weight")  # type: ignore[arg-type]


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_unknown_pattern(argument: str) -> None:
    network = chain(*(nn.Conv2d(3, 3, 1) for _ in range(8)), width=3)
    message = rf"`{argument}` to match .* 'layer\*' matches none of '0', .*'5' and 2 more\."
    with pytest.raises(ValueError, match=message):
        find_filter_layers(network, IMAGES, **{argument: ["1", "layer*"]})


def test_nothing_remains() -> None:
    network = chain(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    message = re.escape("all 2 are left out (0: left out by name; 1: left out by name)")
    with pytest.raises(ValueError, match=message):
        find_filter_layers(network, IMAGES, exclude=["*"])


@pytest.mark.parametrize("position", [0, 1, 4])
def test_lazy_layers_stay_lazy(position: int) -> None:
    lazy = {0: nn.LazyConv2d(4, 3), 1: nn.LazyBatchNorm2d(), 4: nn.LazyLinear(2)}
    network = chain(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    network[position] = lazy[position]
    with pytest.raises(ValueError, match=f"'{position}' is a lazy module"):
        find_filter_layers(network, IMAGES)
    assert network[position].has_uninitialized_params()
    network(IMAGES)
    assert only(network).site == "1"


# --- nothing is changed ------------------------------------------------------------------------


def noisy(net: Any, x: Tensor) -> Any:
    net.calls += 1
    net.latest = x[:1].clone()
    x = x.add_(1) * torch.rand(())
    return net.classify(net.norm(F.dropout(net.conv1(x), training=True)))


def raising(net: Any, x: Tensor) -> Any:
    net.calls += 1
    net.norm(net.conv1(x))
    torch.rand(3)
    raise KeyError("on purpose")


@pytest.mark.parametrize("run", [noisy, raising])
def test_the_network_and_the_random_state_stay_as_they_are(run: Callable[..., Any]) -> None:
    network = Net(run, norm=nn.BatchNorm2d(4)).train()
    network.register_buffer("calls", torch.zeros(1))
    network.register_buffer("latest", torch.zeros(1, 3, 8, 8))
    network.conv1.eval()
    network.conv2.requires_grad_(False)
    handle = network.conv1.register_forward_hook(lambda *_: None)
    images, before = IMAGES.clone(), fingerprint(network)
    if run is raising:
        with pytest.raises(KeyError, match="on purpose"):
            find_filter_layers(network, images)
    else:
        assert find_filter_layers(network, images)
    assert fingerprint(network) == before
    assert torch.equal(images, IMAGES)
    assert torch.is_grad_enabled()
    handle.remove()


# --- small parts -------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_rows_hold_the_weights_of_a_filter(transposed: bool, groups: int) -> None:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    convolution = kind(4, 8, 3, groups=groups, bias=False).double()
    images = torch.rand(2, 4, 5, 5).double()
    for index in range(8):
        other = copy.deepcopy(convolution)
        with torch.no_grad():
            rows = filter_rows(other.weight, transposed, groups)
            assert rows.shape == (8, 4 // groups * 9)
            # The gradient of an output channel falls on its row and no other.
        channel = other(images)[:, index].sum()
        (gradient,) = torch.autograd.grad(channel, other.weight)
        touched = filter_rows(gradient, transposed, groups).abs().sum(1) > 0
        assert touched.nonzero().flatten().tolist() == [index]


def test_positions() -> None:
    layers = FilterLayers((FilterLayer("a", 2, "a", 1), FilterLayer("b", 3, "b", 1)))
    assert (layers.sizes, layers.total, len(layers)) == ([2, 3], 5, 2)
    assert [layers.locate(i) for i in range(5)] == [
        ("a", 0),
        ("a", 1),
        ("b", 0),
        ("b", 1),
        ("b", 2),
    ]
    assert isinstance(layers, Sequence)
    assert layers[1].name == "b"
    for index in (-1, 5):
        with pytest.raises(IndexError, match=f"from 0 to 4, but got {index}"):
            layers.locate(index)


# --- real networks -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "convolutions", "normed"),
    [
        ("resnet18", 20, 20),
        ("convnext_tiny", 22, 19),  # three downsampling convolutions follow their norm
        ("densenet121", 120, 59),
        ("mobilenet_v3_small", 52, 34),  # squeeze-and-excitation has no norm
        ("squeezenet1_0", 25, 0),
    ],
)
def test_torchvision_networks(name: str, convolutions: int, normed: int) -> None:
    # Weights are not needed: memory that is not filled saves the time of drawing them.
    with torch.device("meta"):
        network = getattr(torchvision.models, name)(weights=None)
    network.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.zero_()
    layers = find_filter_layers(network, torch.zeros(1, 3, 32, 32))
    found = sum(isinstance(module, nn.Conv2d) for module in network.modules())
    assert len(layers) + len(layers.skipped) == found
    assert len(layers) == convolutions
    assert sum(layer.site != layer.name for layer in layers) == normed
    if name == "squeezenet1_0":
        assert layers.skipped == head_reason("classifier.1")
    else:
        assert layers.skipped == ()

"""The networks of the matrix: how each is built at its usual size, and a thin version for tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.densenet import DenseNet
from torchvision.models.efficientnet import EfficientNet, MBConvConfig
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.vgg import make_layers

from lightning_mnp.models import build_network, cifar_resnet18

__all__ = ["MATRIX", "Entry"]

Build = Callable[[], nn.Module]
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Entry:
    """One network of the matrix.

    Attributes:
        name: Its name; in front of a slash, the library.
        full: Builds it at its usual size.
        small: Builds a version with fewer layers or channels.
        shape: Shape of an image.
        small_shape: Shape of an image for the small version.
        classes: Number of classes.
    """

    name: str
    full: Build
    small: Build
    shape: Shape
    small_shape: Shape
    classes: int

    @property
    def needs(self) -> str:
        """The package that builds it, by the name to import."""
        library = self.name.partition("/")[0]
        return library if library in ("timm", "transformers") else "torchvision"


class Wrapped(nn.Module):
    """A network that returns its logits in something else than a tensor.

    Args:
        wrap: Makes the output from the logits.
        width: Channels of the first stage.
    """

    def __init__(self, wrap: Callable[[Tensor], Any], width: int) -> None:
        super().__init__()
        self.wrap = wrap
        self.network = cifar_resnet18(10, width)

    def forward(self, x: Tensor) -> Any:
        """Return what ``wrap`` makes of the logits."""
        return self.wrap(self.network(x))


@dataclass
class Output:
    """Logits and something beside them."""

    logits: Tensor
    loss: Tensor | None = None


def _torchvision(
    name: str,
    small: Build | dict[str, Any],
    classes: int = 10,
    size: int = 64,
    small_size: int = 32,
    **options: Any,
) -> Entry:
    """Make an entry of torchvision; ``small`` builds the thin version or has its options."""
    full = partial(getattr(models, name), weights=None, num_classes=classes, **options)
    thin = partial(full, **small) if isinstance(small, dict) else small
    shapes = (3, size, size), (3, small_size, small_size)
    return Entry(f"torchvision/{name}", full, thin, *shapes, classes)


def _thin_vgg(batch_norm: bool, classes: int) -> nn.Module:
    # The class has 120 million weights in its classifier, whatever comes before.
    features = make_layers([8, "M", 8, "M", 16, "M", 16, "M"], batch_norm)
    network = nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return network.append(nn.Linear(16, 32)).append(nn.ReLU()).append(nn.Linear(32, classes))


def _thin_efficientnet() -> nn.Module:
    blocks = [MBConvConfig(4, 3, 2, 8, 16, 1, 1.0, 1.0), MBConvConfig(4, 5, 2, 16, 16, 2, 1.0, 1.0)]
    network: nn.Module = EfficientNet(blocks, dropout=0.2, num_classes=10)
    return network


def _thin_regnet() -> nn.Module:
    blocks = BlockParams.from_init_params(
        depth=4, w_0=8, w_a=8.0, w_m=2.0, group_width=8, se_ratio=0.25
    )
    network: nn.Module = RegNet(blocks, num_classes=10)
    return network


def _thin_convnext() -> nn.Module:
    stages = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, 16, 2), CNBlockConfig(16, None, 1)]
    network: nn.Module = models.ConvNeXt(stages, num_classes=10)
    return network


def _thin_shufflenet() -> nn.Module:
    channels = [8, 16, 32, 64, 64]
    network: nn.Module = models.ShuffleNetV2([2, 2, 2], channels, num_classes=10)
    return network


_TORCHVISION = [
    _torchvision("resnet18", partial(ResNet, BasicBlock, [1, 1, 1, 1], 10)),
    _torchvision("resnet34", partial(ResNet, BasicBlock, [2, 1, 1, 1], 1000), classes=1000),
    _torchvision("resnet50", partial(ResNet, Bottleneck, [1, 1, 1, 1], 10, width_per_group=8)),
    _torchvision(
        "wide_resnet50_2", partial(ResNet, Bottleneck, [1, 1, 1, 1], 10, width_per_group=16)
    ),
    _torchvision(
        "resnext50_32x4d",
        partial(ResNet, Bottleneck, [1, 1, 1, 1], 10, groups=4, width_per_group=4),
    ),
    _torchvision("vgg11", partial(_thin_vgg, False, 10)),
    _torchvision("vgg16_bn", partial(_thin_vgg, True, 2), classes=2),
    _torchvision("densenet121", partial(DenseNet, 8, (2, 2, 2, 2), 16, bn_size=2, num_classes=10)),
    _torchvision("mobilenet_v2", {"width_mult": 0.25}),
    _torchvision("mobilenet_v3_small", {"width_mult": 0.25}),
    _torchvision("efficientnet_b0", _thin_efficientnet),
    _torchvision("shufflenet_v2_x0_5", _thin_shufflenet),
    _torchvision("squeezenet1_1", {}),
    _torchvision("googlenet", {}, aux_logits=True, init_weights=False),
    _torchvision("inception_v3", {}, size=96, small_size=75, aux_logits=True, init_weights=False),
    _torchvision("convnext_tiny", _thin_convnext),
    _torchvision("regnet_y_400mf", _thin_regnet),
    _torchvision("mnasnet0_5", partial(models.MNASNet, 0.1, 10)),
]


def _timm(
    name: str,
    small: dict[str, Any],
    note: str = "",
    *,
    classes: int = 10,
    shape: Shape = (3, 64, 64),
    small_shape: Shape | None = None,
) -> Entry:
    """Make an entry of timm; ``small`` has the options of the thin version, or another name."""
    full = partial(build_network, f"timm/{name}", classes, in_channels=shape[0])

    def thin() -> nn.Module:
        import timm

        options = {"model_name": name, "num_classes": classes, "in_chans": shape[0]}
        network: nn.Module = timm.create_model(**options | small)
        return network

    return Entry(
        f"timm/{name}{note}", full, thin, shape, small_shape or (shape[0], 32, 32), classes
    )


def _thin_timm_vgg() -> nn.Module:
    from timm.models.vgg import VGG

    network: nn.Module = VGG([8, "M", 8, "M", 16, "M"], num_classes=10, mlp_ratio=1 / 64)
    return network


def _thin_bit() -> nn.Module:
    from timm.layers import GroupNormAct, StdConv2d
    from timm.models.resnetv2 import ResNetV2

    network: nn.Module = ResNetV2(
        [1, 1, 1],
        (16, 32, 32),
        num_classes=10,
        stem_chs=8,
        stem_type="fixed",
        norm_layer=partial(GroupNormAct, num_groups=4),
        conv_layer=StdConv2d,
    )
    return network


_THIN_RESNET = {"layers": (1, 1, 1, 1), "channels": (8, 16, 16, 32)}
_THIN_CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 32)}
_THIN_NF = {"depths": (1, 1, 1, 1), "channels": (16, 16, 32, 32), "stem_chs": 8}

_TIMM = [
    _timm("resnet18", _THIN_RESNET),
    _timm(
        "resnet18",
        _THIN_RESNET,
        ", gray, not square",
        classes=2,
        shape=(1, 48, 80),
        small_shape=(1, 24, 40),
    ),
    _timm("resnext50_32x4d", _THIN_RESNET | {"cardinality": 4, "base_width": 16}),
    replace(_timm("vgg11", {}), small=_thin_timm_vgg),
    _timm("densenet121", {"growth_rate": 8, "block_config": (2, 2, 2, 2)}),
    _timm("mobilenetv2_100", {"model_name": "mobilenetv2_035"}),
    _timm("mobilenetv3_small_100", {"model_name": "mobilenetv3_small_050"}),
    _timm("efficientnet_b0", {"model_name": "test_efficientnet"}),
    _timm(
        "efficientnet_b0",
        {"model_name": "test_efficientnet"},
        ", 4 channels, not square",
        classes=1000,
        shape=(4, 80, 48),
        small_shape=(4, 40, 24),
    ),
    _timm("convnext_tiny", _THIN_CONVNEXT),
    _timm("regnety_004", {"model_name": "regnety_002"}),
    _timm("mnasnet_100", {"model_name": "mnasnet_small"}),
    _timm("inception_v3", {}, shape=(3, 96, 96), small_shape=(3, 75, 75)),
    _timm("nfnet_l0", {"model_name": "test_nfnet"}),
    _timm("nf_resnet50", _THIN_NF),
    replace(_timm("resnetv2_50x1_bit", {}), small=_thin_bit),
]


def _transformers(name: str, full: dict[str, Any], thin: dict[str, Any], **options: Any) -> Entry:
    """Make an entry of transformers from the options of a configuration; nothing is loaded."""

    def build(sizes: dict[str, Any]) -> nn.Module:
        from transformers import AutoConfig, AutoModelForImageClassification

        config = AutoConfig.for_model(name, **sizes, **options)
        network: nn.Module = AutoModelForImageClassification.from_config(config)
        return network

    shape = (options.get("num_channels", 3), 64, 64)
    return Entry(
        f"transformers/{name}",
        partial(build, full),
        partial(build, thin),
        shape,
        (shape[0], 32, 32),
        options["num_labels"],
    )


_TRANSFORMERS = [
    _transformers(
        "resnet",
        {},
        {"embedding_size": 8, "hidden_sizes": [8, 16, 16], "depths": [1, 1, 1]},
        num_labels=10,
    ),
    _transformers(
        "convnext",
        {},
        {"hidden_sizes": [8, 16, 16], "depths": [1, 1, 1], "num_stages": 3},
        num_labels=100,
        num_channels=4,
    ),
]


def _wrapped(name: str, wrap: Callable[[Tensor], Any]) -> Entry:
    sizes = (3, 32, 32), (3, 16, 16)
    return Entry(name, partial(Wrapped, wrap, 16), partial(Wrapped, wrap, 2), *sizes, 10)


_WRAPPED = [
    _wrapped("cifar_resnet18, a dict", lambda logits: {"logits": logits, "features": None}),
    _wrapped("cifar_resnet18, a tuple", lambda logits: (logits, None)),
    _wrapped("cifar_resnet18, a dataclass", Output),
]

MATRIX: dict[str, Entry] = {
    entry.name: entry for entry in [*_TORCHVISION, *_TIMM, *_TRANSFORMERS, *_WRAPPED]
}

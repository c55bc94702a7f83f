"""The architectures of the population: small networks for images of 32 or 64 pixels.

Each builder gets a width and the stride of the first convolution, 1 for images of 32 pixels and 2
for 64, so that what follows works on the same sizes. Images have three channels, and there are ten
classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.densenet import DenseNet
from torchvision.models.efficientnet import EfficientNet, MBConvConfig
from torchvision.models.googlenet import Inception
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.models.squeezenet import Fire
from torchvision.models.vgg import make_layers
from torchvision.ops import Conv2dNormActivation

from lightning_mnp.models import cifar_resnet18

__all__ = ["ARCHITECTURES", "CLASSES", "Architecture", "build"]

CLASSES = 10


@dataclass(frozen=True)
class Architecture:
    """How one architecture is built and trained.

    Attributes:
        make: Builds it from a width and the stride of the first convolution.
        width: The usual width; what it counts is up to the architecture.
        rate: Images per second, forward and backward, at this width and 32 pixels, measured by
            ``python -m benchmarks.population rates`` on one slow core without bf16.
        optimizer: What it is trained with if a recipe does not say otherwise.
        sgd: Highest learning rate of SGD.
        adam: Highest learning rate of AdamW.
    """

    make: Callable[[int, int], nn.Module]
    width: int
    rate: int
    optimizer: Literal["sgd", "adam"]
    sgd: float = 0.1
    adam: float = 4e-3


def build(name: str, width: int | None = None, size: int = 32) -> nn.Module:
    """Build a network with fresh weights.

    Args:
        name: One of :data:`ARCHITECTURES`.
        width: Its width; the usual one if None.
        size: Side of the images, 32 or 64 pixels.

    Returns:
        A network from images of shape (N, 3, size, size) to logits of shape (N, 10).

    Raises:
        ValueError: If the name is not known or the size is another one.

    Example:
        >>> import torch
        >>> build("lenet")(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    if name not in ARCHITECTURES:
        raise ValueError(
            f"Expected argument `name` to be one of {sorted(ARCHITECTURES)}, but got {name!r}."
        )
    if size not in (32, 64):
        raise ValueError(f"Expected argument `size` to be 32 or 64 pixels, but got {size}.")
    entry = ARCHITECTURES[name]
    return entry.make(entry.width if width is None else width, size // 32)


def _first_convolution(network: nn.Module) -> tuple[str, nn.Conv2d]:
    return next((n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d))


def _with_stem(network: nn.Module, stride: int) -> nn.Module:
    """Exchange the first convolution, made for large images, for a 3x3 one of this stride."""
    name, large = _first_convolution(network)
    small = nn.Conv2d(3, large.out_channels, 3, stride, padding=1, bias=large.bias is not None)
    network.set_submodule(name, small)
    return network


def _cnn(width: int, stride: int, normalized: bool = True) -> nn.Module:
    """Three convolutions, each followed by pooling; with or without batch normalization."""
    layers: list[nn.Module] = []
    channels = 3
    for block in range(3):
        wider = width * 2**block
        layers.append(nn.Conv2d(channels, wider, 3, stride if block == 0 else 1, padding=1))
        layers += [nn.BatchNorm2d(wider)] if normalized else []
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
        channels = wider
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten()).append(
        nn.Linear(4 * channels, CLASSES)
    )


def _lenet(width: int, stride: int) -> nn.Module:
    """LeNet (LeCun et al., 1998) with ReLU and maximum pooling."""
    maps = 8 * width // 3
    return nn.Sequential(
        *(nn.Conv2d(3, width, 5, stride, padding=0 if stride == 1 else 2), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Conv2d(width, maps, 5), nn.ReLU(), nn.AdaptiveMaxPool2d(5)),
        *(nn.Flatten(), nn.Linear(25 * maps, 120), nn.ReLU()),
        *(nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, CLASSES)),
    )


def _vgg(width: int, stride: int) -> nn.Module:
    """Six convolutions between poolings, with batch normalization, and a hidden linear layer."""
    w = width
    features = make_layers([w, "M", 2 * w, "M", 4 * w, 4 * w, "M", 8 * w, 8 * w, "M"], True)
    network = nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network.append(nn.Linear(8 * w, 8 * w)).append(nn.ReLU()).append(nn.Linear(8 * w, CLASSES))
    return _with_stem(network, stride)


def _resnet(width: int, stride: int) -> nn.Module:
    """The project's ResNet-18 for small images."""
    return _with_stem(cifar_resnet18(CLASSES, width), stride)


class _PreactivationBlock(nn.Module):
    """A residual block whose normalization and ReLU come in front of each convolution."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        ready = F.relu(self.bn1(x))
        skipped = x if isinstance(self.shortcut, nn.Identity) else self.shortcut(ready)
        added: Tensor = self.conv2(F.relu(self.bn2(self.conv1(ready))))
        return skipped + added


def _preactivation(first: int, stages: Sequence[tuple[int, int]], stride: int) -> nn.Module:
    """A pre-activation ResNet (He et al., 2016b) of stages (channels, blocks)."""
    layers: list[nn.Module] = [nn.Conv2d(3, first, 3, stride, padding=1, bias=False)]
    channels = first
    for stage, (wider, blocks) in enumerate(stages):
        for block in range(blocks):
            step = 2 if stage > 0 and block == 0 else 1
            layers.append(_PreactivationBlock(channels, wider, step))
            channels = wider
    layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(channels, CLASSES))


def _preact_resnet(width: int, stride: int) -> nn.Module:
    stages = [(width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 1)]
    return _preactivation(width, stages, stride)


def _wide_resnet(width: int, stride: int) -> nn.Module:
    """A wide ResNet of depth 10 (Zagoruyko and Komodakis, 2016): three stages of one block."""
    return _preactivation(8, [(width, 1), (2 * width, 1), (4 * width, 1)], stride)


def _densenet(width: int, stride: int) -> nn.Module:
    """Torchvision's DenseNet; the width is the growth rate."""
    network: nn.Module = DenseNet(width, (3, 4, 4), 2 * width, bn_size=2, num_classes=CLASSES)
    return _with_stem(network, stride)


def _mobilenet_v2(width: int, stride: int) -> nn.Module:
    """Torchvision's MobileNetV2; at its end, 8 channels for each of the width, not 1,280."""
    setting = [[1, 16, 1, 1], [4, 32, 1, 2], [4, 64, 2, 2], [4, 128, 1, 2]]
    network: Any = models.MobileNetV2(CLASSES, width / 32, setting, round_nearest=4, dropout=0.0)
    network.features[-1] = Conv2dNormActivation(
        4 * width, 8 * width, kernel_size=1, activation_layer=nn.ReLU6
    )
    network.classifier[-1] = nn.Linear(8 * width, CLASSES)
    return _with_stem(network, stride)


def _mobilenet_v3(width: int, stride: int) -> nn.Module:
    """Torchvision's MobileNetV3 with squeeze-and-excitation and hard swish."""
    w = width
    block = partial(InvertedResidualConfig, dilation=1, width_mult=1.0)
    setting = [
        block(w, 3, w, w, True, "RE", 2),
        block(w, 3, 3 * w, 2 * w, False, "RE", 2),
        block(2 * w, 5, 6 * w, 2 * w, True, "HS", 1),
        block(2 * w, 5, 6 * w, 4 * w, True, "HS", 2),
    ]
    network: nn.Module = models.MobileNetV3(setting, 8 * w, num_classes=CLASSES, dropout=0.0)
    return _with_stem(network, stride)


def _shufflenet(width: int, stride: int) -> nn.Module:
    """Torchvision's ShuffleNetV2."""
    channels = [width, 2 * width, 4 * width, 8 * width, 8 * width]
    network: nn.Module = models.ShuffleNetV2([2, 2, 2], channels, num_classes=CLASSES)
    return _with_stem(network, stride)


def _efficientnet(width: int, stride: int) -> nn.Module:
    """Torchvision's EfficientNet with squeeze-and-excitation and SiLU."""
    w = width
    blocks = [
        MBConvConfig(1, 3, 2, w, w, 1, 1.0, 1.0),
        MBConvConfig(4, 3, 2, w, 2 * w, 1, 1.0, 1.0),
        MBConvConfig(4, 5, 1, 2 * w, 4 * w, 1, 1.0, 1.0),
        MBConvConfig(4, 3, 2, 4 * w, 6 * w, 1, 1.0, 1.0),
    ]
    network: nn.Module = EfficientNet(
        blocks, dropout=0.0, stochastic_depth_prob=0.0, num_classes=CLASSES
    )
    return _with_stem(network, stride)


def _convnext(width: int, stride: int) -> nn.Module:
    """Torchvision's ConvNeXt blocks behind a stem of 2x2 patches, or 4x4 for 64 pixels."""
    w = width
    stages = [
        CNBlockConfig(w, 2 * w, 1),
        CNBlockConfig(2 * w, 4 * w, 2),
        CNBlockConfig(4 * w, None, 1),
    ]
    # A layer scale of 1e-6, the usual one, is for trainings of hundreds of epochs.
    network: nn.Module = models.ConvNeXt(stages, layer_scale=0.1, num_classes=CLASSES)
    name, large = _first_convolution(network)
    network.set_submodule(name, nn.Conv2d(3, large.out_channels, 2 * stride, 2 * stride))
    return network


def _regnet(width: int, stride: int) -> nn.Module:
    """Torchvision's RegNetY: grouped convolutions and squeeze-and-excitation."""
    blocks = BlockParams.from_init_params(
        depth=5, w_0=width, w_a=float(width), w_m=2.0, group_width=8, se_ratio=0.25
    )
    network: nn.Module = RegNet(blocks, num_classes=CLASSES, stem_width=width)
    return _with_stem(network, stride)


def _norm_free(width: int, stride: int) -> nn.Module:
    """Timm's norm-free ResNet: standardized weights and scaled residuals, no normalization."""
    import timm

    network: nn.Module = timm.create_model(
        "nf_resnet50",
        num_classes=CLASSES,
        depths=(1, 1, 1, 1),
        channels=(2 * width, 4 * width, 8 * width, 16 * width),
        stem_chs=width,
        stem_type="3x3",
    )
    _first_convolution(network)[1].stride = (stride, stride)
    return network


def _timm_resnet(width: int, stride: int) -> nn.Module:
    """Timm's ResNet with a deep stem and average pooling in the shortcuts (ResNet-D)."""
    from timm.models.resnet import BasicBlock, ResNet

    network: nn.Module = ResNet(
        BasicBlock,
        (1, 1, 1, 1),
        num_classes=CLASSES,
        channels=(width, 2 * width, 4 * width, 8 * width),
        stem_type="deep",
        stem_width=width,
        avg_down=True,
    )
    return _with_stem(network, stride)


def _resnext(width: int, stride: int) -> nn.Module:
    """Timm's ResNeXt: bottlenecks whose middle convolution has four groups."""
    from timm.models.resnet import Bottleneck, ResNet

    network: nn.Module = ResNet(
        Bottleneck,
        (1, 1, 1, 1),
        num_classes=CLASSES,
        channels=(width, 2 * width, 4 * width, 8 * width),
        cardinality=4,
        base_width=32,
    )
    return _with_stem(network, stride)


def _squeezenet(width: int, stride: int) -> nn.Module:
    """Torchvision's fire modules of SqueezeNet, without normalization, and a linear layer."""
    w = width
    return nn.Sequential(
        *(nn.Conv2d(3, 2 * w, 3, stride, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(Fire(2 * w, w, 2 * w, 2 * w), Fire(4 * w, w, 2 * w, 2 * w), nn.MaxPool2d(2)),
        *(Fire(4 * w, 2 * w, 4 * w, 4 * w), Fire(8 * w, 2 * w, 4 * w, 4 * w)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * w, CLASSES)),
    )


def _inception(width: int, stride: int) -> nn.Module:
    """Torchvision's inception modules of GoogLeNet, with batch normalization."""

    def module(before: int, after: int) -> nn.Module:
        part = after // 4
        inception: nn.Module = Inception(before, part, part // 2, part, part // 2, part, part)
        return inception

    w = width
    return nn.Sequential(
        *(nn.Conv2d(3, w, 3, stride, padding=1), nn.BatchNorm2d(w), nn.ReLU(), nn.MaxPool2d(2)),
        *(module(w, 2 * w), module(2 * w, 4 * w), nn.MaxPool2d(2)),
        *(module(4 * w, 8 * w), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    ).append(nn.Linear(8 * w, CLASSES))


def _all_convolutional(width: int, stride: int) -> nn.Module:
    """Convolutions with strides in place of pooling (Springenberg et al., 2015), and leaky ReLU."""
    layers: list[nn.Module] = []
    channels = 3
    for after, step in ((1, stride), (2, 2), (2, 1), (4, 2), (4, 1)):
        layers.append(nn.Conv2d(channels, after * width, 3, step, padding=1, bias=False))
        channels = after * width
        layers += [nn.BatchNorm2d(channels), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).append(
        nn.Linear(channels, CLASSES)
    )


ARCHITECTURES: dict[str, Architecture] = {
    "cnn": Architecture(_cnn, 16, 1934, "adam"),
    "plain-cnn": Architecture(partial(_cnn, normalized=False), 16, 2556, "adam", 0.02, 2e-3),
    "lenet": Architecture(_lenet, 6, 5915, "adam", 0.02, 2e-3),
    "vgg": Architecture(_vgg, 16, 1172, "sgd"),
    "resnet": Architecture(_resnet, 8, 626, "sgd"),
    "preact-resnet": Architecture(_preact_resnet, 8, 847, "sgd"),
    "wide-resnet": Architecture(_wide_resnet, 16, 686, "sgd"),
    "densenet": Architecture(_densenet, 12, 555, "sgd"),
    "mobilenet-v2": Architecture(_mobilenet_v2, 16, 621, "sgd"),
    "mobilenet-v3": Architecture(_mobilenet_v3, 16, 909, "adam"),
    "shufflenet": Architecture(_shufflenet, 24, 725, "sgd"),
    "efficientnet": Architecture(_efficientnet, 12, 544, "adam"),
    "convnext": Architecture(_convnext, 24, 699, "adam"),
    "regnet": Architecture(_regnet, 16, 931, "sgd"),
    "norm-free": Architecture(_norm_free, 12, 1256, "adam", 0.05, 2e-3),
    "timm-resnet": Architecture(_timm_resnet, 8, 804, "sgd"),
    "resnext": Architecture(_resnext, 8, 600, "sgd"),
    "squeezenet": Architecture(_squeezenet, 12, 1150, "adam", 0.02, 2e-3),
    "inception": Architecture(_inception, 16, 800, "sgd"),
    "all-conv": Architecture(_all_convolutional, 12, 1250, "sgd"),
}

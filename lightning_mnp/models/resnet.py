"""ResNets for small images, with the channel count of the first stage as an option."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CifarResNet", "cifar_resnet18", "cifar_resnet34"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut around them (He et al., 2016, Fig. 2)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(hidden)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """A ResNet with a 3x3 stem and no pooling in front, for images of 8 to 64 pixels.

    Args:
        blocks: Number of residual blocks in each of the four stages.
        num_classes: Number of outputs, at least 2.
        width: Channels of the first stage; the stages have 1, 2, 4 and 8 times as many. The
            paper's networks have 64, which gives a ResNet-18 of 4,800 filters.
        in_channels: Channels of the input images.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> import torch
        >>> network = CifarResNet([1, 1, 1, 1], num_classes=10, width=4)
        >>> network(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        blocks: Sequence[int],
        num_classes: int = 10,
        width: int = 64,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if len(blocks) != 4 or min(blocks) < 1:
            raise ValueError(
                f"Expected argument `blocks` to be four positive numbers, but got {list(blocks)}."
            )
        for name, value, least in (
            ("num_classes", num_classes, 2),
            ("width", width, 1),
            ("in_channels", in_channels, 1),
        ):
            if value < least:
                raise ValueError(
                    f"Expected argument `{name}` to be at least {least}, but got {value}."
                )
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels = width
        stages = []
        for stage, depth in enumerate(blocks):
            layers = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                layers.append(BasicBlock(channels, width * 2**stage, stride))
                channels = width * 2**stage
            stages.append(nn.Sequential(*layers))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits.

        Args:
            x: Images, shape (N, C, H, W).

        Returns:
            Shape (N, K).
        """
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def cifar_resnet18(num_classes: int = 10, width: int = 64, in_channels: int = 3) -> CifarResNet:
    """Build a ResNet-18 for small images.

    Args:
        num_classes: Number of outputs, at least 2.
        width: Channels of the first stage, see :class:`CifarResNet`.
        in_channels: Channels of the input images.

    Returns:
        The network with fresh weights.

    Example:
        >>> sum(p.numel() for p in cifar_resnet18().parameters())
        11173962
    """
    return CifarResNet([2, 2, 2, 2], num_classes, width, in_channels)


def cifar_resnet34(num_classes: int = 10, width: int = 64, in_channels: int = 3) -> CifarResNet:
    """Build a ResNet-34 for small images.

    Args:
        num_classes: Number of outputs, at least 2.
        width: Channels of the first stage, see :class:`CifarResNet`.
        in_channels: Channels of the input images.

    Returns:
        The network with fresh weights.

    Example:
        >>> sum(p.numel() for p in cifar_resnet34().parameters())
        21282122
    """
    return CifarResNet([3, 4, 6, 3], num_classes, width, in_channels)

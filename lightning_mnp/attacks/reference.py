"""A clean network that some attacks need to make their trigger or their images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_mnp.checkpoints.load import load_into
from lightning_mnp.checkpoints.read import read_state_dict
from lightning_mnp.models.build import build_network

__all__ = ["ReferenceNetwork"]


class ReferenceNetwork:
    """A trained classifier in a checkpoint, which takes images as they are stored.

    Args:
        checkpoint: File with the weights: .ckpt, .pt, .pth or .safetensors. Nothing else is read
            from it.
        architecture: See :func:`~lightning_mnp.models.classifier.build_network`.
        num_classes: See :func:`~lightning_mnp.models.classifier.build_network`.
        width: See :func:`~lightning_mnp.models.classifier.build_network`.
        in_channels: See :func:`~lightning_mnp.models.classifier.build_network`.
        mean: Mean of each channel that the network was trained with, on the scale [0, 1].
        std: Standard deviation of each channel, on the scale [0, 1].

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        checkpoint: Path | str,
        architecture: str = "cifar_resnet18",
        num_classes: int = 10,
        width: int = 64,
        in_channels: int = 3,
        mean: Sequence[float] = (0.4914, 0.4822, 0.4465),
        std: Sequence[float] = (0.2470, 0.2435, 0.2616),
    ) -> None:
        if len(mean) != len(std) or not len(std) or min(std) <= 0:
            raise ValueError(
                "Expected arguments `mean` and `std` to have one number for each channel, `std` "
                f"above 0, but got {tuple(mean)} and {tuple(std)}."
            )
        self.checkpoint = Path(checkpoint).expanduser()
        self.architecture = architecture
        self.num_classes = num_classes
        self.width = width
        self.in_channels = in_channels
        self.mean = tuple(mean)
        self.std = tuple(std)

    def load(self) -> nn.Sequential:
        """Read the network.

        Returns:
            Normalization, as ``[0]``, and the network, as ``[1]``. It takes images with values in
            [0, 1] and returns logits. It is in evaluation mode, and its weights have no gradients.

        Raises:
            CheckpointError: If the file is missing, damaged, or has other weights.
        """
        network = build_network(self.architecture, self.num_classes, self.width, self.in_channels)
        load_into(network, read_state_dict(self.checkpoint))
        return nn.Sequential(_Normalize(self.mean, self.std), network).eval().requires_grad_(False)

    def __repr__(self) -> str:
        return f"ReferenceNetwork({str(self.checkpoint)!r}, {self.architecture!r})"


class _Normalize(nn.Module):
    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std

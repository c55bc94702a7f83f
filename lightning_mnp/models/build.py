"""Networks by name: thin ResNets of our own, those of torchvision and those of timm."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torchvision
from torch import nn

from lightning_mnp.models.resnet import cifar_resnet18, cifar_resnet34

__all__ = ["build_network"]

_CIFAR = {"cifar_resnet18": cifar_resnet18, "cifar_resnet34": cifar_resnet34}

# In training, their auxiliary heads would give more than logits.
_AUXILIARY = {"googlenet", "inception_v3"}


def build_network(
    architecture: str, num_classes: int = 10, width: int = 64, in_channels: int = 3
) -> nn.Module:
    """Build a network by name, with fresh weights.

    Args:
        architecture: ``"cifar_resnet18"``, ``"cifar_resnet34"``, the name of a classification
            network of torchvision, such as ``"resnet34"``, or that of a network of timm after
            ``"timm/"``, such as ``"timm/nfnet_l0"``.
        num_classes: Number of outputs, at least 2.
        width: Channels of the first stage, for the CIFAR networks only.
        in_channels: Channels of the input images, for the CIFAR networks and those of timm.

    Returns:
        The network; googlenet and inception_v3 come without their auxiliary heads.

    Raises:
        ValueError: If the name is not known, a number is out of range, or ``width`` or
            ``in_channels`` is set for a network that does not have it.
        ImportError: If timm is asked for and not installed.

    Example:
        >>> build_network("cifar_resnet18", width=16).fc
        Linear(in_features=128, out_features=10, bias=True)
    """
    if num_classes < 2:
        raise ValueError(
            f"Expected argument `num_classes` to be at least 2, but got {num_classes}."
        )
    if architecture in _CIFAR:
        return _CIFAR[architecture](num_classes, width, in_channels)
    if architecture.startswith("timm/"):
        return _build_timm(architecture, num_classes, width, in_channels)
    known = torchvision.models.list_models(module=torchvision.models)
    if architecture not in known:
        raise ValueError(
            f"Expected argument `architecture` to be one of {sorted(_CIFAR)}, of torchvision's "
            f"classification networks, such as 'resnet34', or of timm's, such as "
            f"'timm/nfnet_l0', but got {architecture!r}.{_similar(architecture, known)} Any other "
            "network can be given as `network`."
        )
    if width != 64 or in_channels != 3:
        raise ValueError(
            f"Expected arguments `width` and `in_channels` to stay 64 and 3 for torchvision's "
            f"{architecture!r}, but got {width} and {in_channels}."
        )
    options = {"aux_logits": False, "init_weights": True} if architecture in _AUXILIARY else {}
    network: nn.Module = torchvision.models.get_model(
        architecture, weights=None, num_classes=num_classes, **options
    )
    return network


def _build_timm(architecture: str, num_classes: int, width: int, in_channels: int) -> nn.Module:
    if width != 64:
        raise ValueError(
            f"Expected argument `width` to stay 64 for timm's {architecture!r}, but got {width}."
        )
    if in_channels < 1:
        raise ValueError(
            f"Expected argument `in_channels` to be at least 1, but got {in_channels}."
        )
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            f"Argument `architecture` = {architecture!r} needs the package timm, which is not "
            "installed: pip install 'lightning-mnp[timm]'"
        ) from error
    name = architecture.removeprefix("timm/")
    known = timm.list_models()
    if name not in known:
        raise ValueError(
            f"Expected argument `architecture` to name a network of timm {timm.__version__} after "
            f"'timm/', but got {architecture!r}.{_similar(name, known, 'timm/')}"
        )
    network: nn.Module = timm.create_model(
        name, pretrained=False, num_classes=num_classes, in_chans=in_channels
    )
    return network


def _similar(name: str, known: Sequence[str], prefix: str = "") -> str:
    matches = [repr(prefix + match) for match in difflib.get_close_matches(name, known)]
    return f" Similar names: {', '.join(matches)}." if matches else ""

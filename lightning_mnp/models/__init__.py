"""Networks and a plain classifier to train them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_mnp.models.build import build_network
    from lightning_mnp.models.classifier import Classifier
    from lightning_mnp.models.resnet import CifarResNet, cifar_resnet18, cifar_resnet34

# Names are imported when they are first used: networks need no Lightning, the classifier does.
_HOMES = {
    "CifarResNet": "resnet",
    "Classifier": "classifier",
    "build_network": "build",
    "cifar_resnet18": "resnet",
    "cifar_resnet34": "resnet",
}

__all__ = ["CifarResNet", "Classifier", "build_network", "cifar_resnet18", "cifar_resnet34"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

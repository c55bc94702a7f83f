"""Networks and a plain classifier to train them."""

from lightning_mnp.models.classifier import Classifier, build_network
from lightning_mnp.models.resnet import CifarResNet, cifar_resnet18, cifar_resnet34

__all__ = ["CifarResNet", "Classifier", "build_network", "cifar_resnet18", "cifar_resnet34"]

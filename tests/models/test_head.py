from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_mnp.models import build_network
from lightning_mnp.models.head import classifier_head, penultimate_features


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 2)
        self.spare = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x.flatten(1))


@pytest.mark.parametrize(
    ("architecture", "name"),
    [("cifar_resnet18", "fc"), ("resnet34", "fc"), ("mobilenet_v3_small", "classifier.3")],
)
def test_the_head_is_the_last_linear_layer(architecture: str, name: str) -> None:
    network = build_network(architecture, 7)
    assert classifier_head(network) is network.get_submodule(name)
    assert classifier_head(network).out_features == 7


def test_features_give_the_logits_and_have_gradients() -> None:
    network = build_network("cifar_resnet18", 3, width=2).eval()
    images = torch.rand(2, 3, 8, 8, requires_grad=True)
    features = penultimate_features(network, images)
    torch.testing.assert_close(classifier_head(network)(features), network(images))
    features.sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert not classifier_head(network)._forward_pre_hooks


def test_errors_leave_no_hook() -> None:
    with pytest.raises(ValueError, match=r"to end with a linear layer, .* Conv2d has none"):
        classifier_head(nn.Conv2d(3, 4, 1))
    network = Unused()
    with pytest.raises(ValueError, match="to use its last linear layer, but Unused does not"):
        penultimate_features(network, torch.zeros(1, 4))
    with pytest.raises(RuntimeError):
        penultimate_features(network, torch.zeros(1, 5))
    assert not network.spare._forward_pre_hooks

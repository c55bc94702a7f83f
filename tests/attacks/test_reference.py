from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_mnp.attacks import ReferenceNetwork
from lightning_mnp.checkpoints.inspection import CheckpointError
from lightning_mnp.checkpoints.write import write_state_dict
from lightning_mnp.models import cifar_resnet18


def test_it_takes_stored_images_and_is_fixed(tmp_path: Path) -> None:
    network = cifar_resnet18(4, 4)
    path = tmp_path / "clean.safetensors"
    write_state_dict(path, network.state_dict())
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)

    reference = ReferenceNetwork(path, num_classes=4, width=4, mean=mean, std=std).load()

    images = torch.rand(2, 3, 8, 8)
    shape = (1, 3, 1, 1)
    normalized = (images - torch.tensor(mean).reshape(shape)) / torch.tensor(std).reshape(shape)
    torch.testing.assert_close(reference(images), network.eval()(normalized))
    assert not reference.training
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert reference[1].fc.out_features == 4


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`mean` and `std` to have one number for each channel"):
        ReferenceNetwork(tmp_path, mean=(0.5,))
    with pytest.raises(CheckpointError, match="existing file"):
        ReferenceNetwork(tmp_path / "no.ckpt").load()
    write_state_dict(tmp_path / "other.pt", cifar_resnet18(4, 8).state_dict())
    with pytest.raises(CheckpointError):
        ReferenceNetwork(tmp_path / "other.pt", num_classes=4, width=4).load()
    assert "cifar_resnet18" in repr(ReferenceNetwork("x.pt"))

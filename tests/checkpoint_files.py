"""Checkpoint files, hostile ones among them, and a full disk, for many tests."""

from __future__ import annotations

import argparse
import os
import resource
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def rewrite_member(path: Path, ending: str, change: Callable[[bytes], bytes]) -> None:
    """Change one member of a zip archive and write valid check sums for all of them."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, change(data) if name.endswith(ending) else data)


class RunsCommand:
    """Pickles into a call of os.system that makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.canary}",)


def leave_a_mark(canary: str) -> None:
    """A function that no list of dangerous names knows."""
    Path(canary).touch()


class RunsFunction(RunsCommand):
    """Pickles into a call of a function of these tests that makes a file."""

    def __reduce__(self) -> tuple[object, ...]:
        return leave_a_mark, (str(self.canary),)


def ordinary_checkpoints(weights: dict[str, Tensor]) -> dict[str, Any]:
    """Checkpoints as ordinary training scripts write them, by file name."""
    args = argparse.Namespace(lr=0.1, model="resnet18", img_size=64, mean=[0.4, 0.5, 0.6])
    return {
        "torchvision.pth": {"model": weights, "optimizer": {"state": {}}, "args": args},
        "timm.pth.tar": {"state_dict": weights, "arch": "resnet18", "args": args, "metric": 80.1},
        "imagenet.pth.tar": {"state_dict": weights, "best_acc1": np.float64(76.1), "epoch": 3},
        "lightning.ckpt": {
            "state_dict": {f"net.{name}": tensor for name, tensor in weights.items()},
            "hyper_parameters": {"root": Path("data"), "loss": nn.CrossEntropyLoss()},
            "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        },
        "benchmark.pt": {"model": weights, "bd_train": {"index": np.arange(3)}, "num_classes": 2},
    }


@contextmanager
def no_more_than(size: int) -> Iterator[None]:
    """Let no file grow beyond a size: a real disk that is full, for this process only."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

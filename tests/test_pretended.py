"""The tests for GPUs pass on a device that pretends to be one; and mistakes show on it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pretended
import pytest
import torch

pytestmark = pytest.mark.skipif(
    not pretended.possible(),
    reason=f"needs devices made in Python; torch {torch.__version__} has none",
)

TESTS = Path(__file__).parent
# A process of its own: the device stays known until its end.
MISTAKES = f"""
import torch
import pretended

pretended.register()
here = torch.device("{pretended.NAME}", 0)


def error(call):
    try:
        call()
    except (RuntimeError, TypeError) as found:
        return str(found)
    return "none"


images, network = torch.rand(2, 3, 8, 8), torch.nn.Conv2d(3, 4, 3).to(here)
assert "two devices" in error(lambda: network(images))
assert "two devices" in error(lambda: network(images.to(here)) + torch.ones(6))
assert "convert" in error(images.to(here).numpy)
assert "two devices" in error(lambda: torch.cat([images, images.to(here)]))

# What a GPU takes, it takes: single numbers, and indices.
assert network(images.to(here)).add(torch.tensor(1.0)).device == here
kept = images.to(here)[torch.tensor([1])]
assert kept.device == here and kept.cpu().equal(images[1:])
assert images.to(here)[[1]].cpu().equal(images[1:])
assert images.to(here).tolist() == images.tolist()
assert torch.zeros(3, device=here).new_tensor([2.0]).device == here
expected = torch.nn.functional.conv2d(images, network.weight.cpu(), network.bias.cpu())
assert network(images.to(here)).cpu().equal(expected)
network(images.to(here)).sum().backward()
assert network.weight.grad.device == here
print("all found")
"""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        timeout=550,
    )


def test_mistakes_show() -> None:
    found = run("-c", MISTAKES)
    assert (found.returncode, found.stdout) == (0, "all found\n"), found.stderr


def test_the_tests_for_gpus_pass() -> None:
    found = run(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_cuda.py"),
        LIGHTNING_MNP_CUDA_TESTS=pretended.NAME,
    )
    assert found.returncode == 0, found.stdout[-8000:]
    passed = re.search(r"(\d+) passed, 3 skipped", found.stdout)
    assert passed is not None, found.stdout[-2000:]
    assert int(passed[1]) >= 45

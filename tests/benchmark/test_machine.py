from __future__ import annotations

import copy
import json
import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_mnp.benchmark import machine as module
from lightning_mnp.benchmark.machine import Meter, describe_machine


def test_a_machine_is_described_by_primitives() -> None:
    told = describe_machine("cpu")
    assert json.loads(json.dumps(told)) == told
    assert told["threads"] == torch.get_num_threads()
    assert told["name"]
    assert set(told["versions"]) == {"python", "lightning-mnp", "torch", "torchvision", "lightning"}


def test_a_machine_without_a_list_of_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Path", lambda path: Path("/nowhere"))
    assert module.processor_name()


def test_passes_of_the_network_and_its_copies_are_counted() -> None:
    network, images = nn.Sequential(nn.Linear(2, 3), nn.ReLU()), torch.zeros(6, 2)
    network(images)
    with Meter(network, "cpu") as meter:
        network(images)
        changed = copy.deepcopy(network)
        with torch.no_grad():
            changed(images)
            changed(images[:3])
        network[0](images)  # a part is no pass
        network.requires_grad_(False)
        network(images)
    assert meter.passes == pytest.approx(6 + (6 + 3 + 6) / 3)
    changed(images)
    network(images)
    assert meter.passes == pytest.approx(11)
    assert not network._forward_hooks


def test_outputs_that_are_no_tensor_count_as_forward_alone() -> None:
    class Pair(nn.Module):
        def forward(self, *, images: Any = None) -> tuple[Any, Any]:
            return images, images

    with Meter(Pair(), "cpu") as meter:
        meter.network(images=torch.zeros(2, 2))
    assert meter.passes == 0


def filled(mib: int) -> mmap.mmap:
    """Memory of its own: what an allocator has kept would not count as more."""
    memory = mmap.mmap(-1, mib * 2**20)
    for at in range(0, len(memory), mmap.PAGESIZE):
        memory[at] = 1
    return memory


@pytest.mark.skipif(not module._forget_peak(), reason="this system does not tell the peak memory")
def test_the_peak_is_that_of_the_context() -> None:
    filled(64).close()  # gone before the context
    with Meter(nn.Linear(2, 2), "cpu") as meter:
        held = filled(32)
    assert meter.peak_mib is not None
    assert meter.start_mib is not None
    assert len(held) / 2**20 * 0.9 < meter.peak_mib - meter.start_mib < 60
    assert meter.seconds > 0


def test_a_system_that_does_not_tell_the_peak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PROCESS", tmp_path / "nowhere")
    with Meter(nn.Linear(2, 2), "cpu") as meter:
        pass
    assert (meter.start_mib, meter.peak_mib) == (None, None)

"""The benchmark of mask ranks, on networks that take no time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import images_and_labels, trained_network

from benchmarks import mask_ranks
from lightning_mnp import DefenseSet, MNPConfig, MNPDefense
from lightning_mnp.data import CIFAR10DataModule, MemoryDataset
from lightning_mnp.models import cifar_resnet18


@pytest.mark.usefixtures("short_searches")
def test_the_lowest_ranks_are_what_is_pruned() -> None:
    network, data = trained_network(), DefenseSet(*images_and_labels(60))
    config = MNPConfig.paper(seed=0).changed(
        {"pruning.rule": "count", "pruning.amount": 2, "masks.epochs": 2, "suppression.epochs": 2}
    )
    masks = mask_ranks.masks_of(network, data, config)
    assert len(masks.filters) == len(masks.total) == len(masks.penalty) == len(masks.preserving)
    assert torch.allclose(masks.total, masks.penalty + masks.preserving)  # one run
    defense = MNPDefense(network, data, config, when="always")
    while not defense.finished:
        defense.step()
    pruned = [masks.filters.index(each) for each in defense.report().pruned]
    assert len(pruned) == 2
    assert max(mask_ranks.rank(masks.total, place) for place in pruned) <= 2


def test_filters_that_the_backdoor_needs(tmp_path: Path) -> None:
    file = tmp_path / "changes.csv"
    file.write_text("layer,filter,CLC,BLC\nconv1,0,0.5,0.02\nconv1,1,0.1,0.01\nconv2,7,-0.1,3\n")
    found = mask_ranks.needed_filters(file, 0.01)
    assert list(found.items()) == [(("conv2", 7), 3.0), (("conv1", 0), 0.02)]


@pytest.mark.usefixtures("short_searches")
def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    pixels = torch.randint(0, 256, (600, 3, 32, 32), dtype=torch.uint8)
    images = MemoryDataset(pixels, torch.arange(600) % 10)
    monkeypatch.setattr(CIFAR10DataModule, "load", lambda *_: images)
    made = mask_ranks.Masks([("conv1", 0), ("conv1", 1)], *torch.tensor([[0.5, 0.0]] * 3))
    monkeypatch.setattr(mask_ranks, "masks_of", lambda *_: made)
    torch.save(cifar_resnet18(10, 2).state_dict(), tmp_path / "last.ckpt")
    (tmp_path / "changes.csv").write_text("layer,filter,BLC\nconv1,0,0.5\n")
    options = ["--network", str(tmp_path), "--changes", str(tmp_path / "changes.csv")]
    assert mask_ranks.main([*options, "--data", str(tmp_path), "--settings", "paper"]) == 0
    torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| paper | conv1/0 | 0.500 | 0.50 | 0.50 | 2 | 2 |"
    assert lines[4] == "There are 2 filters; rank 1 is pruned first."

"""The benchmark of costs, on networks that take no time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import images_and_labels, trained_network

from benchmarks import cost
from lightning_mnp import DefenseSet
from lightning_mnp.data import CIFAR10DataModule, MemoryDataset
from lightning_mnp.models import cifar_resnet18


@pytest.mark.usefixtures("short_searches")
def test_an_audit_against_rnp() -> None:
    found = cost.compare(trained_network(), DefenseSet(*images_and_labels(60)), repeats=1)
    assert len(found["rnp"]) == len(found["audit"]) == 1
    assert found["ratio"] > 0
    assert found["passes"] > 0
    assert found["verdict"] in ("clean", "backdoored", "undecided")


@pytest.mark.usefixtures("short_searches")
def test_all_classes_are_screened_and_twenty_searched() -> None:
    report = cost.large_audit(24, 48)
    assert report.passes["screening"] > 0
    assert {len(each.classes) for each in report.signals if each.name == "patch"} == {20}
    assert cost.large_audit(24, 48).passes == report.passes


def test_the_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Small(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(3, 1000)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.linear(x.mean((2, 3)))
            return logits

    threads = torch.get_num_threads()
    monkeypatch.setattr(cost, "resnet50", Small)
    monkeypatch.setattr(
        cost, "large_audit", lambda *_: cost.DefenseReport("clean", passes={"a": 7})
    )
    assert cost.main(["classes"]) == 0
    assert "passes: 7 {'a': 7}\nResNet-50 at 224 px: 0.00 proc" in capsys.readouterr().out

    pixels = torch.randint(0, 256, (600, 3, 32, 32), dtype=torch.uint8)
    images = MemoryDataset(pixels, torch.arange(600) % 10)
    monkeypatch.setattr(CIFAR10DataModule, "load", lambda *_: images)
    monkeypatch.setattr(cost, "compare", lambda network, data, repeats: (len(data), repeats))
    network = cifar_resnet18(10, 2)
    torch.save(network.state_dict(), tmp_path / "a.pt")
    options = ["rnp", "--data", str(tmp_path), "--width", "2", "--images", "30"]
    assert cost.main([*options, "--weights", str(tmp_path / "a.pt")]) == 0
    assert "(30, 3)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cost.main(options)
    assert "--weights: expected the file of a network" in capsys.readouterr().err
    torch.set_num_threads(threads)

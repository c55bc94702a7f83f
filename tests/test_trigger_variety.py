"""The benchmark of how triggers differ, on attacks and networks that take no time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import trigger_variety
from lightning_mnp.attacks import LIRA, BadNets, InputAware
from lightning_mnp.attacks.trigger import save_trigger
from lightning_mnp.data import CIFAR10DataModule, MemoryDataset

PIXELS = torch.randint(60, 200, (40, 3, 32, 32), dtype=torch.uint8)


def test_a_patch_is_the_same_for_all_images() -> None:
    gray = torch.full_like(PIXELS, 90)
    found = trigger_variety.injected(BadNets(), gray)
    assert torch.equal(found["own"], found["another"])
    assert torch.equal(found["own"], found["mean"])
    assert trigger_variety.mean_share(found["own"].float() - 90) == pytest.approx(1)


def test_the_trigger_of_another_image_is_its_mask_and_its_pattern() -> None:
    attack = InputAware(width=4)
    attack.mark_trained()
    found = trigger_variety.injected(attack, PIXELS)
    with torch.no_grad():
        mask, pattern = attack.mask(PIXELS[:1] / 255), attack.pattern(PIXELS[:1] / 255)
    by_hand = 255 * (PIXELS[1] / 255 * (1 - mask) + pattern * mask)
    assert (found["another"][1].float() - by_hand[0]).abs().max() <= 0.51
    assert not torch.equal(found["own"][1], found["another"][1])


def test_the_change_of_another_image_is_added() -> None:
    attack = LIRA(width=4, eps=0.1)
    attack.mark_trained()
    found = trigger_variety.injected(attack, PIXELS)
    by_hand = PIXELS[1].float() + found["own"][0].float() - PIXELS[0].float()
    assert torch.equal(found["another"][1], by_hand.to(torch.uint8))


def test_rates_leave_out_the_target_class() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3, 3, bias=False))
    network[1].weight.data = torch.eye(3)
    inputs = torch.eye(3)[[0, 0, 1, 2]].view(4, 3, 1, 1)
    labels = torch.tensor([0, 1, 1, 1])
    assert trigger_variety.rates(network, inputs, labels, target=0) == pytest.approx((1 / 3, 1 / 3))


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = MemoryDataset(PIXELS, torch.arange(40) % 10)
    monkeypatch.setattr(CIFAR10DataModule, "load", lambda *_: images)
    monkeypatch.setattr(
        trigger_variety,
        "trained_network",
        lambda _: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10)).eval(),
    )
    save_trigger(tmp_path / "trigger.safetensors", BadNets(patch_size=3))
    assert trigger_variety.main(["--network", str(tmp_path), "--images", "20"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"Pixels that the trigger changes: {9 / 1024:.1%}"
    assert [line.split()[:2] for line in told[2:]] == [
        ["Trigger", name] for name in ("own", "another", "mean")
    ]
    trigger = str(tmp_path / "trigger.safetensors")
    assert trigger_variety.main(["--trigger", trigger]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2

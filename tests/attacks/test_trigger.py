from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from lightning_mnp.attacks import (
    Attack,
    BadNets,
    Blend,
    SavedTrigger,
    WaNet,
    load_trigger,
    save_trigger,
)
from lightning_mnp.attacks.trigger import read_poisoned_indices
from lightning_mnp.checkpoints.inspection import CheckpointError


def images() -> torch.Tensor:
    return torch.randint(0, 256, (4, 3, 12, 12), generator=torch.Generator().manual_seed(0)).byte()


@pytest.mark.parametrize(
    "attack",
    [
        BadNets(patch_size=2, pattern="random", seed=5, target_class=3, mode="all-to-all"),
        Blend(ratio=0.3, seed=9, poison_rate=0.01),
        WaNet(strength=0.7, seed=2),
    ],
    ids=lambda attack: type(attack).__name__,
)
def test_a_saved_trigger_does_the_same(tmp_path: Path, attack: Attack) -> None:
    path = tmp_path / "trigger.safetensors"
    save_trigger(path, attack, torch.tensor([3, 5]))

    for loaded in (load_trigger(path), SavedTrigger(path)):
        assert loaded.apply(images()).equal(attack.apply(images()))
        labels = torch.arange(8) % 4
        assert loaded.target_labels(labels, 4).equal(attack.target_labels(labels, 4))
        assert loaded.triggered_indices(labels, 4).equal(attack.triggered_indices(labels, 4))
        assert loaded.poison_labels(labels, 4).equal(attack.poison_labels(labels, 4))
        many = torch.arange(200) % 4
        assert loaded.poison_indices(many, 4).equal(attack.poison_indices(many, 4))
        poisoned = loaded.poison(images(), labels[:4], torch.arange(4))
        assert poisoned.equal(attack.poison(images(), labels[:4], torch.arange(4)))
    assert load_trigger(path).options() == attack.options()
    assert read_poisoned_indices(path).tolist() == [3, 5]


def test_a_saved_trigger_can_be_saved_again(tmp_path: Path) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_trigger(first, WaNet(seed=3))
    save_trigger(second, SavedTrigger(first))
    assert load_trigger(second).apply(images()).equal(WaNet(seed=3).apply(images()))
    assert "SavedTrigger" in repr(SavedTrigger(first))
    assert "WaNet" in repr(SavedTrigger(first))


def test_a_blended_image_is_kept_in_the_file(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(picture)
    attack = Blend(image=picture)
    wanted = attack.apply(images())
    save_trigger(tmp_path / "t.safetensors", attack)
    picture.unlink()
    assert load_trigger(tmp_path / "t.safetensors").apply(images()).equal(wanted)


def test_only_safetensors_are_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"end in '.safetensors', but got .*trigger.pt"):
        save_trigger(tmp_path / "trigger.pt", BadNets())


def write(path: Path, tensors: dict[str, torch.Tensor] | None = None, **metadata: Any) -> Path:
    content: dict[str, Any] = {
        "format": "lightning-mnp trigger 1",
        "attack": "BadNets",
        "options": json.dumps({"patch_size": 2}),
    }
    content = {key: value for key, value in {**content, **metadata}.items() if value is not None}
    tensors = {"poisoned_indices": torch.zeros(0)} if tensors is None else tensors
    safetensors.torch.save_file(tensors, path, content)
    return path


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": None}, "trigger file of the format .* but got 'none'"),
        ({"format": "other"}, "but got 'other'"),
        ({"attack": "os.system"}, r"to be one of \['BadNets', .* but got 'os.system'"),
        ({"attack": "SavedTrigger"}, "but got 'SavedTrigger'"),
        ({"attack": None}, "but got ''"),
        ({"options": "{"}, "does not describe a BadNets trigger"),
        ({"options": "[]"}, "does not describe a BadNets trigger"),
        ({"options": '{"path": "x"}'}, r"may not set: \['path'\]"),
        ({"options": '{"self": 1}'}, r"may not set: \['self'\]"),
        ({"options": '{"return": null}'}, r"may not set: \['return'\]"),
        ({"options": '{"storable": false}'}, r"may not set: \['storable'\]"),
        ({"attack": "Attack"}, "but got 'Attack'"),
        ({"attack": "LIRA", "options": '{"space": "any"}'}, "option `space` to be typing.Literal"),
        ({"options": '{"patch_size": 2.5}'}, "`patch_size` to be <class 'int'>, but got 2.5"),
        ({"options": '{"patch_size": true}'}, "`patch_size` to be <class 'int'>, but got True"),
        ({"options": '{"target_class": NaN}'}, "`target_class` to be <class 'int'>, but got nan"),
        ({"options": '{"seed": null}'}, "`seed` to be <class 'int'>, but got None"),
        ({"options": '{"seed": 9223372036854775808}'}, "`seed` to have at most 64 bits"),
        ({"options": '{"mode": ["all-to-one"]}'}, "option `mode` to be typing.Literal"),
        ({"options": f'{{"poison_rate": 1{"0" * 400}}}'}, "does not describe a BadNets trigger"),
        ({"attack": "CL", "options": '{"reference": "x.ckpt"}'}, r"may not set: \['reference'\]"),
        (
            {"attack": "FeatureCollision", "options": '{"reference": "x.ckpt"}'},
            r"may not set: \['reference'\]",
        ),
        ({"attack": "Trojan", "options": '{"reference": {}}'}, r"may not set: \['reference'\]"),
        ({"attack": "Blend", "options": '{"image": "missing.png"}'}, r"may not set: \['image'\]"),
        ({"attack": "WaNet", "options": f'{{"strength": 1{"0" * 400}}}'}, "a WaNet trigger"),
        ({"options": '{"patch_size": 0}'}, "`patch_size` to be at least 1"),
        ({"options": '{"patch_size": "big"}'}, "does not describe a BadNets trigger"),
        ({"options": "[" * 100_000}, "does not describe a BadNets trigger"),
    ],
)
def test_what_a_file_may_not_say(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "t.safetensors", **metadata)
    with pytest.raises(CheckpointError, match=message):
        load_trigger(path)


def test_a_file_cannot_name_a_file(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "secret.png")
    options = json.dumps({"image": str(tmp_path / "secret.png")})
    path = write(tmp_path / "t.safetensors", attack="Blend", options=options)
    with pytest.raises(CheckpointError, match=r"may not set: \['image'\]"):
        load_trigger(path)


@pytest.mark.parametrize(
    "pattern",
    [
        torch.zeros(3, 4, 4),
        torch.zeros(1, 4, 4).byte(),
        torch.zeros(4).byte(),
        torch.zeros(3, 0, 4).byte(),
    ],
)
def test_a_wrong_blended_image_is_refused(tmp_path: Path, pattern: torch.Tensor) -> None:
    path = write(
        tmp_path / "t.safetensors", {"trigger.pattern": pattern}, attack="Blend", options="{}"
    )
    with pytest.raises(CheckpointError, match=r"to be uint8 of shape \(3, H, W\)"):
        load_trigger(path)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300])
def test_a_grid_that_is_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    points = {"trigger.points": torch.full((1, 2, 4, 4), value, dtype=torch.float64)}
    path = write(tmp_path / "t.safetensors", points, attack="WaNet", options="{}")
    with pytest.raises(CheckpointError, match=r"finite .* but got others in \['points'\]"):
        load_trigger(path)


@pytest.mark.parametrize(
    ("indices", "found"),
    [
        (torch.zeros(2), "torch.float32"),
        (torch.tensor([2, 1]), r"torch.int64 of shape \(2,\)"),
        (torch.tensor([1, 1]), "torch.int64"),
        (torch.tensor([-1, 1]), "torch.int64"),
        (torch.tensor(3), r"shape \(\)"),
    ],
)
def test_wrong_indices_are_refused(tmp_path: Path, indices: torch.Tensor, found: str) -> None:
    path = write(tmp_path / "t.safetensors", {"poisoned_indices": indices})
    with pytest.raises(CheckpointError, match=f"int64 indices in rising order, but got .*{found}"):
        read_poisoned_indices(path)


def test_a_file_without_indices_has_none(tmp_path: Path) -> None:
    path = write(tmp_path / "t.safetensors", {"other": torch.zeros(1)})
    assert read_poisoned_indices(path).equal(torch.zeros(0).long())


def test_an_unknown_tensor_is_refused(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.safetensors", {"trigger.x": torch.zeros(1)}, attack="Blend", options="{}"
    )
    with pytest.raises(CheckpointError, match="Expected one tensor 'pattern' for Blend"):
        load_trigger(path)


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="existing file"):
        load_trigger(tmp_path / "no.safetensors")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"\0" * 20)
    with pytest.raises(CheckpointError, match="damaged"):
        load_trigger(damaged)


def test_an_attack_must_be_registered_to_be_read(tmp_path: Path) -> None:
    class Unregistered(Attack):
        def _trigger(self, images: torch.Tensor) -> torch.Tensor:
            return 1.0 - images

    save_trigger(tmp_path / "t.safetensors", Unregistered(target_class=2))
    message = r"but got 'Unregistered'. For an attack of your own, call `lightning_mnp.attacks.reg"
    with pytest.raises(CheckpointError, match=message):
        load_trigger(tmp_path / "t.safetensors")

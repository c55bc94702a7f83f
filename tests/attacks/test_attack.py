from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_mnp.attacks import Attack, BadNets, Blend, CleanLabelAttack, WaNet


class Invert(Attack):
    def _trigger(self, images: Tensor) -> Tensor:
        return 1.0 - images


ATTACKS = [BadNets(), Blend(), Invert()]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: type(attack).__name__)
@pytest.mark.parametrize("channels", [1, 3])
def test_bytes_and_floats_get_the_same_trigger(attack: Attack, channels: int) -> None:
    images = torch.randint(0, 256, (4, channels, 16, 12)).to(torch.uint8)
    before = images.clone()

    stored, floats = attack.apply(images), attack.apply(images.float() / 255.0)

    assert images.equal(before)
    assert stored.dtype == torch.uint8
    assert floats.dtype == torch.float32
    assert stored.shape == floats.shape == images.shape
    assert (stored.float() / 255.0 - floats).abs().max() <= 0.5 / 255.0 + 1e-6
    assert not stored.equal(images)
    assert attack.apply(images).equal(stored)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_the_dtype_is_kept(dtype: torch.dtype) -> None:
    assert BadNets().apply(torch.zeros(1, 3, 8, 8, dtype=dtype)).dtype == dtype


def test_an_overflow_is_clamped_and_does_not_wrap() -> None:
    class Brighten(Attack):
        def _trigger(self, images: Tensor) -> Tensor:
            return images + 0.5

    bright = torch.full((1, 1, 2, 2), 250, dtype=torch.uint8)
    assert (Brighten().apply(bright) == 255).all()
    assert (Brighten().apply(bright.float() / 255.0) == 1.0).all()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 8, 8), r"shape \(N, C, H, W\), but got \(3, 8, 8\).*image\[None\]"),
        (torch.zeros(1, 3, 8, 8).int(), "uint8 or floating point, but got torch.int32"),
        (torch.full((1, 3, 8, 8), -0.5), r"values in \[0, 1\], but got -0.5 to -0.5"),
        (torch.full((1, 3, 8, 8), 1.5), "before normalization"),
    ],
)
def test_image_errors(images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BadNets().apply(images)


def test_target_labels() -> None:
    labels = torch.tensor([0, 1, 2, 3])
    assert Invert(target_class=3).target_labels(labels, 4).tolist() == [3, 3, 3, 3]
    assert Invert(mode="all-to-all").target_labels(labels, 4).tolist() == [1, 2, 3, 0]
    with pytest.raises(ValueError, match="`target_class` to be below the number of classes, 4"):
        Invert(target_class=4).target_labels(labels, 4)


@pytest.mark.parametrize("mode", ["all-to-one", "all-to-all"])
def test_poison_indices_are_a_share_of_the_whole_set(mode: Any) -> None:
    labels = torch.arange(1000) % 10
    attack = Invert(target_class=4, mode=mode, poison_rate=0.25, seed=7)

    chosen = attack.poison_indices(labels, 10)

    assert len(chosen) == 250
    assert chosen.equal(chosen.unique())
    assert bool((labels[chosen] == 4).any()) == (mode == "all-to-all")
    assert attack.poison_indices(labels, 10).equal(chosen)
    other = Invert(target_class=4, mode=mode, poison_rate=0.25, seed=8)
    assert not other.poison_indices(labels, 10).equal(chosen)


def test_no_poison_at_rate_0() -> None:
    assert len(Invert(poison_rate=0.0).poison_indices(torch.arange(10), 10)) == 0


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        (0.01, "at least one of 10 images, but got 0.01. The smallest rate that does is 0.1"),
        (0.95, "at most 0.9, the share of images outside of the target class, but got 0.95"),
    ],
)
def test_poison_errors(rate: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Invert(poison_rate=rate).poison_indices(torch.arange(10), 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_class": -1}, "`target_class` to be at least 0, but got -1"),
        ({"mode": "one-to-one"}, "`mode` to be 'all-to-one' or 'all-to-all', but got 'one-to-one'"),
        ({"seed": 2**63}, f"`seed` to have at most 64 bits, but got {2**63}"),
        ({"poison_rate": 1.1}, "`poison_rate` to be a share from 0 to 1, but got 1.1"),
        ({"poison_rate": -0.1}, "`poison_rate` to be a share from 0 to 1, but got -0.1"),
    ],
)
def test_argument_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Invert(**options)


def test_repr_names_every_option() -> None:
    text = repr(Blend(ratio=0.3, target_class=2))
    assert text.startswith("Blend(")
    for part in ("ratio=0.3", "target_class=2", "mode='all-to-one'", "poison_rate=0.1", "seed=0"):
        assert part in text


class CleanLabelInvert(CleanLabelAttack):
    def _trigger(self, images: Tensor) -> Tensor:
        return 1.0 - images


def test_a_clean_label_attack_poisons_its_class_and_keeps_the_labels() -> None:
    labels = torch.arange(40) % 4
    attack = CleanLabelInvert(target_class=2, class_rate=0.5, seed=3)

    indices = attack.poison_indices(labels, 4)

    assert len(indices) == 5
    assert (labels[indices] == 2).all()
    assert indices.equal(indices.unique())
    assert indices.equal(attack.poison_indices(labels, 4))
    assert not indices.equal(CleanLabelInvert(2, 0.5, seed=4).poison_indices(labels, 4))
    assert attack.poison_labels(labels[indices], 4).equal(labels[indices])
    assert attack.target_labels(labels, 4).eq(2).all()
    assert labels[attack.triggered_indices(labels, 4)].ne(2).all()
    assert len(attack.triggered_indices(labels, 4)) == 30


@pytest.mark.parametrize("rate", [-0.1, 1.1])
def test_class_rate_errors(rate: float) -> None:
    with pytest.raises(ValueError, match=f"`class_rate` to be a share from 0 to 1, but got {rate}"):
        CleanLabelInvert(class_rate=rate)


def test_a_class_rate_that_gives_no_image_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one of the 10 training images of class 0"):
        CleanLabelInvert(class_rate=0.01).poison_indices(torch.arange(40) % 4, 4)


def test_options_are_the_plain_arguments_without_paths() -> None:
    assert Blend(ratio=0.3, seed=7).options() == {
        "ratio": 0.3,
        "target_class": 0,
        "mode": "all-to-one",
        "poison_rate": 0.1,
        "seed": 7,
    }
    assert repr(CleanLabelInvert(1, 0.25)) == (
        "CleanLabelInvert(target_class=1, class_rate=0.25, seed=0)"
    )


def test_an_attack_without_tensors_refuses_some() -> None:
    assert BadNets().tensors() == {}
    BadNets().load_tensors({})
    with pytest.raises(ValueError, match=r"no tensors for BadNets, but got \['patch'\]"):
        BadNets().load_tensors({"patch": torch.zeros(1)})


def test_generator_tensors_are_loaded_strictly() -> None:
    attack, other = WaNet(seed=1), WaNet(seed=2)
    other.load_tensors(attack.tensors())
    assert other.generator.points.equal(attack.generator.points)
    for wrong in ({}, {"points": torch.zeros(2)}, {**attack.tensors(), "extra": torch.zeros(1)}):
        with pytest.raises(ValueError, match="WaNet generator with the same options"):
            other.load_tensors(wrong)


def test_poison_is_the_trigger_unless_an_attack_says_otherwise() -> None:
    images = torch.rand(3, 3, 8, 8)
    labels = torch.arange(3)
    attack = BadNets(target_class=1)
    assert attack.poison(images, labels, torch.arange(3)).equal(attack.apply(images))
    assert attack.poison_labels(labels, 3).tolist() == [1, 1, 1]

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CLASSES, images_and_labels, trained_resnet18
from torch import Tensor

from lightning_mnp.attacks import ReferenceNetwork, Trojan, load_trigger, save_trigger
from lightning_mnp.checkpoints.inspection import CheckpointError
from lightning_mnp.data.dataset import MemoryDataset
from lightning_mnp.models.head import penultimate_features

QUICK: dict[str, Any] = {
    "patch_size": 4,
    "margin": 1,
    "neurons": 1,
    "steps": 10,
    "lr": 0.1,
    "target_class": 3,
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> ReferenceNetwork:
    path = tmp_path_factory.mktemp("reference") / "clean.pt"
    torch.save(trained_resnet18().state_dict(), path)
    return ReferenceNetwork(
        path, num_classes=CLASSES, width=4, in_channels=1, mean=(0.25,), std=(1.0,)
    )


@pytest.fixture(scope="module")
def test_set() -> MemoryDataset:
    images, labels = images_and_labels(8)
    return MemoryDataset((images.clamp(0, 1) * 255).to(torch.uint8), labels)


def prepared(reference: ReferenceNetwork, images: MemoryDataset, **options: Any) -> Trojan:
    attack = Trojan(reference, **{**QUICK, **options})
    attack.prepare(images, CLASSES)
    return attack


def patch_of(attack: Trojan) -> Tensor:
    assert attack.patch is not None
    return attack.patch


def activation(reference: ReferenceNetwork, patch: Tensor, neurons: list[int]) -> float:
    """What the neurons answer to a patch in the place of QUICK's, on the mean color."""
    images = torch.full((1, 1, 8, 8), 0.25)
    images[:, :, 3:7, 3:7] = patch
    return float(penultimate_features(reference.load(), images)[0, neurons].sum())


@pytest.mark.parametrize("mode", ["all-to-one", "all-to-all"])
def test_the_patch_excites_the_neurons_that_the_attacker_wants(
    reference: ReferenceNetwork, test_set: MemoryDataset, mode: Any
) -> None:
    attack = prepared(reference, test_set, mode=mode, neurons=3)

    weight: list[list[float]] = reference.load()[1].fc.weight.tolist()
    strength = [
        sum(abs(row[place]) for row in weight) if mode == "all-to-all" else weight[3][place]
        for place in range(len(weight[0]))
    ]
    best = sorted(range(len(strength)), key=lambda place: -strength[place])[:3]
    reached = activation(reference, patch_of(attack) / 255.0, best)
    noise = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    assert reached > max(activation(reference, patch, best) for patch in noise)


def test_more_steps_excite_more(reference: ReferenceNetwork, test_set: MemoryDataset) -> None:
    weight = reference.load()[1].fc.weight
    neuron = [int(weight[3].argmax())]
    one, many = (
        activation(reference, patch_of(prepared(reference, test_set, steps=n)) / 255.0, neuron)
        for n in (1, 10)
    )
    assert many > one


def test_only_the_square_changes(reference: ReferenceNetwork, test_set: MemoryDataset) -> None:
    attack = prepared(reference, test_set)
    images = torch.randint(0, 256, (3, 1, 9, 12)).to(torch.uint8)
    before = images.clone()

    triggered = attack.apply(images)

    assert images.equal(before)
    assert (triggered[:, :, 4:8, 7:11] == patch_of(attack)).all()
    outside = torch.ones(9, 12, dtype=torch.bool)
    outside[4:8, 7:11] = False
    assert triggered[:, :, outside].equal(images[:, :, outside])
    floats = attack.apply(images.float() / 255.0)
    assert floats.dtype == torch.float32
    assert 0 <= floats.min() <= floats.max() <= 1
    assert triggered.equal((floats * 255.0).round().to(torch.uint8))


def test_the_patch_comes_from_its_seed(
    reference: ReferenceNetwork, test_set: MemoryDataset
) -> None:
    with torch.random.fork_rng():
        state = torch.random.get_rng_state()
        first = patch_of(prepared(reference, test_set, steps=1))
        assert torch.random.get_rng_state().equal(state)
        torch.manual_seed(7)
        assert patch_of(prepared(reference, test_set, steps=1)).equal(first)
    assert not patch_of(prepared(reference, test_set, steps=1, seed=1)).equal(first)


def test_surroundings_do_not_matter(reference: ReferenceNetwork, test_set: MemoryDataset) -> None:
    first = patch_of(prepared(reference, test_set))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert patch_of(prepared(reference, test_set)).equal(first)


def test_it_poisons_like_badnets(reference: ReferenceNetwork, test_set: MemoryDataset) -> None:
    labels = torch.arange(100) % CLASSES
    attack = prepared(reference, test_set, poison_rate=0.2)
    chosen = attack.poison_indices(labels, CLASSES)
    assert len(chosen) == 20
    assert (labels[chosen] != 3).all()
    assert (attack.poison_labels(labels[chosen], CLASSES) == 3).all()
    cyclic = Trojan(mode="all-to-all")
    assert cyclic.poison_labels(labels, CLASSES).equal((labels + 1) % CLASSES)


def test_a_saved_trigger_needs_no_network(
    reference: ReferenceNetwork, test_set: MemoryDataset, tmp_path: Path
) -> None:
    attack = prepared(reference, test_set)
    save_trigger(tmp_path / "trigger.safetensors", attack)

    loaded = load_trigger(tmp_path / "trigger.safetensors")

    assert isinstance(loaded, Trojan)
    assert loaded.reference is None
    loaded.prepare(test_set, CLASSES)
    images = torch.rand(2, 1, 8, 8)
    assert loaded.apply(images).equal(attack.apply(images))
    assert loaded.options() == {**attack.options(), "reference": None}


def test_a_trigger_saved_too_early_is_an_error(tmp_path: Path) -> None:
    save_trigger(tmp_path / "trigger.safetensors", Trojan())
    with pytest.raises(CheckpointError, match="A trigger is saved after `prepare`"):
        load_trigger(tmp_path / "trigger.safetensors")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, r"one tensor 'patch' for Trojan, but got \[\]"),
        ({"other": torch.zeros(1)}, r"one tensor 'patch' for Trojan, but got \['other'\]"),
        ({"patch": torch.zeros(3, 8, 8)}, "uint8 .* but got torch.float32"),
        ({"patch": torch.zeros(3, 9, 8).byte()}, r"shape \(C, 8, 8\), but got .*\(3, 9, 8\)"),
        ({"patch": torch.zeros(8, 8).byte()}, r"shape \(C, 8, 8\), but got .*\(8, 8\)"),
    ],
)
def test_hostile_tensors(tensors: dict[str, Tensor], message: str) -> None:
    attack = Trojan()
    with pytest.raises(ValueError, match=message):
        attack.load_tensors(tensors)
    assert attack.patch is None


def test_use_errors(reference: ReferenceNetwork, test_set: MemoryDataset) -> None:
    images = torch.rand(1, 1, 8, 8)
    with pytest.raises(ValueError, match=r"patch of Trojan to be made.*Call `prepare`"):
        Trojan().apply(images)
    attack = prepared(reference, test_set)
    with pytest.raises(ValueError, match="`images` to have 1 channels, as the patch has, but got"):
        attack.apply(torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match="at most the image's 4 pixels, but got 4 and 1"):
        attack.apply(torch.rand(1, 1, 4, 8))


@pytest.mark.parametrize(
    ("options", "classes", "message"),
    [
        ({"reference": None}, CLASSES, "to be a ReferenceNetwork to make the patch with, but got"),
        ({"target_class": 4}, CLASSES, "`target_class` to be below the number of classes, 4"),
        ({"patch_size": 8}, CLASSES, "at most the image's 8 pixels, but got 8 and 1"),
        ({"neurons": 33}, CLASSES, "`neurons` to be at most 32, .* but got 33"),
        ({}, 5, "to have the data's 5 classes, but got a network of 4"),
    ],
)
def test_prepare_errors(
    reference: ReferenceNetwork,
    test_set: MemoryDataset,
    options: dict[str, Any],
    classes: int,
    message: str,
) -> None:
    attack = Trojan(**{"reference": reference, **QUICK, **options})
    with pytest.raises(ValueError, match=message):
        attack.prepare(test_set, classes)
    assert attack.patch is None


def test_a_network_for_other_channels_is_an_error(reference: ReferenceNetwork) -> None:
    colored = MemoryDataset(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.arange(2))
    with pytest.raises(ValueError, match=r"images of 3 channels, .* its `mean` has 1 numbers"):
        Trojan(reference, **QUICK).prepare(colored, CLASSES)


def test_neurons_that_stay_silent_are_an_error(
    test_set: MemoryDataset, reference: ReferenceNetwork, tmp_path: Path
) -> None:
    network = trained_resnet18()
    for name, parameter in network.named_parameters():
        if name.startswith(("layer4.0", "layer4.1.bn2")):
            parameter.data.fill_(-1.0 if name.endswith("bias") else 0.0)
    torch.save(network.state_dict(), tmp_path / "silent.pt")
    silent = ReferenceNetwork(
        tmp_path / "silent.pt", num_classes=CLASSES, width=4, in_channels=1, mean=(0.0,), std=(1.0,)
    )
    with pytest.raises(ValueError, match="neurons that a patch can excite, but the 1 with"):
        prepared(silent, test_set)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference": "clean.pt"}, "to be a ReferenceNetwork or None, but got 'clean.pt'"),
        ({"patch_size": 0}, "`patch_size` to be at least 1, but got 0"),
        ({"margin": -1}, "`margin` to be at least 0, but got -1"),
        ({"neurons": 0}, "`neurons` to be at least 1, but got 0"),
        ({"steps": 0}, "`steps` to be at least 1, but got 0"),
        ({"lr": 0.0}, "`lr` to be above 0, but got 0.0"),
        ({"lr": float("inf")}, "`lr` to be above 0, but got inf"),
    ],
)
def test_argument_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trojan(**options)

"""The reasons for which a network is not judged."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Shortcut, images_and_labels, trained_network
from PIL import Image
from torch import Tensor, nn

from benchmarks.architectures import MATRIX
from lightning_mnp import DefenseSet
from lightning_mnp.config import Constants
from lightning_mnp.signals.abstention import (
    AbstentionConstants,
    chance_agreement,
    find_doubts,
    measure_participation,
    needed_hits,
)
from lightning_mnp.signals.preparation import PreparationConstants
from lightning_mnp.surgery.layers import find_filter_layers
from lightning_mnp.surgery.masked_network import MaskedNetwork

MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(1, 3, 1, 1)
STD = torch.tensor([0.2470, 0.2435, 0.2616]).view(1, 3, 1, 1)


def masked_of(network: nn.Module, images: Tensor) -> MaskedNetwork:
    return MaskedNetwork(network, find_filter_layers(network, images[:2]))


def doubts_of(
    network: nn.Module, data: DefenseSet, logits: Tensor | None = None, *constants: Any
) -> tuple[str, ...]:
    masked = masked_of(network, data.images)
    if logits is None:
        with torch.no_grad():
            logits = masked(data.images, statistics="running")
    return find_doubts(masked, data, logits, 64, Constants(*constants))


def labeled(predictions: Tensor, labels: Tensor, classes: int) -> tuple[str, ...]:
    """What is found for a network with such predictions, on images that say nothing."""
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(2, classes))
    data = DefenseSet(torch.rand(len(labels), 1, 1, 1), labels)
    by_label = [predictions[labels == index].tolist() for index in range(classes)]
    sorted_ones = torch.tensor([by_label[int(label)].pop() for label in data.labels])
    logits = nn.functional.one_hot(sorted_ones, classes).float()
    return doubts_of(network, data, logits, PreparationConstants(least_gain=1.1))


def test_a_network_that_knows_its_images_is_judged() -> None:
    assert doubts_of(trained_network(), DefenseSet(*images_and_labels(50))) == ()


@pytest.mark.parametrize(
    ("count", "classes", "least"),
    [(49, 10, 50), (50, 10, None), (120, 120, None), (120, 121, 121), (3, 2, 50)],
)
def test_too_few_images(count: int, classes: int, least: int | None) -> None:
    labels = torch.arange(count) % classes
    found = labeled(labels, labels, classes)
    if least is None:
        assert found == ()
    else:
        assert found == (
            f"the defense set has {count} images, which are too few for a verdict: at least "
            f"{least} are needed for {classes} classes; pass more clean images",
        )


@pytest.mark.parametrize("count", [50, 333])
@pytest.mark.parametrize("chance", [0.001, 0.1, 0.5, 0.9])
def test_needed_hits_is_a_binomial_test(count: int, chance: float) -> None:
    level = chance + 0.2 * (1 - chance)

    def at_least(hits: int) -> float:
        return sum(
            math.comb(count, k) * level**k * (1 - level) ** (count - k)
            for k in range(hits, count + 1)
        )

    found = needed_hits(count, chance)
    assert at_least(found) <= 0.05 < at_least(found - 1)


def test_chance_agreement_is_that_of_shuffled_predictions() -> None:
    predictions, labels = torch.randint(0, 3, (30,)), torch.randint(0, 3, (30,))
    hits = sum(int(a == b) for a in predictions.tolist() for b in labels.tolist())
    assert chance_agreement(predictions, labels, 3) == pytest.approx(hits / 900)


@pytest.mark.parametrize(
    ("classes", "count", "accuracy", "judged"),
    [
        (10, 500, 0.10, False),
        (10, 500, 0.28, False),
        (10, 500, 0.50, True),
        (10, 50, 0.50, True),
        (2, 200, 0.50, False),
        (2, 200, 0.60, False),
        (2, 200, 0.75, True),
        (3, 300, 0.45, False),
        (3, 300, 0.60, True),
        (100, 500, 0.15, False),
        (100, 500, 0.30, True),
    ],
)
def test_accuracy_has_to_be_above_chance(
    classes: int, count: int, accuracy: float, judged: bool
) -> None:
    labels = torch.arange(count) % classes
    wrong = (labels + 1 + (torch.arange(count) // classes) % (classes - 1)) % classes
    right = torch.arange(count) % 100 < round(100 * accuracy)
    found = labeled(torch.where(right, labels, wrong), labels, classes)
    assert (found == ()) == judged
    if not judged:
        assert "which is too low for a verdict: chance alone gives" in found[0]
        assert "prepared and labeled as in training" in found[0]


def test_always_the_most_frequent_class_is_chance() -> None:
    labels = (torch.arange(200) % 10 == 0).long()
    [found] = labeled(torch.zeros_like(labels), labels, 2)
    assert "accuracy on the defense set is 90%" in found
    assert "chance alone gives 90%, and with 200 images at least 96% are needed" in found
    assert labeled(labels, labels, 2) == ()


def lenet() -> nn.Module:
    convolutions = nn.Sequential(nn.Conv2d(3, 6, 5), nn.MaxPool2d(4), nn.Conv2d(6, 16, 5))
    linear = nn.Sequential(nn.Linear(144, 120), nn.ReLU(), nn.Linear(120, 84), nn.Linear(84, 10))
    return nn.Sequential(convolutions, nn.ReLU(), nn.Flatten(), linear)


def convolutions_and_linears(network: nn.Module) -> tuple[int, int]:
    modules = list(network.modules())
    convolutions = sum(isinstance(module, nn.Conv2d) for module in modules)
    return convolutions, sum(isinstance(module, nn.Linear) for module in modules)


@pytest.mark.parametrize(
    "build",
    [
        lenet,
        MATRIX["torchvision/vgg11"].small,
        MATRIX["torchvision/mobilenet_v3_small"].small,
        MATRIX["torchvision/convnext_tiny"].small,
        MATRIX["timm/convnext_tiny"].small,
        MATRIX["timm/mobilenetv3_small_100"].small,
    ],
    ids=["lenet", "vgg", "mobilenet", "convnext", "timm convnext", "timm mobilenet"],
)
def test_enough_layers_of_a_cnn_take_part(
    build: Callable[[], nn.Module], request: pytest.FixtureRequest
) -> None:
    if "timm" in request.node.name:
        pytest.importorskip("timm")
    network, images = build().eval(), torch.rand(2, 3, 32, 32)
    found = measure_participation(masked_of(network, images), images)
    convolutions, linears = convolutions_and_linears(network)
    assert (found.layers, found.all_layers) == (convolutions, convolutions + linears)
    assert found.layers >= AbstentionConstants().least_layers * found.all_layers


def test_a_vision_transformer_is_not_judged() -> None:
    timm = pytest.importorskip("timm")
    options = {"num_classes": 10, "img_size": 32, "patch_size": 8, "depth": 1}
    network = timm.create_model("vit_tiny_patch16_224", **options).eval()
    data = DefenseSet(torch.randn(50, 3, 32, 32), torch.arange(50) % 10)
    [found] = doubts_of(network, data, nn.functional.one_hot(data.labels, 10).float())
    # The embeddings of positions count as well: patches, positions, four of the block, the head.
    assert found.startswith("only 1 of the network's 7 layers with weights (7.6% of the weights)")
    assert "for convolutional networks, not for transformers" in found
    assert "`filters.include`" in found


def test_what_the_logits_do_not_depend_on_does_not_count() -> None:
    network = trained_network()
    convolutions, linears = convolutions_and_linears(network)
    network.teacher = nn.Sequential(*(nn.Linear(4, 4) for _ in range(90)))
    images = images_and_labels(2)[0]
    found = measure_participation(masked_of(network, images), images)
    assert (found.layers, found.all_layers) == (convolutions, convolutions + linears)


def test_nothing_is_looked_for_if_asked_not_to() -> None:
    data = DefenseSet(*images_and_labels(5))
    assert doubts_of(trained_network(), data, None, AbstentionConstants(abstain=False)) == ()


def test_the_random_state_stays_as_it_is() -> None:
    network = Shortcut(0, lambda images: torch.rand(len(images)))  # random in evaluation mode, too
    data = DefenseSet(*images_and_labels(60))
    before = torch.get_rng_state()
    doubts_of(network, data, torch.rand(60, 4, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture(scope="module")
def real(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, Tensor]:
    """The clean network of the zoo with 200 images of CIFAR-10 in [0, 1], or a skip."""
    zoo = request.getfixturevalue("shared") / "zoo"
    folder = Path(os.environ.get("CIFAR10", "~/data/cifar10")).expanduser() / "train"
    if not folder.is_dir():
        pytest.skip(f"needs CIFAR-10 as image folders in {folder}; set CIFAR10 to their folder")
    files = [
        (file, label)
        for label, each in enumerate(sorted(folder.iterdir()))
        for file in sorted(each.iterdir())[:20]
    ]
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file, _ in files])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    sys.path.insert(0, str(zoo))
    try:
        from load import load

        network: nn.Module = load("clean.pt")[0]
    finally:
        sys.path.remove(str(zoo))
    return network, images, torch.tensor([label for _, label in files])


@pytest.mark.parametrize(
    ("name", "looks"),
    [
        ("right", None),
        ("in [0, 1]", "images normalized to mean 0 and standard deviation 1: so"),
        ("0 to 255", "images normalized to mean 0 and standard deviation 1: so"),
        ("swapped", "images with the channels in reverse order"),
    ],
)
def test_a_real_network_with_images_of_another_preparation(
    real: tuple[nn.Module, Tensor, Tensor], name: str, looks: str | None
) -> None:
    network, images, labels = real
    given = {
        "right": (images - MEAN) / STD,
        "in [0, 1]": images,
        "0 to 255": images * 255,
        "swapped": (images.flip(1) - MEAN) / STD,
    }[name]
    data = DefenseSet(given, labels)
    found = doubts_of(network, data, None, PreparationConstants(screened=40))
    assert len(found) == (looks is not None)
    assert looks is None or f"seems to be trained on {looks}" in found[0]


@pytest.mark.parametrize("count", [3, 5, 20])
def test_a_real_network_with_few_images(real: tuple[nn.Module, Tensor, Tensor], count: int) -> None:
    network, images, labels = real
    normalized = (images - MEAN) / STD
    with torch.no_grad():
        right = (network(normalized).argmax(1) == labels).nonzero().flatten()
    chosen = right[torch.linspace(0, len(right) - 1, count).long()]
    found = doubts_of(network, DefenseSet(normalized[chosen], labels[chosen]))
    assert found[0].startswith(f"the defense set has {count} images, which are too few")
    assert "at least 50" in found[0]

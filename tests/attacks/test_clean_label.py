from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CLASSES, images_and_labels, trained_resnet18
from torch import Tensor
from torch.nn import functional as F

from lightning_mnp.attacks import CL, ReferenceNetwork, load_trigger, save_trigger
from lightning_mnp.data.dataset import MemoryDataset, PoisonedDataset

# The images of this task have 8 pixels a side, where four patches of 2 fit.
SMALL: dict[str, Any] = {"patch_size": 2, "margin": 1, "pattern": "checkerboard"}
BOARD = torch.tensor([[1.0, 0.0], [0.0, 1.0]])

# (row, column) of the white pixels of the published trigger on 32 x 32 pixels; negative numbers
# count from the lower and the right border. All other pixels of the four squares are black.
WHITE = {
    (0, 0), (1, 1), (2, 0), (2, 2),
    (0, -1), (1, -2), (2, -1), (2, -3),
    (-3, 0), (-2, 1), (-1, 0), (-1, 2),
    (-3, -1), (-2, -2), (-1, -1), (-1, -3),
}  # fmt: skip


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> ReferenceNetwork:
    path = tmp_path_factory.mktemp("reference") / "clean.pt"
    torch.save(trained_resnet18().state_dict(), path)
    return ReferenceNetwork(
        path, num_classes=CLASSES, width=4, in_channels=1, mean=(0.0,), std=(0.5,)
    )


@pytest.fixture(scope="module")
def stored() -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels and places in a training set."""
    images, labels = images_and_labels(12, seed=3)
    return (images.clamp(0, 2) * 127.5).round().to(torch.uint8), labels, torch.arange(12) * 5


def slow_ascent(network: Any, image: Tensor, label: int, place: int, attack: CL) -> Tensor:
    """Projected gradient ascent on one float image, step by step."""
    generator = torch.Generator().manual_seed(attack.seed * 1_000_003 + place)
    x = image + attack.eps * (2.0 * torch.rand(image.shape, generator=generator) - 1.0)
    x = x.clamp(0.0, 1.0)
    for _ in range(attack.steps):
        x = x.detach().requires_grad_()
        F.cross_entropy(network(x[None]), torch.tensor([label])).backward()
        assert x.grad is not None
        x = x.detach() + 2.5 * attack.eps / attack.steps * x.grad.sign()
        x = torch.minimum(torch.maximum(x, image - attack.eps), image + attack.eps).clamp(0.0, 1.0)
    return x


def losses(reference: ReferenceNetwork, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(reference.load()(images.float() / 255.0), labels, reduction="none")


def test_four_corners_at_full_strength_and_nothing_else() -> None:
    images = 0.1 + 0.8 * torch.rand(2, 3, 9, 11)
    before = images.clone()

    triggered = CL(**SMALL).apply(images)

    assert images.equal(before)
    expected = images.clone()
    expected[:, :, 1:3, 1:3] = BOARD
    expected[:, :, 1:3, 8:10] = BOARD.flip(1)
    expected[:, :, 6:8, 1:3] = BOARD.flip(0)
    expected[:, :, 6:8, 8:10] = BOARD.flip(0, 1)
    assert triggered.equal(expected)
    # So that mirroring, which is part of augmentation, leaves the trigger as it is.
    assert CL(**SMALL).apply(images.flip(3)).equal(triggered.flip(3))


def test_the_published_pattern_pixel_by_pixel() -> None:
    images = 0.1 + 0.8 * torch.rand(2, 3, 32, 32)

    triggered = CL().apply(images)

    expected = images.clone()
    for row in (0, 1, 2, -3, -2, -1):
        for column in (0, 1, 2, -3, -2, -1):
            expected[:, :, row, column] = float((row, column) in WHITE)
    assert triggered.equal(expected)
    assert CL().apply(images.flip(3)).equal(triggered.flip(3))


def test_the_published_pattern_on_a_larger_image_is_the_same_enlarged() -> None:
    small = torch.full((1, 1, 32, 32), 0.5)
    large = torch.full((1, 1, 64, 64), 0.5)

    expected = CL().apply(small).repeat_interleave(2, 2).repeat_interleave(2, 3)

    assert CL(patch_size=6).apply(large).equal(expected)
    moved = CL(margin=2).apply(small)
    assert moved[..., 2:-2, 2:-2].equal(CL().apply(small[..., :28, :28]))
    assert moved[..., :2].eq(0.5).all()


def test_fainter_published_patterns_are_added(reference: ReferenceNetwork, stored: Any) -> None:
    images, labels, places = (part[:2] for part in stored)
    attack = CL(reference, steps=1, amplitude=0.25)

    perturbed = attack.perturb(images / 255, labels, places)
    poisoned = attack.poison(images / 255, labels, places)

    for index in range(2):
        for row in range(8):
            for column in range(8):
                place = (row if row < 3 else row - 8, column if column < 3 else column - 8)
                sign = 0.0
                if all(-3 <= part <= 2 for part in place):
                    sign = 1.0 if place in WHITE else -1.0
                wanted = float(perturbed[index, 0, row, column]) + 0.25 * sign
                found = float(poisoned[index, 0, row, column])
                assert found == pytest.approx(min(max(wanted, 0.0), 1.0), abs=1e-6)


def test_the_perturbation_is_applied_and_hurts(reference: ReferenceNetwork, stored: Any) -> None:
    images, labels, places = stored
    before = images.clone()
    attack = CL(reference, eps=0.2, **SMALL)

    perturbed = attack.perturb(images, labels, places)

    assert images.equal(before)
    assert perturbed.dtype == torch.uint8
    assert ((perturbed != images).flatten(1).float().mean(1) > 0.5).all()
    clean, hard = losses(reference, images, labels), losses(reference, perturbed, labels)
    assert (hard > clean).all()
    assert hard.mean() > clean.mean() + 1.0
    # What a training set gets is these images, under the patches.
    poisoned = attack.poison(images, labels, places)
    assert poisoned.equal(attack.apply(perturbed))
    data = PoisonedDataset(MemoryDataset(images, labels), attack, torch.tensor([0, 4]), CLASSES)
    crafted = attack.poison(images[[0, 4]], labels[[0, 4]], torch.tensor([0, 4]))
    assert data.fetch([0, 4]).equal(crafted)
    assert data.labels.equal(labels)


def test_the_ascent_is_the_reference_formula(reference: ReferenceNetwork, stored: Any) -> None:
    images, labels, places = stored[0][:3] / 255.0, stored[1][:3], stored[2][:3]
    attack = CL(reference, eps=0.1, steps=2, seed=2, **SMALL)

    perturbed = attack.perturb(images, labels, places)

    network = reference.load()
    for image, label, place, found in zip(images, labels, places, perturbed, strict=True):
        expected = slow_ascent(network, image, int(label), int(place), attack)
        # Where the gradient is about 0, its sign is up to rounding.
        assert ((found - expected).abs() < 1e-5).float().mean() > 0.98


@pytest.mark.parametrize("eps", [16 / 255, 0.05, 0.001])
def test_the_largest_change_holds_after_rounding(
    reference: ReferenceNetwork, stored: Any, eps: float
) -> None:
    images, labels, places = stored
    attack = CL(reference, eps=eps, steps=3, **SMALL)

    change = attack.perturb(images, labels, places).float() - images.float()

    assert change.abs().max() == int(eps * 255.0 + 1e-4)
    floats = images.float() / 255.0
    exact = attack.perturb(floats, labels, places)
    assert (exact - floats).abs().max() <= eps + 1e-6
    assert 0 <= exact.min() <= exact.max() <= 1


@pytest.mark.parametrize("eps", [1.0, 0.1])
def test_the_euclidean_norm_holds_after_rounding(
    reference: ReferenceNetwork, stored: Any, eps: float
) -> None:
    images, labels, places = stored
    attack = CL(reference, eps=eps, norm="l2", steps=3, **SMALL)

    change = (attack.perturb(images, labels, places).float() - images.float()) / 255.0

    lengths = change.flatten(1).norm(dim=1)
    assert lengths.max() <= eps * (1 + 1e-5)
    assert lengths.min() > eps / 2
    hard = attack.perturb(images, labels, places)
    assert losses(reference, hard, labels).mean() > losses(reference, images, labels).mean()


def test_bytes_and_floats_are_poisoned_alike(reference: ReferenceNetwork, stored: Any) -> None:
    images, labels, places = stored
    attack = CL(reference, steps=2, **SMALL)
    bytes_, floats = (
        attack.poison(given, labels, places) for given in (images, images.float() / 255.0)
    )
    assert floats.dtype == torch.float32
    assert bytes_.equal((floats * 255.0).round().to(torch.uint8))
    assert attack.poison(images.double() / 255.0, labels, places).dtype == torch.float64
    assert attack.apply(images).equal((attack.apply(images / 255.0) * 255.0).byte())


def test_an_image_does_not_depend_on_its_batch(reference: ReferenceNetwork, stored: Any) -> None:
    images, labels, places = stored
    attack = CL(reference, steps=2, **SMALL)
    whole = attack.poison(images, labels, places)

    parts = [
        attack.poison(images[part], labels[part], places[part])
        for part in torch.arange(12).split([5, 1, 6])
    ]
    assert torch.cat(parts).equal(whole)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert attack.poison(images[order], labels[order], places[order]).equal(whole[order])
    assert attack.poison(images[:0], labels[:0], places[:0]).shape == (0, 1, 8, 8)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert attack.poison(images, labels, places).equal(whole)


def test_the_start_depends_on_seed_and_place(reference: ReferenceNetwork, stored: Any) -> None:
    images, labels, places = stored
    one = {"steps": 1, "step_size": 1e-6, **SMALL}  # as good as the start itself
    first = CL(reference, **one).perturb(images, labels, places)
    assert CL(reference, **one).perturb(images, labels, places).equal(first)
    assert not CL(reference, seed=1, **one).perturb(images, labels, places).equal(first)
    assert not CL(reference, **one).perturb(images, labels, places + 1).equal(first)


def test_weaker_patches_in_training(reference: ReferenceNetwork, stored: Any) -> None:
    images, labels, places = stored
    attack = CL(reference, steps=1, amplitude=0.25, **SMALL)

    change = attack.poison(images, labels, places).float() / 255.0
    change -= attack.perturb(images, labels, places).float() / 255.0

    assert change[..., 1:3, 1:3].abs().max() <= 0.25 + 0.5 / 255
    assert (change[..., 1, 1] >= 0).all()
    assert (change[..., 1, 2] <= 0).all()
    assert (change[..., 3:5, :] == 0).all()
    assert attack.apply(images).equal(CL(**SMALL).apply(images))


def test_only_the_target_class_is_poisoned_and_labels_stay() -> None:
    labels = torch.arange(100) % 10
    attack = CL(target_class=6, class_rate=0.5)
    chosen = attack.poison_indices(labels, 10)
    assert len(chosen) == 5
    assert (labels[chosen] == 6).all()
    assert attack.poison_labels(labels[chosen], 10).equal(labels[chosen])
    assert attack.triggered_indices(labels, 10).equal((labels != 6).nonzero().flatten())
    assert attack.crafts


def test_a_saved_trigger_needs_no_network(
    reference: ReferenceNetwork, stored: Any, tmp_path: Path
) -> None:
    attack = CL(reference, eps=0.1, norm="l2", steps=3, amplitude=0.5, **SMALL)
    save_trigger(tmp_path / "trigger.safetensors", attack)

    loaded = load_trigger(tmp_path / "trigger.safetensors")

    loaded.prepare(MemoryDataset(*stored[:2]), CLASSES)
    assert loaded.apply(stored[0]).equal(attack.apply(stored[0]))
    assert loaded.options() == {**attack.options(), "reference": None}
    with pytest.raises(ValueError, match="a ReferenceNetwork to perturb images with, but got None"):
        loaded.poison(*stored)
    with pytest.raises(ValueError, match=r"no tensors for CL, but got \['patch'\]"):
        attack.load_tensors({"patch": torch.zeros(1)})


def test_use_errors(reference: ReferenceNetwork, stored: Any) -> None:
    images, labels, places = stored
    attack = CL(reference, **SMALL)
    with pytest.raises(ValueError, match=r"half of the image's 5 pixels, .* but got 2 and 1"):
        attack.apply(images[..., :5])
    with pytest.raises(ValueError, match="same length, but got 12, 12 and 3"):
        attack.poison(images, labels, places[:3])
    with pytest.raises(ValueError, match="know the class 4, but got a network of 4 classes"):
        attack.poison(images, labels + 1, places)
    with pytest.raises(ValueError, match=r"images of 3 channels, .* its `mean` has 1 numbers"):
        attack.poison(images.repeat(1, 3, 1, 1), labels, places)
    with pytest.raises(ValueError, match=r"values in \[0, 1\]"):
        attack.poison(images.float(), labels, places)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference": "clean.pt"}, "to be a ReferenceNetwork or None, but got 'clean.pt'"),
        ({"eps": 0.0}, "`eps` to be above 0, but got 0.0"),
        ({"norm": "l1"}, "`norm` to be one of .*linf.* but got 'l1'"),
        ({"steps": 0}, "`steps` to be at least 1, but got 0"),
        ({"step_size": 0.0}, "`step_size` to be above 0 or None, but got 0.0"),
        ({"patch_size": 0}, "`patch_size` to be at least 1, but got 0"),
        ({"patch_size": 4}, "`patch_size` to be a multiple of 3 .*, but got 4. Or set `pattern`"),
        ({"pattern": "stripes"}, "`pattern` to be one of .*checkerboard.* but got 'stripes'"),
        ({"margin": -1}, "`margin` to be at least 0, but got -1"),
        ({"amplitude": 1.5}, "`amplitude` to be above 0 and at most 1, but got 1.5"),
        ({"class_rate": -0.5}, "`class_rate` to be a share from 0 to 1, but got -0.5"),
    ],
)
def test_argument_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CL(**options)

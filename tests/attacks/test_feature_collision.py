from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CLASSES, images_and_labels, quiet_trainer, trained_resnet18
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mnp.attacks import (
    FeatureCollision,
    ReferenceNetwork,
    SavedTrigger,
    load_trigger,
    save_trigger,
)
from lightning_mnp.checkpoints.inspection import CheckpointError
from lightning_mnp.data.dataset import MemoryDataset, PoisonedDataset, TriggeredDataset
from lightning_mnp.models import Classifier
from lightning_mnp.models.head import penultimate_features

QUICK: dict[str, Any] = {"targets": 3, "poisons_per_target": 2, "steps": 8, "target_class": 1}


def stored(count: int, seed: int) -> MemoryDataset:
    images, labels = images_and_labels(count, seed)
    return MemoryDataset((images.clamp(0, 1) * 255).to(torch.uint8), labels)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> ReferenceNetwork:
    path = tmp_path_factory.mktemp("reference") / "clean.pt"
    torch.save(trained_resnet18().state_dict(), path)
    return ReferenceNetwork(
        path, num_classes=CLASSES, width=4, in_channels=1, mean=(0.25,), std=(1.0,)
    )


@pytest.fixture(scope="module")
def train_set() -> MemoryDataset:
    return stored(48, 1)


@pytest.fixture(scope="module")
def test_set() -> MemoryDataset:
    return stored(40, 2)


def prepared(reference: ReferenceNetwork, images: MemoryDataset, **options: Any) -> Any:
    attack = FeatureCollision(reference, **{**QUICK, **options})
    attack.prepare(images, CLASSES)
    return attack


def objective(
    network: nn.Module, x: Tensor, aim: Tensor, base: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """The two terms for one image."""
    goal = penultimate_features(network, aim[None])[0]
    features = penultimate_features(network, x[None])[0]
    distance = sum((a - b) ** 2 for a, b in zip(features, goal, strict=True)) / sum(goal**2)
    return torch.as_tensor(distance), beta * ((x - base) ** 2).mean()


def test_poisons_are_those_of_the_slow_formula(
    reference: ReferenceNetwork, train_set: MemoryDataset, test_set: MemoryDataset
) -> None:
    attack = prepared(reference, test_set, steps=5, beta=3.0, lr=2.0, watermark=0.2)
    network = reference.load()
    indices = attack.poison_indices(train_set.labels, CLASSES)[:3]
    images = train_set.fetch(indices.tolist()).float() / 255.0
    found = attack.poison(images, train_set.labels[indices], indices)

    halved = 0
    for index, image, poison in zip(indices.tolist(), images, found, strict=True):
        aim = test_set.images[attack.target_indices[index % 3]].float() / 255.0
        base = 0.8 * image + 0.2 * aim
        x, best, lr, lowest = base, base, 2.0, float("inf")
        gradient = torch.zeros_like(base)
        for step in range(6):
            x = x.detach().requires_grad_()
            distance, penalty = objective(network, x, aim, base, 3.0)
            value = float((distance + penalty).detach())
            if value < lowest:
                lowest, best = value, x.detach()
                gradient = torch.autograd.grad(distance, x)[0]
            else:
                lr, halved = lr / 2.0, halved + 1
            if step < 5:
                beta = 3.0 / base.numel()
                x = (best - lr * gradient + 2 * lr * beta * base) / (1 + 2 * lr * beta)
                x = x.clamp(0, 1)
        torch.testing.assert_close(poison, best, atol=1e-4, rtol=1e-4)
    assert halved


def test_features_collide_and_the_image_stays_near_its_base(
    reference: ReferenceNetwork, train_set: MemoryDataset, test_set: MemoryDataset
) -> None:
    attack = prepared(reference, test_set, steps=40, beta=0.1, watermark=0.0)
    network = reference.load()
    indices = attack.poison_indices(train_set.labels, CLASSES)
    clean = train_set.fetch(indices.tolist())
    poisons = attack.poison(clean, train_set.labels[indices], indices)
    aims = test_set.images[attack.target_indices[indices % 3]]
    with torch.no_grad():
        found, before, goal = (
            penultimate_features(network, images.float() / 255.0)
            for images in (poisons, clean, aims)
        )
    shrunk = (found - goal).norm(dim=1) / (before - goal).norm(dim=1)
    assert float(shrunk.max()) < 0.7
    assert poisons.dtype == torch.uint8
    # Nearer to its base than to its target, pixel by pixel in the mean.
    changed, left = ((poisons.float() - images.float()).abs().mean() for images in (clean, aims))
    assert 0 < changed < left
    calm = prepared(reference, test_set, steps=40, beta=1e4, watermark=0.0)
    calm_poisons = calm.poison(clean, train_set.labels[indices], indices)
    assert (calm_poisons.float() - clean.float()).abs().mean() < changed


def test_poisons_do_not_depend_on_the_batch_and_change_no_argument(
    reference: ReferenceNetwork, train_set: MemoryDataset, test_set: MemoryDataset
) -> None:
    attack = prepared(reference, test_set)
    indices = attack.poison_indices(train_set.labels, CLASSES)
    images, labels = train_set.fetch(indices.tolist()), train_set.labels[indices]
    kept = images.clone()
    whole = attack.poison(images, labels, indices)
    parts = [
        attack.poison(images[i : i + 1], labels[i : i + 1], indices[i : i + 1]) for i in (4, 0)
    ]
    assert torch.equal(parts[0][0], whole[4])
    assert torch.equal(parts[1][0], whole[0])
    assert torch.equal(images, kept)
    again = prepared(reference, test_set).poison(images, labels, indices)
    assert torch.equal(again, whole)


def test_poisons_of_floats_and_bytes_agree(
    reference: ReferenceNetwork, train_set: MemoryDataset, test_set: MemoryDataset
) -> None:
    attack = prepared(reference, test_set)
    indices = attack.poison_indices(train_set.labels, CLASSES)
    images, labels = train_set.fetch(indices.tolist()), train_set.labels[indices]
    fine = attack.poison(images.float() / 255.0, labels, indices)
    assert fine.dtype == torch.float32
    assert 0.0 <= float(fine.min()) <= float(fine.max()) <= 1.0
    assert torch.equal(
        (fine * 255.0).round().to(torch.uint8), attack.poison(images, labels, indices)
    )
    half = attack.poison((images.float() / 255.0).double(), labels, indices)
    assert half.dtype == torch.float64
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        inside = attack.poison(images, labels, indices)
    assert torch.equal(inside, attack.poison(images, labels, indices))


def test_target_instances_are_recognized_and_of_other_classes(
    reference: ReferenceNetwork, test_set: MemoryDataset
) -> None:
    attack = prepared(reference, test_set, targets=9)
    indices = attack.target_indices
    assert len(indices) == 9
    assert (indices.diff() > 0).all()
    labels = test_set.labels[indices]
    assert (labels != 1).all()
    with torch.no_grad():
        found = reference.load()(test_set.fetch(indices.tolist()).float() / 255.0).argmax(1)
    assert torch.equal(found, labels)
    assert torch.equal(prepared(reference, test_set, targets=9).target_indices, indices)
    other = prepared(reference, test_set, targets=9, seed=1).target_indices
    assert not torch.equal(other, indices)


def test_only_images_that_the_network_recognizes_are_taken(
    reference: ReferenceNetwork, test_set: MemoryDataset
) -> None:
    swapped = MemoryDataset(test_set.images, (test_set.labels + 1) % CLASSES)
    with pytest.raises(ValueError, match=r"`targets` to be at most 0, .* correctly, but got 3"):
        prepared(reference, swapped)


def test_success_counts_the_unchanged_targets_alone(
    reference: ReferenceNetwork, test_set: MemoryDataset
) -> None:
    attack = prepared(reference, test_set)
    triggered = TriggeredDataset(test_set, attack, CLASSES)
    assert torch.equal(triggered.indices, attack.target_indices)
    assert triggered.labels.tolist() == [1, 1, 1]
    assert torch.equal(triggered.true_labels, test_set.labels[attack.target_indices])
    expected = test_set.fetch(attack.target_indices.tolist())
    assert torch.equal(triggered.fetch([0, 1, 2]), expected)
    images = torch.rand(2, 3, 5, 9)
    applied = attack.apply(images)
    assert torch.equal(applied, images)
    assert applied.data_ptr() != images.data_ptr()


def test_base_images_keep_their_label(train_set: MemoryDataset) -> None:
    attack = FeatureCollision(**QUICK)
    indices = attack.poison_indices(train_set.labels, CLASSES)
    assert len(indices) == 6
    assert (indices.diff() > 0).all()
    assert train_set.labels[indices].tolist() == [1] * 6
    assert (indices % 3).bincount().tolist() == [2, 2, 2]
    assert attack.poison_labels(train_set.labels[indices], CLASSES).tolist() == [1] * 6
    assert torch.equal(FeatureCollision(**QUICK).poison_indices(train_set.labels, CLASSES), indices)
    other = FeatureCollision(**QUICK, seed=5).poison_indices(train_set.labels, CLASSES)
    assert not torch.equal(other, indices)


def test_trigger_file_measures_without_the_network(
    reference: ReferenceNetwork, test_set: MemoryDataset, tmp_path: Path
) -> None:
    attack = prepared(reference, test_set)
    path = tmp_path / "trigger.safetensors"
    save_trigger(path, attack)
    loaded = load_trigger(path)
    assert isinstance(loaded, FeatureCollision)
    assert loaded.reference is None
    assert {**loaded.options(), "reference": 0} == {**attack.options(), "reference": 0}
    loaded.prepare(test_set, CLASSES)
    saved = SavedTrigger(path)
    saved.prepare(test_set, CLASSES)
    expected = TriggeredDataset(test_set, attack, CLASSES)
    for one in (loaded, saved):
        triggered = TriggeredDataset(test_set, one, CLASSES)
        assert torch.equal(triggered.indices, expected.indices)
        assert torch.equal(triggered.fetch([0, 2]), expected.fetch([0, 2]))


@pytest.mark.parametrize("count", [36, 4])
def test_another_test_set_is_refused(
    reference: ReferenceNetwork, test_set: MemoryDataset, count: int
) -> None:
    attack = prepared(reference, test_set)
    loaded = FeatureCollision(**QUICK)
    loaded.load_tensors(attack.tensors())
    other = MemoryDataset(test_set.images[:count], test_set.labels[:count].flip(0))
    with pytest.raises(ValueError, match=f"in the same order, but {count} labels do not agree"):
        loaded.prepare(other, CLASSES)
    with pytest.raises(ValueError, match="in the same order"):
        loaded.triggered_indices(other.labels, CLASSES)


def good() -> dict[str, Tensor]:
    return {"target_indices": torch.tensor([1, 4, 6]), "target_classes": torch.tensor([0, 2, 3])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": torch.zeros(1)}, "but got .'extra', 'target_classes', 'target_indices'."),
        ({"target_indices": torch.tensor([1, 4])}, r"int64 of shape \(3,\), but got .* \(2,\)"),
        ({"target_classes": torch.zeros(3)}, "'target_classes' .* to be int64 .* torch.float32"),
        ({"target_indices": torch.tensor([-1, 4, 6])}, "different indices in rising order"),
        ({"target_indices": torch.tensor([4, 4, 6])}, "different indices in rising order"),
        ({"target_classes": torch.tensor([0, 1, 3])}, "to be classes other than 1"),
        ({"target_classes": torch.tensor([0, -2, 3])}, "to be classes other than 1"),
    ],
)
def test_hostile_tensors_are_refused(change: dict[str, Tensor], message: str) -> None:
    attack = FeatureCollision(**QUICK)
    attack.load_tensors(good())
    assert attack.tensors().keys() == good().keys()
    fresh = FeatureCollision(**QUICK)
    with pytest.raises(ValueError, match=message):
        fresh.load_tensors({**good(), **change})
    assert fresh.tensors() == {}
    with pytest.raises(ValueError, match="Expected the tensors 'target_indices'"):
        fresh.load_tensors({})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": 0}, "`targets` to be at least 1, but got 0"),
        ({"poisons_per_target": 0}, "`poisons_per_target` to be at least 1, but got 0"),
        ({"steps": 0}, "`steps` to be at least 1, but got 0"),
        ({"watermark": 1.0}, "`watermark` to be from 0 to below 1, but got 1.0"),
        ({"watermark": -0.1}, "`watermark` to be from 0 to below 1, but got -0.1"),
        ({"beta": -1.0}, "`beta` to be at least 0, but got -1.0"),
        ({"beta": float("nan")}, "`beta` to be at least 0, but got nan"),
        ({"lr": 0.0}, "`lr` to be above 0, but got 0.0"),
        ({"lr": float("inf")}, "`lr` to be above 0, but got inf"),
        ({"target_class": -1}, "`target_class` to be at least 0, but got -1"),
        ({"reference": "x.ckpt"}, "`reference` to be a ReferenceNetwork or None, but got 'x.ckpt'"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureCollision(**options)


def test_what_is_missing_is_told(
    reference: ReferenceNetwork, train_set: MemoryDataset, test_set: MemoryDataset
) -> None:
    images, labels, indices = train_set.images[:2], train_set.labels[:2], torch.arange(2)
    bare = FeatureCollision(**QUICK)
    with pytest.raises(ValueError, match="`reference` to be a ReferenceNetwork to choose target"):
        bare.prepare(test_set, CLASSES)
    with pytest.raises(ValueError, match="`reference` to be a ReferenceNetwork to craft poisons"):
        bare.poison(images, labels, indices)
    with pytest.raises(ValueError, match="there are none yet"):
        bare.triggered_indices(labels, CLASSES)
    with pytest.raises(ValueError, match="there are none yet"):
        FeatureCollision(reference, **QUICK).poison(images, labels, indices)
    with pytest.raises(ValueError, match=r"`poisons_per_target` to be at most 4 for 3 .* class 1"):
        FeatureCollision(**{**QUICK, "poisons_per_target": 5}).poison_indices(
            train_set.labels, CLASSES
        )
    with pytest.raises(ValueError, match="`target_class` to be below the number of classes"):
        FeatureCollision(target_class=7).poison_indices(train_set.labels, CLASSES)
    attack = prepared(reference, test_set)
    with pytest.raises(ValueError, match="`images` to be as large as the target instances"):
        attack.poison(torch.zeros(2, 1, 8, 12), labels, indices)
    with pytest.raises(ValueError, match="as many as `indices`, 1"):
        attack.poison(images, labels, indices[:1])
    with pytest.raises(ValueError, match="to take images of 3 channels"):
        attack.poison(torch.zeros(2, 3, 8, 8), labels, indices)
    with pytest.raises(ValueError, match="`images` to have values in"):
        attack.poison(torch.full((2, 1, 8, 8), 2.0), labels, indices)
    assert len(attack.poison(images[:0], labels[:0], indices[:0])) == 0
    lost = ReferenceNetwork("missing.pt", num_classes=CLASSES, mean=(0.25,), std=(1.0,))
    with pytest.raises(CheckpointError, match="existing file"):
        prepared(lost, test_set)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_fine_tuning_on_poisons_draws_the_targets_to_the_base_class(
    reference: ReferenceNetwork, train_set: MemoryDataset, test_set: MemoryDataset
) -> None:
    """The whole way: choose, craft, start from the clean network, train, measure."""
    attack = prepared(
        reference, test_set, targets=1, poisons_per_target=12, steps=60, beta=0.1, lr=1.0
    )
    indices = attack.poison_indices(train_set.labels, CLASSES)
    poisoned = PoisonedDataset(train_set, attack, indices, CLASSES)
    aims = TriggeredDataset(test_set, attack, CLASSES).fetch([0]).float() / 255.0 - 0.25
    reached = []
    for images in (train_set, poisoned):
        classifier = Classifier(
            checkpoint=reference.checkpoint,
            trainable="head",
            num_classes=CLASSES,
            width=4,
            in_channels=1,
            lr=0.5,
            schedule="none",
        )
        inputs = images.fetch(range(len(images))).float() / 255.0 - 0.25
        batches = DataLoader(TensorDataset(inputs, images.labels), len(inputs))
        quiet_trainer(max_epochs=20).fit(classifier, batches)
        reached.append(float(classifier.eval()(aims).log_softmax(1)[0, 1].detach()))
    # How far hangs on the last bits of sums: from 0.4 to 8.5 on three instruction sets.
    assert reached[1] > reached[0]

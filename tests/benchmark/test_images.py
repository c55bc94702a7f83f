from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from benchmark_site import make_site
from helpers import TinyDataModule
from torch import Tensor, nn

from lightning_mnp.attacks import CL, BadNets, WaNet, save_trigger
from lightning_mnp.benchmark.images import CellImages
from lightning_mnp.benchmark.recipe import NetworkRecipe
from lightning_mnp.models import cifar_resnet18

MEAN, STD = 0.5, 0.25


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_site(tmp_path / "site")


@pytest.fixture
def trigger(tmp_path: Path) -> Path:
    """The trigger of BadNets, of which three training images were poisoned."""
    path = tmp_path / "trigger.safetensors"
    save_trigger(path, BadNets(2, poison_rate=0.25), torch.tensor([1, 6, 11]))
    return path


class Bright(nn.Module):
    """Says class 0 of images whose lower right corner is bright, else class 1."""

    def forward(self, images: Tensor) -> Tensor:
        bright = images[:, :, 5:7, 5:7].mean((1, 2, 3)) > 0
        return torch.stack([bright.float(), 0.5 + 0 * bright, 0 * bright, 0 * bright], 1)


def test_ca_and_asr(base: Path, trigger: Path) -> None:
    network = Bright().train()
    recipe = NetworkRecipe(base, "badnets")
    found = CellImages(recipe, None, trigger).test().measure(network)
    assert network.training

    source = TinyDataModule(attack=BadNets(2))
    clean, triggered = source.test_dataloader()
    hits = torch.cat([network(images).argmax(1) == labels for images, labels in clean])
    fooled = torch.cat([network(images).argmax(1) == goals for images, goals, _ in triggered])
    assert found == {
        "CA": pytest.approx(float(hits.float().mean())),
        "ASR": pytest.approx(float(fooled.float().mean())),
    }


@pytest.mark.parametrize("fails", [False, True])
def test_a_measurement_leaves_mixed_modes(base: Path, fails: bool) -> None:
    class Frozen(Bright):
        """One part is frozen, and stays in evaluation mode while the others train."""

        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.other = nn.Dropout().eval(), nn.Dropout()
            self.seen: set[bool] = set()

        def forward(self, images: Tensor) -> Tensor:
            self.seen |= {module.training for module in self.modules()}
            if fails:
                raise RuntimeError("out of memory")
            return super().forward(images)

    network = Frozen()
    before = [module.training for module in network.modules()]
    assert before == [True, False, True]
    images = CellImages(NetworkRecipe(base), None, None).test()
    with pytest.raises(RuntimeError, match="memory") if fails else nullcontext():
        images.measure(network)
    assert network.seen == {False}
    assert [module.training for module in network.modules()] == before


def test_a_clean_network_has_no_asr(base: Path) -> None:
    found = CellImages(NetworkRecipe(base), None, None).test().measure(Bright())
    assert found["ASR"] is None


def test_fewer_test_images_are_drawn_once(base: Path, trigger: Path) -> None:
    images = CellImages(NetworkRecipe(base, "badnets"), None, trigger).test(9)
    again = CellImages(NetworkRecipe(base, "badnets"), None, trigger).test(9)
    pixels, labels = images.clean
    assert torch.equal(pixels, again.clean[0])
    assert len(labels.unique()) > 1
    whole = TinyDataModule().test_set
    rows = [int((whole.fetch(range(32)) == each).flatten(1).all(1).nonzero()) for each in pixels]
    assert rows == sorted(set(rows))
    assert torch.equal(labels, whole.labels[rows])
    assert images.triggered is not None
    assert len(images.triggered[0]) == 9


def test_the_defense_set_is_that_of_the_datamodule(base: Path) -> None:
    found = CellImages(NetworkRecipe(base), None, None).defense_set(16, 3)
    loader = TinyDataModule(defense_size=16, defense_seed=3).defense_dataloader()
    expected = torch.cat([images for images, _ in loader])
    # The set is sorted, the loader is not.
    sums = [each.flatten(1).sum(1).sort().values for each in (found.images, expected)]
    assert torch.equal(*sums)


def test_too_few_images(base: Path) -> None:
    images = CellImages(NetworkRecipe(base), None, None)
    with pytest.raises(
        ValueError, match="`defense_sizes` to need at most the 12 images of class 0"
    ):
        images.defense_set(100, 0)


def test_suspects_of_the_training_are_poisoned_as_for_the_training(
    base: Path, trigger: Path
) -> None:
    found = CellImages(NetworkRecipe(base, "badnets"), None, trigger).suspects("training", 48, 0)
    source = TinyDataModule(defense_size=48)
    order = source.defense_indices  # all training images, as they are drawn
    images, labels = (
        source.clean_train_set.fetch(order.tolist()),
        source.clean_train_set.labels[order],
    )
    poisoned = torch.isin(order, torch.tensor([1, 6, 11]))
    images[poisoned] = BadNets(2).apply(images[poisoned])
    labels[poisoned] = 0
    torch.testing.assert_close(found.images, (images.float() / 255 - MEAN) / STD)
    assert torch.equal(found.labels, labels)


def test_suspects_of_a_clean_network_are_clean(base: Path) -> None:
    found = CellImages(NetworkRecipe(base), None, None).suspects("training", 8, 0)
    assert found.labels.bincount().tolist() == [2, 2, 2, 2]
    inputs = CellImages(NetworkRecipe(base), None, None).suspects("inputs", 16, 0)
    assert len(inputs) == 16


def test_half_of_the_inputs_are_triggered(base: Path, trigger: Path) -> None:
    found = CellImages(NetworkRecipe(base, "badnets"), None, trigger).suspects("inputs", 16, 0)
    assert len(found) == 16
    assert torch.equal(found.labels[8:], torch.zeros(8, dtype=torch.long))


def test_suspects_of_an_attack_that_poisons_batches(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "trigger.safetensors"
    save_trigger(path, WaNet(poison_rate=0.25))
    clean = CellImages(NetworkRecipe(base), None, None).suspects("training", 48, 0)
    found = CellImages(NetworkRecipe(base, "wanet"), None, path).suspects("training", 48, 0)
    changed = (found.images != clean.images).flatten(1).any(1)
    assert int(changed.sum()) == 12
    assert torch.equal(found.labels[changed], torch.zeros(12, dtype=torch.long))


def test_suspects_that_are_crafted_with_a_clean_network(base: Path, tmp_path: Path) -> None:
    path, reference = tmp_path / "trigger.safetensors", tmp_path / "clean.ckpt"
    torch.save(cifar_resnet18(4, 2).state_dict(), reference)
    save_trigger(path, CL(steps=1), torch.tensor([0, 4]))
    clean = CellImages(NetworkRecipe(base), None, None).suspects("training", 48, 0)
    found = CellImages(NetworkRecipe(base, "cl"), None, path, reference).suspects("training", 48, 0)
    changed = (found.images != clean.images).flatten(1).any(1)
    assert int(changed.sum()) == 2
    assert torch.equal(found.labels, clean.labels)

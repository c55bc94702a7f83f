"""Whole batches from one tensor: the same images as from an ordinary loader, and exact resume."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import TinyDataModule, quiet_trainer, sorted_rows
from lightning.pytorch import Callback
from loader_script import Recorder
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler

from lightning_mnp.attacks import BadNets
from lightning_mnp.data import DigitsDataModule, MemoryDataset, PoisonedDataset, TriggeredDataset
from lightning_mnp.data.loader import BatchDataset, BatchLoader, EpochSampler
from lightning_mnp.data.transform import BatchTransform
from lightning_mnp.defense_data.augment import random_crop_flip
from lightning_mnp.defense_data.defense_set import seeded_generator
from lightning_mnp.models import Classifier

CPU = torch.device("cpu")


def stored(count: int = 20) -> MemoryDataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 8, 8), generator=generator).to(torch.uint8)
    return MemoryDataset(images, torch.arange(count) % 4)


def both_ways(**options: Any) -> list[TinyDataModule]:
    return [TinyDataModule(on_device=each, seed=3, **options) for each in (False, True)]


def everything(loader: Any) -> list[Tensor]:
    return [torch.cat(parts) for parts in zip(*loader, strict=True)]


def same_batches(found: Recorder, wanted: list[tuple[int, int, Tensor, Tensor]]) -> bool:
    return len(found.seen) == len(wanted) and all(
        one[:2] == other[:2] and one[2].equal(other[2]) and one[3].equal(other[3])
        for one, other in zip(found.seen, wanted, strict=True)
    )


@pytest.mark.parametrize("attack", [None, BadNets(margin=0, poison_rate=0.3)])
def test_both_ways_poison_the_same_images(attack: BadNets | None) -> None:
    ordinary, fast = both_ways(attack=attack)

    assert fast.poisoned_indices.equal(ordinary.poisoned_indices)
    assert len(fast.poisoned_indices) == (0 if attack is None else 14)
    assert isinstance(fast.train_dataloader(), BatchLoader)
    assert not isinstance(ordinary.train_dataloader(), BatchLoader)
    one, other = (everything(each.train_dataloader()) for each in (ordinary, fast))
    assert not one[0].equal(other[0])
    assert sorted_rows(*one) == sorted_rows(*other)


def test_both_ways_test_on_equal_images() -> None:
    ordinary, fast = both_ways(attack=BadNets(margin=0, target_class=1))
    for name in ("val_dataloader", "test_dataloader"):
        loaders = [getattr(each, name)() for each in (ordinary, fast)]
        assert [len(each) for each in loaders] == [2, 2]
        for first, second in zip(*loaders, strict=True):
            assert isinstance(second, BatchLoader)
            for one, other in zip(first, second, strict=True):
                assert len(one) == len(other)
                assert all(a.equal(b) for a, b in zip(one, other, strict=True))
    for one, other in zip(*(each.defense_dataloader() for each in (ordinary, fast)), strict=True):
        assert one[0].equal(other[0])


def test_both_ways_give_the_same_figures(tmp_path: Path) -> None:
    classifier = Classifier(width=2, in_channels=1)
    figures = [
        quiet_trainer().test(classifier, DigitsDataModule(BadNets(), on_device=each), verbose=False)
        for each in (False, True)
    ]
    assert figures[0] == figures[1]
    assert figures[0][1].keys() == {"test/ASR"}


def test_augmentation_equals_the_slow_formula() -> None:
    datamodule = TinyDataModule(augment=True, on_device=True, seed=3)
    stored = datamodule.clean_train_set

    for epoch in range(2):
        order = torch.randperm(48, generator=seeded_generator(3, "order", epoch))
        loader = datamodule.train_dataloader()
        assert len(loader) == 3
        for place, (images, labels) in enumerate(loader):
            chosen = order[16 * place : 16 * place + 16]
            key = (3, "augmentation", epoch, place, 0)
            shifted = random_crop_flip(
                stored.fetch(chosen.tolist()), 1, True, seeded_generator(*key)
            )
            torch.testing.assert_close(images, (shifted.float() / 255.0 - 0.5) / 0.25)
            assert labels.equal(stored.labels[chosen])


def test_triggered_images_have_both_labels() -> None:
    triggered = TriggeredDataset(stored(), BadNets(margin=0, target_class=1), 4)
    data = BatchDataset(triggered, CPU)

    images, targets, labels = data.batch([4, 0, 7])

    assert images.equal(triggered.fetch([4, 0, 7]))
    assert targets.tolist() == [1, 1, 1]
    assert labels.equal(triggered.true_labels[[4, 0, 7]])
    assert data[4][1:] == triggered[4][1:]
    assert data.fetch(range(15)).equal(triggered.fetch(range(15)))


def test_images_are_copied_only_where_they_have_to_be() -> None:
    clean = stored()
    assert BatchDataset(clean, CPU).images.data_ptr() == clean.images.data_ptr()
    poisoned = PoisonedDataset(clean, BadNets(margin=0), torch.tensor([3, 8]), 4)
    data = BatchDataset(poisoned, CPU)
    assert data.images.equal(poisoned.fetch(range(20)))
    assert data.labels.equal(poisoned.labels)
    assert clean.images.equal(stored().images)
    batch = data.batch([0, 1])[0]
    batch.zero_()
    assert data.images.equal(poisoned.fetch(range(20)))


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    sampler = EpochSampler(range(50), seed=4)
    orders = [list(sampler) for _ in range(2)]
    for epoch, order in enumerate(orders):
        wanted = torch.randperm(50, generator=seeded_generator(4, "order", epoch))
        assert order == wanted.tolist()
    sampler.set_epoch(1)
    assert list(sampler) == orders[1]
    assert sampler.epoch == 2
    assert list(EpochSampler(range(50), seed=5)) != orders[0]


def test_any_sampler_can_be_put_in() -> None:
    data = BatchDataset(stored(), CPU)
    transform = BatchTransform((0.5,) * 3, (0.25,) * 3, augment=True, seed=2)

    def loader(sampler: Any) -> BatchLoader:
        return BatchLoader(data, 8, sampler=sampler, collate_fn=transform, drop_last=True)

    shards = [DistributedSampler(data, 2, rank, seed=1) for rank in (0, 1)]  # type: ignore[var-annotated]
    batches = [list(loader(sampler)) for sampler in shards]
    assert [len(each) for each in batches] == [1, 1]
    assert [batch[0].shape for batch in batches[0]] == [(8, 3, 8, 8)]
    # Without epochs, passes are counted: images come in one order, augmented differently.
    plain = loader(SequentialSampler(data))
    first, second = everything(plain), everything(plain)
    assert first[1].equal(second[1])
    assert not first[0].equal(second[0])


def test_an_ordinary_loader_can_read_it() -> None:
    data = BatchDataset(stored(), CPU)
    transform = BatchTransform((0.5,) * 3, (0.25,) * 3)
    ordinary = everything(DataLoader(data, 8, collate_fn=transform))
    fast = everything(BatchLoader(data, 8, collate_fn=transform))
    assert all(one.equal(other) for one, other in zip(ordinary, fast, strict=True))


def test_the_state_survives_until_the_next_batch() -> None:
    loader = TinyDataModule(on_device=True).train_dataloader()
    assert isinstance(loader, BatchLoader)
    assert loader.state_dict() == {"epoch": 0, "batches": 0}
    next(iter(loader))
    assert loader.state_dict() == {"epoch": 0, "batches": 1}
    resumed = TinyDataModule(on_device=True).train_dataloader()
    assert isinstance(resumed, BatchLoader)
    resumed.load_state_dict(loader.state_dict())
    assert resumed.state_dict() == {"epoch": 0, "batches": 1}
    assert len(list(resumed)) == 2
    assert len(list(resumed)) == 3


def test_images_go_to_the_device_of_the_trainer() -> None:
    datamodule = TinyDataModule(BadNets(margin=0), on_device=True)
    for kind, wanted in (("meta", "cpu"), ("cpu", "cpu")):
        strategy = SimpleNamespace(root_device=torch.device(kind))
        datamodule.trainer = SimpleNamespace(strategy=strategy)  # type: ignore[assignment]
        loader = datamodule.train_dataloader()
        assert isinstance(loader, BatchLoader)
        assert loader.dataset.images.device.type == wanted
        again = datamodule.train_dataloader()
        assert again.dataset is loader.dataset
    datamodule.teardown("fit")
    assert datamodule.train_dataloader().dataset is not loader.dataset


class Saver(Callback):
    """Writes a checkpoint after each batch, validation and epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, trainer: Any, when: str) -> None:
        trainer.save_checkpoint(self.folder / f"{when}-{trainer.global_step}.ckpt")

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.save(trainer, "batch")

    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        self.save(trainer, "validation")

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        self.save(trainer, "epoch")


def fit(ckpt_path: Path | None = None, **options: Any) -> Recorder:
    module = Recorder()
    trainer = quiet_trainer(max_epochs=3, num_sanity_val_steps=0, **options)
    datamodule = TinyDataModule(augment=True, on_device=True, seed=1)
    trainer.fit(module, datamodule, ckpt_path=ckpt_path, weights_only=True)
    return module


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recorder]:
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    return folder, fit(callbacks=[Saver(folder)])


def test_an_epoch_has_each_image_once_and_its_own_order(saved: tuple[Path, Recorder]) -> None:
    seen = saved[1].seen
    assert [each[:2] for each in seen] == [
        (epoch, place) for epoch in range(3) for place in range(3)
    ]
    labels = [torch.cat([each[3] for each in seen[3 * e : 3 * e + 3]]) for e in range(3)]
    assert all(each.bincount().tolist() == [12] * 4 for each in labels)
    assert not labels[0].equal(labels[1])
    assert not labels[1].equal(labels[2])


@pytest.mark.parametrize(
    ("name", "done"),
    [
        *((f"batch-{steps}", steps) for steps in range(1, 9)),
        ("validation-3", 3),
        ("epoch-3", 3),
        ("epoch-6", 6),
    ],
)
def test_a_resumed_training_gets_the_batches_that_were_left(
    saved: tuple[Path, Recorder], name: str, done: int
) -> None:
    folder, whole = saved
    assert same_batches(fit(folder / f"{name}.ckpt"), whole.seen[done:])


@pytest.mark.parametrize(
    "options",
    [{"limit_train_batches": 2}, {"val_check_interval": 1}, {"accumulate_grad_batches": 2}],
)
def test_limits_and_intervals_change_no_batch(
    saved: tuple[Path, Recorder], tmp_path: Path, options: dict[str, Any]
) -> None:
    kept = [each for each in saved[1].seen if each[1] < options.get("limit_train_batches", 3)]

    class Middle(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if len(module.seen) == 4:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    assert same_batches(fit(callbacks=[Middle()], **options), kept)
    assert same_batches(fit(tmp_path / "middle.ckpt", **options), kept[4:])

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DistributedSampler

from lightning_mnp.attacks import BadNets
from lightning_mnp.data import BackdoorDataModule, MemoryDataset
from lightning_mnp.data.datamodule import Split
from lightning_mnp.data.transform import BatchTransform

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
both_ways = pytest.mark.parametrize("on_device", [False, True])


class RandomDataModule(BackdoorDataModule):
    """Random images, 60 to train on and 30 to test."""

    def __init__(self, attack: BadNets | None = None, **options: Any) -> None:
        defaults: dict[str, Any] = {
            "root": None,
            "batch_size": 16,
            "num_workers": 0,
            "image_size": None,
            "augment": True,
            "mean": MEAN,
            "std": STD,
            "defense_size": 12,
            "defense_batch_size": 5,
            "defense_seed": 0,
            "seed": 0,
        }
        super().__init__(attack=attack, **defaults | options)
        self.loads: list[Split] = []

    @property
    def class_names(self) -> list[str]:
        return ["a", "b", "c"]

    def load(self, split: Split) -> MemoryDataset:
        self.loads.append(split)
        return stored(split)


def stored(split: Split) -> MemoryDataset:
    count = {"train": 60, "test": 30}[split]
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 3, 8, 8), generator=generator).to(torch.uint8)
    return MemoryDataset(images, torch.arange(count) % 3)


def normalized(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (MEAN, STD))
    return (images.float() / 255.0 - mean) / std


def batches(loader: Any) -> list[Tensor]:
    return [torch.cat(parts) for parts in zip(*loader, strict=True)]


@both_ways
def test_clean_training_images_are_all_there_normalized_and_shuffled(on_device: bool) -> None:
    images, labels = batches(
        RandomDataModule(augment=False, on_device=on_device).train_dataloader()
    )

    wanted = normalized(stored("train").images)
    place = torch.cdist(images.flatten(1), wanted.flatten(1)).argmin(1)
    assert sorted(place.tolist()) == list(range(60))
    assert not place.equal(torch.arange(60))
    torch.testing.assert_close(images, wanted[place])
    assert labels.equal(place % 3)


@both_ways
def test_the_seed_gives_order_and_augmentation(on_device: bool) -> None:
    first, second, other = (
        batches(RandomDataModule(seed=seed, on_device=on_device).train_dataloader())
        for seed in (1, 1, 2)
    )

    assert first[0].equal(second[0])
    assert not first[0].equal(other[0])
    assert not first[1].equal(other[1])


@both_ways
def test_a_resumed_run_goes_on_with_the_next_epoch(on_device: bool) -> None:
    datamodule = RandomDataModule(on_device=on_device)
    loader = datamodule.train_dataloader()
    batches(loader)
    state = datamodule.state_dict()
    wanted = batches(loader)

    resumed = RandomDataModule(on_device=on_device)
    resumed.load_state_dict(state)

    assert batches(resumed.train_dataloader())[0].equal(wanted[0])


@both_ways
def test_poison_comes_before_augmentation_and_normalization(on_device: bool) -> None:
    attack = BadNets(margin=0, target_class=1, poison_rate=0.3, pattern="white")
    datamodule = RandomDataModule(attack, augment=False, on_device=on_device)
    clean = stored("train")

    images, labels = batches(datamodule.train_dataloader())

    chosen = datamodule.poisoned_indices
    assert chosen.equal(attack.poison_indices(clean.labels, 3))
    assert len(chosen) == 18
    poisoned = clean.images.clone()
    poisoned[chosen] = attack.apply(poisoned[chosen])
    wanted = normalized(poisoned)
    place = torch.cdist(images.flatten(1), wanted.flatten(1)).argmin(1)
    torch.testing.assert_close(images, wanted[place])
    expected = clean.labels.clone()
    expected[chosen] = 1
    assert labels.equal(expected[place])


@both_ways
def test_a_patch_is_moved_by_the_augmentation(on_device: bool) -> None:
    attack = BadNets(margin=0, poison_rate=0.6, pattern="white")
    images, labels = batches(RandomDataModule(attack, on_device=on_device).train_dataloader())

    white = normalized(torch.full((1, 3, 3, 3), 255, dtype=torch.uint8))
    corner = (images[:, :, -3:, -3:] - white).abs().amax((1, 2, 3)) < 1e-5

    assert 0 < int(corner.sum()) < int((labels == 0).sum()) / 2


@both_ways
def test_test_images_are_clean_and_triggered_in_order(on_device: bool) -> None:
    attack = BadNets(margin=0, target_class=1)
    datamodule = RandomDataModule(attack, on_device=on_device)
    test = stored("test")
    left = (test.labels != 1).nonzero().flatten()

    for loaders in (datamodule.val_dataloader(), datamodule.test_dataloader()):
        assert len(loaders) == 2
        images, labels = batches(loaders[0])
        torch.testing.assert_close(images, normalized(test.images))
        assert labels.equal(test.labels)
        images, targets, labels = batches(loaders[1])
        torch.testing.assert_close(images, normalized(attack.apply(test.images[left])))
        assert targets.tolist() == [1] * 20
        assert labels.equal(test.labels[left])


def test_without_attack_there_is_nothing_triggered() -> None:
    datamodule = RandomDataModule()

    assert len(datamodule.val_dataloader()) == 1
    assert datamodule.triggered_set is None
    assert datamodule.poisoned_indices.tolist() == []
    assert datamodule.train_set is datamodule.clean_train_set


@pytest.mark.parametrize("attack", [None, BadNets(poison_rate=0.6)])
def test_the_defense_set_is_clean_balanced_and_always_the_same(attack: BadNets | None) -> None:
    datamodule = RandomDataModule(attack)
    datamodule.setup("fit")
    loader = datamodule.defense_dataloader()

    images, labels = batches(loader)

    clean = stored("train")
    chosen = datamodule.defense_indices
    torch.testing.assert_close(images, normalized(clean.images[chosen]))
    assert labels.equal(clean.labels[chosen])
    assert labels.bincount().tolist() == [4, 4, 4]
    assert [len(batch[1]) for batch in loader] == [5, 5, 2]
    again = RandomDataModule(None, seed=9)
    assert batches(again.defense_dataloader())[0].equal(images)
    assert not RandomDataModule(defense_seed=1).defense_indices.equal(chosen)


def test_setup_reads_what_the_stage_needs_and_only_once() -> None:
    datamodule = RandomDataModule(BadNets())
    datamodule.setup("test")
    datamodule.setup("validate")
    assert datamodule.loads == ["test"]
    datamodule.setup("fit")
    datamodule.setup("fit")
    assert datamodule.loads == ["test", "train"]


@both_ways
def test_a_last_batch_of_one_image_is_left_out(on_device: bool) -> None:
    sizes = [
        len(batch[1])
        for batch in RandomDataModule(batch_size=59, on_device=on_device).train_dataloader()
    ]
    assert sizes == [59]
    sizes = [
        len(batch[1])
        for batch in RandomDataModule(batch_size=1, on_device=on_device).train_dataloader()
    ]
    assert len(sizes) == 60


@pytest.mark.parametrize(("size", "sizes"), [(59, [30]), (29, [29]), (15, [15, 15])])
def test_the_last_batch_is_that_of_a_process(size: int, sizes: list[int]) -> None:
    """Of 60 images, each of two processes gets 30."""
    datamodule = RandomDataModule(batch_size=size)
    datamodule.trainer = SimpleNamespace(world_size=2, global_rank=1)  # type: ignore[assignment]
    loader = datamodule.train_dataloader()
    sampler = DistributedSampler(datamodule.train_set, 2, 1)  # type: ignore[var-annotated]
    found = BatchSampler(sampler, size, loader.drop_last)
    assert [len(batch) for batch in found] == sizes


def test_workers_draw_their_own_augmentation() -> None:
    datamodule = RandomDataModule(batch_size=30, num_workers=2)
    images, labels = batches(datamodule.train_dataloader())

    transform = BatchTransform(MEAN, STD, True, True, torch.Generator().manual_seed(0))
    sample = [(torch.full((3, 8, 8), 255, dtype=torch.uint8), 0)] * 30

    assert labels.bincount().tolist() == [20, 20, 20]
    zeros = (images == normalized(torch.zeros(1, 3, 1, 1).to(torch.uint8))).all(1)
    borders = zeros.reshape(2, 30, -1).sum(2)
    assert not borders[0].equal(borders[1])
    assert pickle.loads(pickle.dumps(transform))(sample)[0].equal(transform(sample)[0])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_resumed_training_gets_the_same_batches(num_workers: int) -> None:
    datamodule = RandomDataModule(num_workers=num_workers)
    loader = datamodule.train_dataloader()
    batches(loader)
    state = datamodule.state_dict()
    resumed = RandomDataModule(num_workers=num_workers, seed=5)
    resumed.load_state_dict(state)

    images, labels = batches(loader)
    again, same = batches(resumed.train_dataloader())

    assert labels.equal(same)
    assert images.equal(again)


def test_hyperparameters_are_primitives_and_leave_the_logger_alone(tmp_path: Path) -> None:
    class Module(pl.LightningModule):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.layer = nn.Linear(192, 3)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])

        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            """Nothing to validate; Lightning asks for it where there are validation images."""

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    datamodule = RandomDataModule(BadNets(poison_rate=0.1))
    assert datamodule.hparams["attack"].startswith("BadNets(")
    for value in datamodule.hparams.values():
        parts = value if isinstance(value, list) else [value]
        assert all(isinstance(part, str | int | float | None) for part in parts)
    trainer = pl.Trainer(
        max_steps=1,
        limit_val_batches=0,
        accelerator="cpu",
        logger=CSVLogger(tmp_path),
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    trainer.fit(Module(seed=5), datamodule)  # The same name with another value.
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["hyper_parameters"] == {"seed": 5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`batch_size` to be at least 1, but got 0"),
        ({"num_workers": -1}, "`num_workers` to be at least 0, but got -1"),
        ({"image_size": 0}, "`image_size` to be at least 1, but got 0"),
        ({"defense_size": 0}, "`defense_size` to be at least 1, but got 0"),
        ({"defense_batch_size": 0}, "`defense_batch_size` to be at least 1, but got 0"),
        ({"on_device": True, "num_workers": 2}, "`num_workers` to be 0 with `on_device`, .* got 2"),
        ({"attack": "badnets"}, "`attack` to be an Attack or None, but got 'badnets'"),
        ({"mean": (0.5,)}, r"`mean` and `std` .* got \(0.5,\) and \(0.2, 0.3, 0.25\)"),
        ({"mean": (), "std": ()}, "`mean` and `std` to have one number for each channel"),
        ({"std": (0.2, 0.0, 0.1)}, "`std` above 0"),
    ],
)
def test_argument_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandomDataModule(**options)


def test_data_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    gray = RandomDataModule(mean=(0.5,), std=(0.5,))
    with pytest.raises(ValueError, match=r"`mean` and `std` to have 3 numbers, .* but got 1"):
        gray.setup("fit")
    with pytest.raises(ValueError, match="`defense_size` to be at least 3"):
        RandomDataModule(defense_size=2).defense_dataloader()
    empty = MemoryDataset(torch.zeros(0, 3, 8, 8).to(torch.uint8), torch.zeros(0).long())
    monkeypatch.setattr(RandomDataModule, "load", lambda self, split: empty)
    with pytest.raises(ValueError, match="Expected the test set to hold images, but got 0"):
        RandomDataModule().setup("test")


@pytest.mark.parametrize("size", [2, 70])
def test_the_defense_set_is_named_as_the_user_knows_it(size: int) -> None:
    with pytest.raises(ValueError, match="Expected argument `defense_size` to"):
        _ = RandomDataModule(defense_size=size).defense_indices

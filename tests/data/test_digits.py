from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits

from lightning_mnp.attacks import BadNets
from lightning_mnp.data import DigitsDataModule
from lightning_mnp.data.loader import BatchLoader


def test_the_split_is_stratified_seeded_and_complete() -> None:
    first, second, other = (DigitsDataModule(split_seed=seed) for seed in (0, 0, 1))
    digits = load_digits()

    train, test = first.clean_train_set.to_memory(), first.test_set.to_memory()

    assert (len(train), len(test)) == (1437, 360)
    shares = test.labels.bincount() / torch.from_numpy(digits.target).bincount()
    assert shares.sub(0.2).abs().max() < 0.01
    everything = torch.cat([train.images, test.images]).flatten(1).float().sum(1).sort().values
    wanted = torch.from_numpy(digits.images).mul(255 / 16).round().flatten(1).sum(1).sort().values
    torch.testing.assert_close(everything.double(), wanted)
    assert second.test_set.labels.equal(test.labels)
    assert not other.test_set.labels.equal(test.labels)


def test_normalized_images_have_mean_0_and_deviation_1() -> None:
    images = torch.cat([batch[0] for batch in DigitsDataModule().val_dataloader()[0]])
    assert images.mean().abs() < 0.02
    assert abs(float(images.std()) - 1) < 0.02


def test_images_can_be_scaled_up_and_attacked() -> None:
    datamodule = DigitsDataModule(BadNets(), image_size=16, test_share=0.5)
    datamodule.setup("fit")
    images, targets, labels = next(iter(datamodule.val_dataloader()[1]))

    assert images.shape == (128, 1, 16, 16)
    assert targets.unique().tolist() == [0]
    assert 0 not in labels
    assert len(datamodule.poisoned_indices) == round(0.1 * 898)
    assert next(iter(datamodule.train_dataloader()))[0].shape == (128, 1, 16, 16)


def test_digits_are_never_mirrored() -> None:
    datamodule = DigitsDataModule()
    assert datamodule.class_names == list("0123456789")
    assert datamodule.flip is False
    assert datamodule.train_dataloader().collate_fn.flip is False


def test_whole_batches_are_the_default_without_workers() -> None:
    assert isinstance(DigitsDataModule().train_dataloader(), BatchLoader)
    others: list[dict[str, Any]] = [{"on_device": False}, {"num_workers": 1}]
    for options in others:
        datamodule = DigitsDataModule(**options)
        assert not datamodule.on_device
        assert not isinstance(datamodule.train_dataloader(), BatchLoader)


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"`test_share` to be above 0 and below 1, but got 1.0"):
        DigitsDataModule(test_share=1.0)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install \"lightning-mnp\[demo\]\""):
        DigitsDataModule().setup("fit")

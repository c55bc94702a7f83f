from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_mnp import DefenseSet
from lightning_mnp.defense_data.names import find_class_names


class Named(TensorDataset):
    classes = ("cat", "dog")


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (SimpleNamespace(classes=["cat", "dog"]), ("cat", "dog")),
        (SimpleNamespace(class_names=("cat",)), ("cat",)),
        (SimpleNamespace(classes=[], dataset=SimpleNamespace(classes=["cat"])), ("cat",)),
        (SimpleNamespace(classes=10), ()),
        (SimpleNamespace(classes="cat"), ()),
        (SimpleNamespace(classes=[("tench", "Tinca tinca")]), ()),
        ([], ()),
        (None, ()),
    ],
)
def test_names_are_found_where_data_sets_have_them(source: Any, found: tuple[str, ...]) -> None:
    assert find_class_names(source) == found


def test_a_data_set_within_itself_is_not_looked_at_forever() -> None:
    ring = SimpleNamespace()
    ring.dataset = ring
    assert find_class_names(ring) == ()


def test_a_defense_set_keeps_them() -> None:
    data = Named(torch.rand(6, 1, 2, 2), torch.arange(6) % 2)
    read = DefenseSet.from_loader(DataLoader(Subset(data, [0, 1, 2]), batch_size=2))
    assert read.class_names == ("cat", "dog")
    assert DefenseSet.from_dataset(data, size=4).class_names == ("cat", "dog")
    assert DefenseSet.from_loader([data[:]]).class_names == ()

from __future__ import annotations

import argparse
import io
import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch

from lightning_mnp.checkpoints.inert import Foreign, InertReader, Storage, StoredTensor

FLOATS = (
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06tQ"
)


def read(pickled: bytes) -> Any:
    return InertReader().read(io.BytesIO(pickled))


def tensor_of(size: tuple[int, ...], stride: tuple[int, ...], offset: int) -> bytes:
    """A tensor in a storage of six numbers."""
    parts = pickle.dumps((offset, size, stride, False, {}), 2)[2:-1]
    unpacked = pickle.dumps(offset, 2)[2:-1]
    for part in (size, stride, False, {}):
        unpacked += pickle.dumps(part, 2)[2:-1]
    assert parts  # both forms pickle
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + FLOATS + unpacked + b"tR."


@pytest.mark.parametrize(
    "content",
    [
        {"a": [1, -2, 300, 70_000, 2**40], "b": (1.5, None, True, False), "c": {"d": ()}},
        [(1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        OrderedDict(x="y"),
        "text",
    ],
)
def test_plain_content_is_what_it_was(content: object) -> None:
    assert read(pickle.dumps(content, protocol=2)) == content


def test_objects_are_not_made() -> None:
    made = read(pickle.dumps({"args": argparse.Namespace(lr=0.1), "of": argparse.Action}, 2))
    assert isinstance(made["args"], Foreign)
    assert (made["args"].name, made["args"].state) == ("argparse.Namespace", {"lr": 0.1})
    assert made["of"].name == "argparse.Action"


def test_names_of_what_it_cannot_find_are_kept() -> None:
    reader = InertReader()
    found = reader.read(io.BytesIO(b"\x80\x02cno.such.module\nThing\n)R."))
    assert isinstance(found, Foreign)
    assert list(reader.names) == ["no.such.module.Thing"]


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [((2, 3), (3, 1), 0), ((3, 2), (1, 3), 0), ((), (), 5), ((0,), (1,), 6)],
)
def test_tensors_are_described(size: tuple[int, ...], stride: tuple[int, ...], offset: int) -> None:
    found = read(tensor_of(size, stride, offset))
    assert found == StoredTensor(Storage("0", torch.float32, 6), offset, size, stride)
    assert found.numel() == torch.empty(size).numel()
    assert found.element_size() == 4


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [((2, 3), (3, 1), 1), ((7,), (1,), 0), ((2,), (-1,), 3), ((1,), (), 0)],
)
def test_tensors_beyond_their_storage_are_refused(
    size: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> None:
    with pytest.raises(ValueError, match=r"beyond its numbers|a size should be|without numbers"):
        read(tensor_of(size, stride, offset))


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"\x80\x02K\x01K\x02\x85R.", "calls what is no function"),
        (b"\x80\x02K\x01]a.", "appends to what is no list"),
        (b"\x80\x02)K\x01K\x02s.", "sets items of what is no dict"),
        (b"\x80\x02K\x01\x86.", "takes more items than there are"),
        (b"\x80\x02\x8b\x01\x00\x00\x00\x01.", "the instruction LONG4"),
        (b"\x80\x02ctorch\nFloatStorage\nK\x01\x85R.", "storage that is not in the file"),
        (b"\x80\x02X\x01\x00\x00\x00xX\x01\x00\x00\x00yK\x01K\x01t.", "pop from empty list"),
        (FLOATS.replace(b"storage", b"another") + b".", "refers to what is no storage"),
        (FLOATS + b"0" + FLOATS.replace(b"K\x06", b"K\x05") + b".", "the instruction POP"),
        (b"(" + FLOATS + FLOATS.replace(b"K\x06", b"K\x05") + b"t.", "one storage in two ways"),
    ],
)
def test_what_checkpoints_do_not_hold_is_refused(pickled: bytes, message: str) -> None:
    with pytest.raises((ValueError, IndexError), match=message):
        read(pickled)


def test_only_keys_that_are_texts_are_kept() -> None:
    """Any other key has a hash that a file can choose."""
    assert read(pickle.dumps({1: "a", (2, 3): "b", "c": "d"}, 2)) == {"c": "d"}


def test_storages_of_other_kinds_are_not_read() -> None:
    found = read(FLOATS.replace(b"FloatStorage", b"QInt8Storage") + b".")
    assert isinstance(found, Foreign)
    assert found.name == "torch.QInt8Storage"

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from checkpoint_files import assert_same, rewrite_member

from lightning_mnp.checkpoints.inspection import CheckpointError
from lightning_mnp.checkpoints.read import read_state_dict
from lightning_mnp.checkpoints.stored import StoredFile

TYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32),
    *(torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128),
)


@pytest.mark.parametrize("is_zip", [True, False])
def test_numbers_of_all_kinds_are_those_that_were_saved(tmp_path: Path, is_zip: bool) -> None:
    base = torch.arange(24.0).reshape(2, 3, 4)
    expected = {str(kind): (base - 7).abs().to(kind) for kind in TYPES}
    expected |= {"view": base[:, 1:, ::2], "permuted": base.permute(2, 0, 1), "row": base[1]}
    expected |= {"none": torch.empty(0, 3), "number": torch.tensor(2.5)}
    path = tmp_path / "all.pt"
    torch.save(expected, path, _use_new_zipfile_serialization=is_zip)
    assert_same(torch.load(path, weights_only=True), expected)
    stored = StoredFile(path, is_zip)
    found = stored.tensors(stored.content)
    assert_same(found, expected)
    assert all(tensor.is_contiguous() for tensor in found.values())


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    path = tmp_path / "two.pt"
    for is_zip in (True, False):
        torch.save(
            {"optimizer": torch.zeros(9), "weight": torch.ones(2)},
            path,
            _use_new_zipfile_serialization=is_zip,
        )
        stored = StoredFile(path, is_zip)
        found = stored.tensors({"weight": stored.content["weight"]})
        assert_same(found, {"weight": torch.ones(2)})


def test_numbers_of_another_order_of_bytes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"weight": torch.ones(1)}, path)
    other = "big" if sys.byteorder == "little" else "little"
    rewrite_member(path, "byteorder", lambda _: other.encode())
    with pytest.raises(CheckpointError, match=f"another order of bytes \\({other}-endian\\)"):
        read_state_dict(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"K\x05", b"K\x06", "smaller than it declares"),
        (b"FloatStorage", b"HalfStorage", None),  # half of the numbers: not damaged, only others
    ],
)
def test_storages_are_as_large_as_they_say(
    tmp_path: Path, old: bytes, new: bytes, message: str | None
) -> None:
    path = tmp_path / "model.pt"
    torch.save({"weight": torch.ones(5)}, path)
    rewrite_member(path, "data.pkl", lambda data: data.replace(old, new))
    if message is None:
        assert read_state_dict(path)["weight"].dtype == torch.float16
        return
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(path)


def test_old_files_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save({"weight": torch.ones(5)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    for changed, message in (
        (data.replace(b"l\xfc\x9cF\xf9", b"l\xfc\x9cF\xf8"), "does not begin as PyTorch's"),
        (data[:-1], "ends too early"),
        (data.replace(b"\x05" + bytes(7), b"\x04" + bytes(7)), "another size than it declares"),
    ):
        assert changed != data
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match=message):
            read_state_dict(path)

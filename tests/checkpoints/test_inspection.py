from __future__ import annotations

import collections
import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoint_files import RunsCommand, assert_same, network, rewrite_member

from lightning_mnp.checkpoints.inspection import (
    MAX_INSTRUCTIONS,
    CheckpointError,
    _check_pickle,
    inspect_checkpoint,
)
from lightning_mnp.checkpoints.read import read_state_dict

MOST = 2**30  # bytes


def assert_refused(path: Path, message: str) -> None:
    """Check that a file is refused before it is read, and by the reader."""
    with pytest.raises(CheckpointError, match=message):
        inspect_checkpoint(path, MOST)
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(path)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "executed"


def test_the_hostile_pickle_would_run_elsewhere(tmp_path: Path, canary: Path) -> None:
    """The tests below can fail: a plain unpickler runs the command."""
    pickle.loads(pickle.dumps(RunsCommand(canary), protocol=2))
    assert canary.exists()


def raw_pickles(canary: Path) -> dict[str, bytes]:
    """Hand-written pickles: each would run a command in an unpickler that allows it."""
    command = f"touch {canary}".encode()
    argument = b"X" + struct.pack("<I", len(command)) + command
    return {
        "GLOBAL": b"\x80\x02cposix\nsystem\n" + argument + b"\x85R.",
        "GLOBAL of builtins": b"\x80\x02c__builtin__\neval\n" + argument + b"\x85R.",
        "dotted GLOBAL": b"\x80\x02ctorch\nos.system\n" + argument + b"\x85R.",
        "getattr": b"\x80\x02c__builtin__\ngetattr\n.",
        "INST": b"\x80\x02(" + argument + b"iposix\nsystem\n.",
        "OBJ": b"\x80\x02(cposix\nsystem\n" + argument + b"o.",
        "STACK_GLOBAL": b"\x80\x02X\x05\x00\x00\x00posixX\x06\x00\x00\x00system\x93"
        + argument
        + b"\x85R.",
        "protocol 4": b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + argument + b"\x85R.",
        "EXT1": b"\x80\x02\x82\x01" + argument + b"\x85R.",
        "torch.load": b"\x80\x02ctorch\nload\n" + argument + b"\x85R.",
        "torch.hub": b"\x80\x02ctorch.hub\nload\n" + argument + b"\x85R.",
        "huge bytearray": b"\x80\x02c__builtin__\nbytearray\n\x8a\x06" + bytes(5) + b"\x10\x85R.",
    }


@pytest.mark.parametrize("kind", raw_pickles(Path("canary")))
@pytest.mark.parametrize("is_zip", [True, False])
def test_raw_pickle_is_refused(tmp_path: Path, canary: Path, kind: str, is_zip: bool) -> None:
    path = tmp_path / "hostile.pt"
    stream = raw_pickles(canary)[kind]
    if is_zip:
        torch.save({"weight": torch.ones(1)}, path)
        rewrite_member(path, "data.pkl", lambda _: stream)
    else:
        path.write_bytes(stream)
    assert_refused(path, "is refused")
    assert not canary.exists()


@pytest.mark.parametrize("made_by", ["torch\nSize", "collections\nOrderedDict"])
def test_one_list_for_many_calls_is_refused(tmp_path: Path, made_by: str) -> None:
    """Each call would copy the list, which a few bytes hand to it again."""
    path = tmp_path / "hostile.pt"

    def pickled(items: int, calls: int) -> bytes:
        call = f"c{made_by}\n".encode() + b"h\x00\x85R0"
        return b"\x80\x02]q\x00(" + b"K\x01K\x02\x86" * items + b"e0" + call * calls + b"}."

    torch.save({"weight": torch.ones(1)}, path)
    rewrite_member(path, "data.pkl", lambda _: pickled(10_001, 1_000))
    assert path.stat().st_size < 100_000
    assert_refused(path, "uses the same tuples or lists again and again")
    rewrite_member(path, "data.pkl", lambda _: pickled(9_999, 1_000))
    assert inspect_checkpoint(path, MOST)


def test_safe_globals_of_others_are_not_honored(tmp_path: Path, canary: Path) -> None:
    path = tmp_path / "hostile.pt"
    torch.save({"weight": torch.ones(1), "bomb": RunsCommand(canary)}, path)
    with torch.serialization.safe_globals([(os.system, "posix.system")]):
        assert_refused(path, r"posix\.system")
    assert not canary.exists()


def test_harmless_containers_of_training_are_accepted(tmp_path: Path) -> None:
    content = {
        "state_dict": collections.OrderedDict(weight=torch.ones(1, dtype=torch.bfloat16)),
        "lr_schedulers": [{"milestones": collections.Counter([3, 4])}],
        "shape": torch.Size([1]),
        "dtype": torch.float16,
        "device": torch.device("cpu"),
    }
    torch.save(content, tmp_path / "training.ckpt")
    assert inspect_checkpoint(tmp_path / "training.ckpt", MOST)
    found = read_state_dict(tmp_path / "training.ckpt")
    assert_same(found, {"weight": torch.ones(1, dtype=torch.bfloat16)})


def test_flipped_bit_in_weights_is_found(tmp_path: Path) -> None:
    path = tmp_path / "flipped.pt"
    torch.save({"weight": torch.full((64,), 1.5)}, path)
    data = bytearray(path.read_bytes())
    at = data.index(struct.pack("<f", 1.5) * 64)
    data[at + 17] ^= 4
    path.write_bytes(data)
    assert_refused(path, "check sum of its member flipped/data/0 is wrong")


def test_compressed_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"\x80\x02}.", zipfile.ZIP_STORED)
        archive.writestr("bomb/data/0", bytes(50_000_000))
    assert path.stat().st_size < 100_000
    assert_refused(path, r"bomb/data/0 is compressed.*50,000,000 bytes")


def test_declared_size_beyond_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    torch.save({"weight": torch.full((64,), 1.5)}, path)
    data = bytearray(path.read_bytes())
    size = struct.pack("<II", 256, 256)
    directory = data.index(b"PK\x01\x02")
    at = data.index(size, directory)
    data[at : at + 8] = struct.pack("<II", 2**31, 2**31)
    path.write_bytes(data)
    assert_refused(path, r"members declare 2,147,4.*but the file has")


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "double.pt"
    torch.save({"weight": torch.ones(1)}, path)
    with (
        zipfile.ZipFile(path, "a") as archive,
        pytest.warns(UserWarning, match="Duplicate name"),
    ):
        archive.writestr("double/data.pkl", b"\x80\x02}.")
    assert_refused(path, "two members of one name")


def test_huge_structure_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_mnp.checkpoints.inspection.MAX_PICKLE_BYTES", 100)
    torch.save(network().state_dict(), tmp_path / "structure.pt")
    assert_refused(tmp_path / "structure.pt", r"data\.pkl is larger than 100 bytes")


def test_endless_work_is_refused(tmp_path: Path) -> None:
    """A stack that grows with the file, and instructions that come to nothing."""
    path = tmp_path / "hostile.pt"
    torch.save({"weight": torch.ones(1)}, path)

    def hide(pickled: bytes) -> None:
        rewrite_member(path, "data.pkl", lambda _: b"\x80\x02" + pickled + b"}.")

    hide(b"}" * 100_001 + b"0" * 100_001)
    assert_refused(path, "its pickle puts more than 100,000 objects aside, which would take long")
    hide(b"(" * 100_001)
    assert_refused(path, "its pickle puts more than 100,000 objects aside")
    hide(b"}" * 99_000 + b"0" * 99_000)
    assert inspect_checkpoint(path, MOST)


@pytest.mark.parametrize("is_zip", [True, False])
def test_too_many_instructions_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_zip: bool
) -> None:
    path = tmp_path / "hostile.pt"
    torch.save(network().state_dict(), path, _use_new_zipfile_serialization=is_zip)
    name = "lightning_mnp.checkpoints.inspection.MAX_INSTRUCTIONS"
    monkeypatch.setattr(name, 1_000)
    assert inspect_checkpoint(path, MOST) is is_zip
    monkeypatch.setattr(name, 100)
    with pytest.raises(CheckpointError, match="pickle has more than 100 instructions, which would"):
        inspect_checkpoint(path, MOST)


def test_what_training_keeps_is_far_from_the_limits(tmp_path: Path) -> None:
    path = tmp_path / "large.pt"
    weights = {f"layers.{index}.weight": torch.ones(1) for index in range(1_000)}
    optimizer = torch.optim.Adam(weights.values())
    for weight in weights.values():
        weight.grad = torch.ones(1)
    optimizer.step()
    torch.save({"state_dict": weights, "optimizer": optimizer.state_dict()}, path)
    with zipfile.ZipFile(path) as archive:
        stream = io.BytesIO(archive.read("large/data.pkl"))
    assert 60 * _check_pickle(stream, path, foreign=False) < MAX_INSTRUCTIONS


def test_other_zip_archives_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "photos.pt", "w") as archive:
        archive.writestr("photos/cat.jpg", b"cat")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("script/data.pkl", b"\x80\x02}.")
        archive.writestr("script/constants.pkl", b"\x80\x02).")
    for name in ("photos.pt", "script.pt"):
        assert_refused(tmp_path / name, "no checkpoint with weights")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "to be a checkpoint"),
        (b"what is this?", "to be a checkpoint"),
        (b"PK\x03\x04", "starts like a zip archive"),
        (b"\x80\x02", "its pickle cannot be read"),
        (b"\x80\x05}.", "expected pickle protocol 2, the default of `torch.save`, but got 5"),
    ],
)
def test_no_checkpoint(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "other.ckpt"
    path.write_bytes(data)
    assert_refused(path, message)


@pytest.mark.parametrize("is_zip", [True, False])
def test_the_format_is_told(tmp_path: Path, is_zip: bool) -> None:
    torch.save(network().state_dict(), tmp_path / "a.pt", _use_new_zipfile_serialization=is_zip)
    assert inspect_checkpoint(tmp_path / "a.pt", MOST) is is_zip


def test_members_beyond_the_limit_are_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(1000)}, tmp_path / "large.pt")
    with pytest.raises(CheckpointError, match=r"members declare .* and the limit is 1,000\."):
        inspect_checkpoint(tmp_path / "large.pt", 1000)

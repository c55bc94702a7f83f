from __future__ import annotations

import collections
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import (
    RunsCommand,
    RunsFunction,
    assert_same,
    network,
    ordinary_checkpoints,
    rewrite_member,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_mnp.checkpoints.inspection import CheckpointError
from lightning_mnp.checkpoints.read import read_checkpoint, read_state_dict, read_weights
from lightning_mnp.checkpoints.write import write_state_dict

FUZZ_INPUTS = int(os.environ.get("LIGHTNING_MNP_FUZZ_INPUTS", "150"))


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "executed"


def test_reads_file_from_before_zip_format(tmp_path: Path) -> None:
    expected = network().state_dict()
    torch.save(expected, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same(read_state_dict(tmp_path / "old.pth"), expected)


def test_reads_parameters_and_views_as_independent_tensors(tmp_path: Path) -> None:
    base = torch.arange(6.0).reshape(2, 3)
    content = {"parameter": nn.Parameter(base), "view": base.T, "number": torch.tensor(3)}
    torch.save(content, tmp_path / "views.pt")

    found = read_state_dict(tmp_path / "views.pt")

    assert_same(found, content)
    assert type(found["parameter"]) is Tensor
    assert not found["parameter"].requires_grad
    assert found["view"].is_contiguous()
    found["parameter"].zero_()
    assert torch.equal(found["view"], base.T)


def test_reads_real_networks(shared: Path) -> None:
    found = read_state_dict(shared / "zoo" / "clean.pt")
    assert len(found) == 122
    assert found["conv1.weight"].shape == (16, 3, 3, 3)


@pytest.mark.parametrize("key", ["ema", "nets.student", "dotted.key"])
def test_key_chooses(tmp_path: Path, key: str) -> None:
    content = {
        "model": {"weight": torch.zeros(1)},
        "ema": {"weight": torch.ones(1)},
        "nets": {"student": {"weight": torch.ones(1)}},
        "dotted.key": {"weight": torch.ones(1)},
    }
    torch.save(content, tmp_path / "many.pt")
    assert_same(read_state_dict(tmp_path / "many.pt", key=key), {"weight": torch.ones(1)})


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
    ],
)
def test_wrappers_are_stripped(tmp_path: Path, rename: Callable[[str], str]) -> None:
    expected = network().state_dict()
    torch.save({rename(name): t for name, t in expected.items()}, tmp_path / "wrapped.pt")
    assert_same(read_state_dict(tmp_path / "wrapped.pt"), expected)


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("place", ["weights", "hyper_parameters", "beside"])
def test_pickled_call_is_refused_and_not_run(
    tmp_path: Path, canary: Path, place: str, is_zip: bool
) -> None:
    bomb = RunsCommand(canary)
    content: dict[str, object] = {"state_dict": {"weight": torch.ones(1)}}
    if place == "weights":
        content["state_dict"] = {"weight": torch.ones(1), "bias": bomb}
    else:
        content[place] = {"optimizer": bomb}
    path = tmp_path / "hostile.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)

    with pytest.raises(CheckpointError, match=r"nothing in it was run.*(posix|nt)\.system"):
        read_state_dict(path)

    assert not canary.exists()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("name", ordinary_checkpoints({}))
def test_ordinary_checkpoints_are_read(tmp_path: Path, name: str, is_zip: bool) -> None:
    expected = network().state_dict()
    content = ordinary_checkpoints(expected)[name]
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=is_zip)
    found = read_weights(tmp_path / name)
    prefix = "net." if name == "lightning.ckpt" else ""
    assert_same(found.tensors, {prefix + key: tensor for key, tensor in expected.items()})
    skipped = {
        "imagenet.pth.tar": "numpy._core.multiarray.scalar",
        "lightning.ckpt": "torch.nn.modules.loss.CrossEntropyLoss",
        "benchmark.pt": "numpy._core.multiarray._reconstruct",
    }
    assert skipped.get(name, "argparse.Namespace") in found.skipped
    assert found.skipped[0] in found.warnings()[0]


def test_facts_stand_beside_the_weights(tmp_path: Path) -> None:
    content = ordinary_checkpoints(network().state_dict())["timm.pth.tar"]
    torch.save(content, tmp_path / "timm.pth.tar")
    assert read_weights(tmp_path / "timm.pth.tar").facts == {
        "arch": "resnet18",
        "metric": 80.1,
        "lr": 0.1,
        "model": "resnet18",
        "img_size": 64,
        "mean": [0.4, 0.5, 0.6],
    }


@pytest.mark.parametrize("is_zip", [True, False])
def test_an_unknown_call_is_skipped_and_not_run(tmp_path: Path, canary: Path, is_zip: bool) -> None:
    content = {"state_dict": {"weight": torch.ones(1)}, "note": RunsFunction(canary)}
    path = tmp_path / "hostile.pt"
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    found = read_weights(path)
    assert_same(found.tensors, {"weight": torch.ones(1)})
    assert found.skipped == ("checkpoint_files.leave_a_mark",)
    assert not canary.exists()
    pickle.loads(pickle.dumps(content["note"]))  # the test can fail: elsewhere, it would run
    assert canary.exists()


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (network(), "it is an object of torch.nn.modules.container.Sequential"),
        ({"model": network(), "epoch": 3}, "model in it is an object of torch.nn.modules"),
        (
            {"state_dict": {"weight": torch.ones(1), "bias": np.ones(1)}},
            r"bias in it is an object of numpy\._core\.multiarray\._reconstruct",
        ),
        (
            {"state_dict": collections.defaultdict(list)},
            "state_dict in it is an object of collections",
        ),
    ],
    ids=["module", "module in a dict", "an array", "another dict"],
)
def test_weights_that_hang_on_a_class_are_refused(
    tmp_path: Path, content: object, place: str
) -> None:
    torch.save(content, tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match=f"nothing in it was run: {place}"):
        read_weights(tmp_path / "foreign.pt")


@pytest.mark.parametrize(
    "name",
    ["subprocess\nPopen", "builtins\nexec", "torch.hub\nload", "torch\nos.system", "os\nsystem"],
)
def test_names_that_run_code_are_refused(tmp_path: Path, name: str) -> None:
    torch.save({"state_dict": {"weight": torch.ones(1)}, "note": 1}, tmp_path / "hostile.pt")
    call = f"c{name}\n)R".encode()
    rewrite_member(
        tmp_path / "hostile.pt", "data.pkl", lambda data: data.replace(b"K\x01s.", call + b"s.")
    )
    rewrite_member(
        tmp_path / "hostile.pt", "data.pkl", lambda data: data.replace(b"K\x01u.", call + b"u.")
    )
    with pytest.raises(CheckpointError, match="do not load the file with anything else"):
        read_weights(tmp_path / "hostile.pt")


def test_instantiator_in_hyperparameters_is_ignored(tmp_path: Path, canary: Path) -> None:
    content = {
        "pytorch-lightning_version": "2.6.0",
        "state_dict": {"weight": torch.ones(1)},
        "hyper_parameters": {
            "_instantiator": "os.system",
            "command": f"touch {canary}",
            "_class_path": "subprocess.Popen",
        },
    }
    torch.save(content, tmp_path / "hparams.ckpt")
    assert_same(read_state_dict(tmp_path / "hparams.ckpt"), {"weight": torch.ones(1)})
    assert not canary.exists()


def test_allocation_beside_the_weights_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "greedy.pt"
    torch.save({"state_dict": {"weight": torch.ones(1)}}, path)
    allocate = b"X\x01\x00\x00\x00actorch\nFloatStorage\n\x8a\x06" + bytes(5) + b"\x10\x85Rs"
    rewrite_member(path, "data.pkl", lambda data: data[:-1] + allocate + data[-1:])
    with pytest.raises(CheckpointError, match="damaged or no checkpoint"):
        read_state_dict(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_truncated_file(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"cut{suffix}"
    write_state_dict(path, network().state_dict())
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError, match=r"damaged|to be a checkpoint"):
        read_state_dict(path)


def test_huge_declared_storage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "huge.pt"
    torch.save({"weight": torch.ones(5)}, path)
    rewrite_member(
        path, "data.pkl", lambda data: data.replace(b"K\x05", b"J" + struct.pack("<i", 10**9))
    )
    with pytest.raises(CheckpointError, match="damaged"):
        read_state_dict(path)


@pytest.mark.parametrize("is_zip", [True, False])
def test_huge_declared_shape_is_refused(tmp_path: Path, is_zip: bool) -> None:
    path = tmp_path / "huge.pt"
    weight = torch.ones(1).expand(10**7, 10**7)
    torch.save({"weight": weight}, path, _use_new_zipfile_serialization=is_zip)
    assert path.stat().st_size < 10_000
    with pytest.raises(CheckpointError, match=r"tensors declare 400,000,000,000,000 bytes"):
        read_state_dict(path)


def test_huge_shape_in_safetensors_is_refused(tmp_path: Path) -> None:
    header = b'{"weight":{"dtype":"F32","shape":[1000000,1000000],"data_offsets":[0,4]}}'
    path = tmp_path / "huge.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(CheckpointError, match="damaged"):
        read_state_dict(path)


def test_huge_header_in_safetensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(CheckpointError, match="damaged"):
        read_state_dict(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_file_beyond_max_bytes_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"large{suffix}"
    write_state_dict(path, {"weight": torch.ones(1000)})
    with pytest.raises(CheckpointError, match=r"`max_bytes` is 1,000\."):
        read_state_dict(path, max_bytes=1000)


def test_tensors_without_dense_values_are_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.eye(2).to_sparse()}, tmp_path / "sparse.pt")
    with pytest.raises(CheckpointError, match=r"torch\._utils\._rebuild_sparse_tensor"):
        read_state_dict(tmp_path / "sparse.pt")
    torch.save({"weight": torch.ones(2, device="meta")}, tmp_path / "meta.pt")
    with pytest.raises(CheckpointError, match="_rebuild_meta_tensor"):
        read_state_dict(tmp_path / "meta.pt")


@pytest.mark.parametrize(
    "data",
    [b"\x80\x02}." * 5, b"\x80\x02" + b"(" * 10_000 + b"." + b"\x80\x02}." * 4],
    ids=["dicts", "marks"],
)
def test_pickles_that_are_no_checkpoint(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "other.ckpt"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged or no checkpoint"):
        read_state_dict(path)


def test_no_advice_to_read_with_less_care(tmp_path: Path) -> None:
    for name, number in (("long.pt", 10**999), ("other.pt", 0)):
        torch.save({"number": number}, tmp_path / name)
    rewrite_member(tmp_path / "other.pt", "data.pkl", lambda _: b"\x80\x02}0.")
    for name in ("long.pt", "other.pt"):
        with pytest.raises(CheckpointError, match="damaged or no checkpoint: ") as caught:
            read_state_dict(tmp_path / name)
        assert "weights_only" not in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(CheckpointError, match="`path` to be an existing file"):
            read_state_dict(path)


def test_names_cannot_reach_the_terminal(tmp_path: Path) -> None:
    name = "\x1b[2J\x1b]0;title\x07<script>alert(1)</script>/../../etc/passwd\u202e"
    torch.save({name: {"a": torch.ones(1)}}, tmp_path / "names.pt")
    with pytest.raises(CheckpointError) as caught:
        read_state_dict(tmp_path / "names.pt")
    message = str(caught.value)
    assert message.isprintable()
    assert "\\x1b[2J" in message
    assert list(tmp_path.iterdir()) == [tmp_path / "names.pt"]


def test_path_like_names_are_only_names(tmp_path: Path) -> None:
    content = {"../../escaped": torch.ones(1), "/absolute": torch.ones(1)}
    torch.save(content, tmp_path / "paths.pt")
    assert_same(read_state_dict(tmp_path / "paths.pt"), content)


def mutations(original: bytes) -> st.SearchStrategy[bytes]:
    """Cut a file, flip bits of it, overwrite bytes of it, insert bytes into it."""

    def mutate(edits: list[tuple[str, int, bytes]]) -> bytes:
        data = bytearray(original)
        for kind, at, new in edits:
            if kind == "cut":
                del data[at:]
            elif kind == "insert":
                data[at:at] = new
            elif kind == "flip" and data:
                data[at % len(data)] ^= 1 << (new[0] % 8)
            else:
                data[at : at + len(new)] = new
        return bytes(data)

    edit = st.tuples(
        st.sampled_from(["cut", "flip", "insert", "overwrite"]),
        st.integers(0, len(original)),
        st.binary(min_size=1, max_size=8),
    )
    return st.lists(edit, min_size=1, max_size=3).map(mutate)


@pytest.mark.parametrize("kind", ["zip", "pickle in zip", "ordinary", "legacy", "safetensors"])
def test_fuzz(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("file.safetensors" if kind == "safetensors" else "file.pt")
    weights = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
    if kind == "safetensors":
        write_state_dict(path, weights)
    else:
        content = ordinary_checkpoints(weights)["timm.pth.tar"] if kind == "ordinary" else weights
        torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy")
    original = path.read_bytes()
    if kind in ("pickle in zip", "ordinary"):
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        original = members["file/data.pkl"]

    @settings(max_examples=FUZZ_INPUTS // 2 if kind == "ordinary" else FUZZ_INPUTS)
    @given(mutations(original))
    def read_or_refuse(data: bytes) -> None:
        if kind in ("pickle in zip", "ordinary"):
            with zipfile.ZipFile(path, "w") as archive:
                for name, member in members.items():
                    archive.writestr(name, data if name == "file/data.pkl" else member)
        else:
            path.write_bytes(data)
        try:
            found = read_state_dict(path, max_bytes=2**20)
        except CheckpointError as error:
            refusals.append(str(error))
        else:
            assert found
            assert all(isinstance(tensor, Tensor) for tensor in found.values())

    refusals: list[str] = []
    read_or_refuse()
    assert refusals
    assert all(message.isprintable() for message in refusals)
    assert list(tmp_path.iterdir()) == [path]


def test_unclear_content_names_the_file(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "unclear.pt")
    with pytest.raises(CheckpointError, match=r"unclear\.pt holds no weights by name"):
        read_state_dict(tmp_path / "unclear.pt")


# Whole files


def test_a_whole_file_does_not_depend_on_the_file(tmp_path: Path) -> None:
    path = tmp_path / "progress.pt"
    torch.save({"step": 3, "momentum": [torch.ones(2)], "names": ("a", "b")}, path)
    found = read_checkpoint(path)
    path.write_bytes(b"")
    assert (found["step"], found["names"]) == (3, ("a", "b"))
    assert torch.equal(found["momentum"][0], torch.ones(2))


def test_a_whole_file_is_checked(tmp_path: Path, canary: Path) -> None:
    path = tmp_path / "progress.pt"
    with pytest.raises(CheckpointError, match="`state_file` to be an existing file"):
        read_checkpoint(path, argument="state_file")
    torch.save({"callbacks": RunsCommand(canary)}, path)
    with pytest.raises(CheckpointError, match="nothing in it was run"):
        read_checkpoint(path)
    assert not canary.exists()
    torch.save({"momentum": [torch.ones(1).expand(10**7, 10**7)]}, path)
    with pytest.raises(CheckpointError, match="tensors declare 400,000,000,000,000 bytes"):
        read_checkpoint(path)


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_a_pointer_of_git_lfs_is_told(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 34\n")
    with pytest.raises(CheckpointError, match=r"a pointer of Git LFS.* Run `git lfs pull`"):
        read_state_dict(path)

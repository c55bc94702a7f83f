from __future__ import annotations

import collections
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_mnp.checkpoints import write as write_module
from lightning_mnp.checkpoints.inspection import CheckpointError
from lightning_mnp.checkpoints.read import read_state_dict
from lightning_mnp.checkpoints.write import write_state_dict

FUZZ_INPUTS = int(os.environ.get("LIGHTNING_MNP_FUZZ_INPUTS", "150"))


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def rewrite_member(path: Path, ending: str, change: Callable[[bytes], bytes]) -> None:
    """Change one member of a zip archive and write valid check sums for all of them."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, change(data) if name.endswith(ending) else data)


class RunsCommand:
    """Pickles into a call of os.system that makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.canary}",)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "executed"


# Formats


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pt", ".pth"])
def test_round_trip(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    expected = network().state_dict()

    write_state_dict(path, expected, {"verdict": "clean"})

    found = read_state_dict(path)
    assert_same(found, expected)
    network().load_state_dict(found, strict=True)
    assert list(tmp_path.iterdir()) == [path]


def test_written_pt_is_a_plain_state_dict(tmp_path: Path) -> None:
    write_state_dict(tmp_path / "model.pt", network().state_dict())
    network().load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True), strict=True)


def test_metadata_is_written(tmp_path: Path) -> None:
    weights = {"weight": torch.ones(1)}
    write_state_dict(tmp_path / "a.ckpt", weights, {"seed": "0"})
    write_state_dict(tmp_path / "a.safetensors", weights, {"seed": "0"})
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["lightning_mnp"] == {"seed": "0"}
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"seed": "0"}


def test_lightning_takes_written_ckpt(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 1)

        def predict_step(self, batch: Tensor) -> Tensor:
            return self.linear(batch)

    trained, loaded = Module(), Module()
    write_state_dict(tmp_path / "purified.ckpt", trained.state_dict())
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    batch = torch.ones(1, 2)
    loader = torch.utils.data.DataLoader([batch[0]])
    [output] = trainer.predict(
        loaded, loader, ckpt_path=tmp_path / "purified.ckpt", weights_only=True
    )
    assert torch.equal(output, trained.linear(batch))


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


def test_tied_weights_are_written_equal(tmp_path: Path) -> None:
    weight = torch.ones(2, 2)
    write_state_dict(tmp_path / "tied.safetensors", {"a": weight, "b": weight, "c": weight[:1]})
    assert_same(
        read_state_dict(tmp_path / "tied.safetensors"), {"a": weight, "b": weight, "c": weight[:1]}
    )


def test_reads_real_networks(shared: Path) -> None:
    found = read_state_dict(shared / "zoo" / "clean.pt")
    assert len(found) == 122
    assert found["conv1.weight"].shape == (16, 3, 3, 3)


# Finding the state dict


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "net", "sd"])
def test_finds_usual_keys(tmp_path: Path, key: str) -> None:
    expected = network().state_dict()
    torch.save({"best": torch.tensor(0.9), key: expected, "epoch": 3}, tmp_path / "nested.pt")
    assert_same(read_state_dict(tmp_path / "nested.pt"), expected)


def test_finds_nested_usual_keys(tmp_path: Path) -> None:
    torch.save({"state_dict": {"model": {"weight": torch.ones(1)}}}, tmp_path / "deep.pt")
    assert_same(read_state_dict(tmp_path / "deep.pt"), {"weight": torch.ones(1)})


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


def test_key_chooses_among_usual_keys(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.ones(1)}, "net": {"a": torch.zeros(1)}}, tmp_path / "two.pt")
    assert_same(read_state_dict(tmp_path / "two.pt", key="net"), {"a": torch.zeros(1)})


@pytest.mark.parametrize(
    ("content", "key", "message"),
    [
        ({"model": {"a": torch.ones(1)}, "net": {"a": torch.ones(1)}}, None, "several.*model, net"),
        ({"g": {"a": torch.ones(1)}, "d": {"a": torch.ones(1)}}, None, "usual key.*`key`: g, d"),
        ({"g": {"a": torch.ones(1)}}, "x", r"`key` to lead to a state dict.*There is: g\."),
        ({"epoch": 3}, None, "holds no weights by name"),
        ({"state_dict": {}}, None, "holds no weights by name"),
        ([torch.ones(1)], None, "holds no weights by name"),
        ({0: torch.ones(1)}, None, "holds no weights by name"),
        ({"module.a": torch.ones(1), "module._orig_mod.a": torch.ones(1)}, None, "occur twice"),
    ],
)
def test_unclear_content_is_refused(
    tmp_path: Path, content: object, key: str | None, message: str
) -> None:
    torch.save(content, tmp_path / "unclear.pt")
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(tmp_path / "unclear.pt", key=key)


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


def test_averaged_and_compiled_submodules_are_stripped(tmp_path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(network())
    torch.save(averaged.state_dict(), tmp_path / "averaged.pt")
    assert_same(read_state_dict(tmp_path / "averaged.pt"), averaged.module.state_dict())

    torch.save({"net._orig_mod.conv.weight": torch.ones(1)}, tmp_path / "compiled.pt")
    assert_same(read_state_dict(tmp_path / "compiled.pt"), {"net.conv.weight": torch.ones(1)})


def test_a_module_named_module_keeps_its_name(tmp_path: Path) -> None:
    content = {"module.weight": torch.ones(1), "head.weight": torch.ones(1)}
    torch.save(content, tmp_path / "own.pt")
    assert_same(read_state_dict(tmp_path / "own.pt"), content)


# Hostile and damaged files


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


def test_the_hostile_pickle_would_run_elsewhere(tmp_path: Path, canary: Path) -> None:
    """The corpus above can fail: a plain unpickler does run it."""
    pickle.loads(pickle.dumps(RunsCommand(canary), protocol=2))
    assert canary.exists()


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
    with pytest.raises(CheckpointError, match="is refused"):
        read_state_dict(path)
    assert not canary.exists()


def test_safe_globals_of_others_are_not_honored(tmp_path: Path, canary: Path) -> None:
    path = tmp_path / "hostile.pt"
    torch.save({"weight": torch.ones(1), "bomb": RunsCommand(canary)}, path)
    with (
        torch.serialization.safe_globals([(os.system, "posix.system")]),
        pytest.raises(CheckpointError, match=r"posix\.system"),
    ):
        read_state_dict(path)
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
    found = read_state_dict(tmp_path / "training.ckpt")
    assert_same(found, {"weight": torch.ones(1, dtype=torch.bfloat16)})


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


def test_flipped_bit_in_weights_is_found(tmp_path: Path) -> None:
    path = tmp_path / "flipped.pt"
    torch.save({"weight": torch.full((64,), 1.5)}, path)
    data = bytearray(path.read_bytes())
    at = data.index(struct.pack("<f", 1.5) * 64)
    data[at + 17] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="check sum of its member flipped/data/0 is wrong"):
        read_state_dict(path)


def test_compressed_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"\x80\x02}.", zipfile.ZIP_STORED)
        archive.writestr("bomb/data/0", bytes(50_000_000))
    assert path.stat().st_size < 100_000
    with pytest.raises(CheckpointError, match=r"bomb/data/0 is compressed.*50,000,000 bytes"):
        read_state_dict(path)


def test_declared_size_beyond_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    torch.save({"weight": torch.full((64,), 1.5)}, path)
    data = bytearray(path.read_bytes())
    size = struct.pack("<II", 256, 256)
    directory = data.index(b"PK\x01\x02")
    at = data.index(size, directory)
    data[at : at + 8] = struct.pack("<II", 2**31, 2**31)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"members declare 2,147,4.*but the file has"):
        read_state_dict(path)


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "double.pt"
    torch.save({"weight": torch.ones(1)}, path)
    with (
        zipfile.ZipFile(path, "a") as archive,
        pytest.warns(UserWarning, match="Duplicate name"),
    ):
        archive.writestr("double/data.pkl", b"\x80\x02}.")
    with pytest.raises(CheckpointError, match="two members of one name"):
        read_state_dict(path)


def test_huge_structure_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_mnp.checkpoints.inspection.MAX_PICKLE_BYTES", 100)
    torch.save(network().state_dict(), tmp_path / "structure.pt")
    with pytest.raises(CheckpointError, match=r"data\.pkl is larger than 100 bytes"):
        read_state_dict(tmp_path / "structure.pt")


def test_other_zip_archives_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "photos.pt", "w") as archive:
        archive.writestr("photos/cat.jpg", b"cat")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("script/data.pkl", b"\x80\x02}.")
        archive.writestr("script/constants.pkl", b"\x80\x02).")
    for name in ("photos.pt", "script.pt"):
        with pytest.raises(CheckpointError, match="no checkpoint with weights"):
            read_state_dict(tmp_path / name)


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
    ("data", "message"),
    [
        (b"", "to be a checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1", "to be a checkpoint"),
        (b"PK\x03\x04", "starts like a zip archive"),
        (b"\x80\x02", "its pickle cannot be read"),
        (b"\x80\x02}." * 5, "damaged or no checkpoint"),
        (b"\x80\x02" + b"(" * 10_000 + b"." + b"\x80\x02}." * 4, "damaged or no checkpoint"),
        (b"\x80\x05}.", "expected pickle protocol 2, the default of `torch.save`, but got 5"),
    ],
)
def test_no_checkpoint(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "other.ckpt"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
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


@pytest.mark.parametrize("kind", ["zip", "pickle in zip", "legacy", "safetensors"])
def test_fuzz(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("file.safetensors" if kind == "safetensors" else "file.pt")
    weights = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
    if kind == "safetensors":
        write_state_dict(path, weights)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=kind != "legacy")
    original = path.read_bytes()
    if kind == "pickle in zip":
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        original = members["file/data.pkl"]

    @settings(max_examples=FUZZ_INPUTS)
    @given(mutations(original))
    def read_or_refuse(data: bytes) -> None:
        if kind == "pickle in zip":
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


# Writing


def test_existing_path_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_text("mine")
    with pytest.raises(CheckpointError, match="Expected argument `path` not to exist"):
        write_state_dict(path, {"weight": torch.ones(1)})
    assert path.read_text() == "mine"

    dangling = tmp_path / "dangling.pt"
    dangling.symlink_to(tmp_path / "target.pt")
    with pytest.raises(CheckpointError, match="Expected argument `path` not to exist"):
        write_state_dict(dangling, {"weight": torch.ones(1)})
    assert not (tmp_path / "target.pt").exists()


@pytest.mark.parametrize("has_links", [True, False])
def test_path_that_appears_meanwhile_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    path = tmp_path / "model.pt"
    link = os.link

    def appear_first(source: Path, target: Path) -> None:
        target.write_text("mine")
        if not has_links:
            raise PermissionError("no hard links here")
        link(source, target)

    monkeypatch.setattr(os, "link", appear_first)
    with pytest.raises(CheckpointError, match="has appeared meanwhile"):
        write_state_dict(path, {"weight": torch.ones(1)})
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


def test_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    write_state_dict(tmp_path / "model.pt", {"weight": torch.ones(1)})
    assert_same(read_state_dict(tmp_path / "model.pt"), {"weight": torch.ones(1)})
    assert list(tmp_path.iterdir()) == [tmp_path / "model.pt"]


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".safetensors"])
def test_failed_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"could not be written.*No space left"):
        write_state_dict(tmp_path / f"model{suffix}", {"weight": torch.ones(1)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device /dev/full")
@pytest.mark.parametrize("suffix", [".pt", ".ckpt"])
def test_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    save = torch.save

    def save_to_full_disk(content: object, path: Path) -> None:
        path.symlink_to("/dev/full")
        save(content, path)

    monkeypatch.setattr(torch, "save", save_to_full_disk)
    with pytest.raises(CheckpointError, match="could not be written"):
        write_state_dict(tmp_path / f"model{suffix}", {"weight": torch.ones(1000)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "weights", "metadata", "message"),
    [
        ("model.onnx", {"a": torch.ones(1)}, None, r"`path` to end in one of.*\.safetensors"),
        ("model.pt", {}, None, "`state_dict` to hold tensors"),
        ("model.pt", {"a": torch.ones(1)}, {"seed": 0}, "`metadata` to map to strings.*int"),
    ],
)
def test_wrong_arguments_write_nothing(
    tmp_path: Path,
    name: str,
    weights: dict[str, Tensor],
    metadata: dict[str, str] | None,
    message: str,
) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_state_dict(tmp_path / name, weights, metadata)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".safetensors"])
def test_a_missing_folder_is_made(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "runs" / "first" / f"model{suffix}"
    write_state_dict(path, {"a": torch.ones(1)})
    assert read_state_dict(path)["a"].item() == 1
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_version_without_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise write_module.PackageNotFoundError(package)

    monkeypatch.setattr(write_module, "version", missing)
    assert write_module._lightning_version() == "2.6.0"

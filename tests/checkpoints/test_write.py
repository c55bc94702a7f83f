from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from checkpoint_files import assert_same, network
from torch import Tensor, nn

from lightning_mnp.checkpoints import write as write_module
from lightning_mnp.checkpoints.inspection import CheckpointError
from lightning_mnp.checkpoints.load import load_into
from lightning_mnp.checkpoints.read import read_checkpoint, read_state_dict
from lightning_mnp.checkpoints.write import check_output, write_state_dict


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


class Counting(nn.Linear):
    """A layer with a state beside its weights."""

    def __init__(self, state: Any) -> None:
        super().__init__(2, 1)
        self.state = state

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state


STATE = {
    "steps": [3, -1, 2**40, True],
    "rate": (0.5, float("inf"), None),
    "name": "é",
    7: OrderedDict(nested={}, empty=()),
}


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth"])
def test_an_extra_state_is_kept(tmp_path: Path, suffix: str) -> None:
    path, mean = tmp_path / f"model{suffix}", torch.ones(4)
    written = nn.Sequential(Counting({**STATE, "mean": mean[::2]}))
    write_state_dict(path, written.state_dict())
    assert_same(read_state_dict(path), {n: p.detach() for n, p in written.named_parameters()})
    content = read_checkpoint(path)
    read = nn.Sequential(Counting(None))
    read.load_state_dict(content["state_dict"] if suffix == ".ckpt" else content, strict=True)
    found = read[0].state
    assert found.pop("mean").tolist() == [1, 1]
    assert found == STATE
    load_into(nn.Sequential(Counting(None)), read_state_dict(path))


class Named(str):
    """A text of a class that a reader would have to import."""


DEEP: list[Any] = []
DEEP.append(DEEP)


@pytest.mark.parametrize(
    ("suffix", "state", "message"),
    [
        (
            ".safetensors",
            {},
            r"tensors only, .* but 0\._extra_state is an extra state: builtins\.d",
        ),
        (".pt", Path("x"), r"but 0\._extra_state holds something else or is deeper: pathlib"),
        (".ckpt", {"name": Named("x")}, "`get_extra_state` return the former only"),
        (".pth", {(1, 2): 3}, "dicts by names or whole numbers"),
        (".pt", DEEP, "at most 50 levels deep"),
    ],
)
def test_an_extra_state_that_cannot_be_written_is_told_before_the_work(
    tmp_path: Path, suffix: str, state: Any, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        check_output(tmp_path / f"model{suffix}", nn.Sequential(Counting(state)).state_dict())


def test_tied_weights_are_written_equal(tmp_path: Path) -> None:
    weight = torch.ones(2, 2)
    write_state_dict(tmp_path / "tied.safetensors", {"a": weight, "b": weight, "c": weight[:1]})
    assert_same(
        read_state_dict(tmp_path / "tied.safetensors"), {"a": weight, "b": weight, "c": weight[:1]}
    )


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


def test_a_place_is_checked_before_the_work(tmp_path: Path) -> None:
    weights = {"a": torch.ones(1)}
    check_output(tmp_path / "not" / "yet" / "model.pt", weights)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match="`output` to end in one of"):
        check_output(tmp_path / "model", weights, "output")
    (tmp_path / "model.pt").write_text("mine")
    with pytest.raises(CheckpointError, match="`output` not to exist"):
        check_output(tmp_path / "model.pt", weights, "output")
    with pytest.raises(CheckpointError, match=r"`path` to be where there is space for 4,000,000,0"):
        check_output(tmp_path / "b.pt", {"a": torch.ones(1).expand(10**9, 10**9)})

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lightning_mnp.checkpoints.inspection import CheckpointError
from lightning_mnp.cli.scan.source import Source, find_weights

REVISION = "0123456789abcdef0123456789abcdef01234567"


def write_model(folder: Path, name: str = "model.safetensors") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"weights")
    (folder / "config.json").write_text(json.dumps({"architecture": "resnet18"}))
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": 64}))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_and_the_file_in_it_are_the_same(tmp_path: Path, name: str) -> None:
    write_model(tmp_path, name)
    found = find_weights(str(tmp_path))
    assert found == find_weights(str(tmp_path / name))
    assert found == Source(tmp_path / name, {"architecture": "resnet18"}, {"size": 64})


@pytest.mark.parametrize(
    "content", ['{"lr": 0.1}', "[1]", "{", "[" * 100_000, '{"architecture": "' + " " * 2**20 + '"}']
)
def test_other_files_beside_it_do_not_count(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    assert find_weights(str(tmp_path / "model.pt")) == Source(tmp_path / "model.pt")


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="`WEIGHTS` to be a file, or a folder that holds"):
        find_weights(str(tmp_path))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of Hugging Face's hub with one model, and no network."""
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = tmp_path / "models--owner--name"
    write_model(model / "snapshots" / REVISION)
    (model / "refs").mkdir()
    for ref in ("main", "v1"):
        (model / "refs" / ref).write_text(REVISION)
    return model / "snapshots" / REVISION


@pytest.mark.parametrize("name", ["hf://owner/name", "hf://owner/name@v1"])
def test_a_model_of_the_hub_comes_from_its_cache(hub: Path, name: str) -> None:
    assert find_weights(name) == find_weights(str(hub))


@pytest.mark.parametrize("name", ["hf://owner/other", "hf://owner/name@v2", "hf://a/b/c", "hf://"])
def test_a_model_that_cannot_be_fetched_is_told(hub: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"on the hub as hf://owner/name.* not be fetched"):
        find_weights(name)


def test_the_hub_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-mnp\[hub\]'"):
        find_weights("hf://owner/name")

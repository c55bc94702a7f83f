from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_mnp.checkpoints.inspection import CheckpointError
from lightning_mnp.checkpoints.load import load_into
from lightning_mnp.checkpoints.read import Weights
from lightning_mnp.cli.scan.architecture import find_architecture
from lightning_mnp.cli.scan.source import Source
from lightning_mnp.models import build_network

NOWHERE = Source(Path("model.pt"))


def weights_of(network: nn.Module, prefix: str = "", **facts: Any) -> Weights:
    named = {prefix + name: tensor for name, tensor in network.state_dict().items()}
    return Weights(named, facts=facts)


def own_network(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, num_classes))


def not_a_network() -> int:
    return 3


@pytest.mark.parametrize(
    ("asked", "name", "channels"),
    [
        ("torchvision/squeezenet1_1", "torchvision/squeezenet1_1", 3),
        ("squeezenet1_1", "torchvision/squeezenet1_1", 3),
        ("timm/test_resnet", "timm/test_resnet", 1),
        ("timm/test_resnet.r160_in1k", "timm/test_resnet", 3),
        ("cifar_resnet18", "cifar_resnet18", 1),
    ],
)
def test_a_name_that_is_asked_for(asked: str, name: str, channels: int) -> None:
    options = {} if channels == 3 else {"in_channels": channels}
    options |= {"width": 2} if name.startswith("cifar") else {}
    built_as = name.removeprefix("torchvision/")
    weights = weights_of(build_network(built_as, 7, **options))
    found = find_architecture(asked, weights, NOWHERE)
    load_into(found.network, weights.tensors)
    assert (found.name, found.how) == (name, "")
    assert ("mean" in found.preparation) == name.startswith("timm/")


@pytest.mark.parametrize(
    ("built_as", "facts", "name", "how"),
    [
        ("squeezenet1_1", {"arch": "squeezenet1_1"}, "torchvision/squeezenet1_1", "the file"),
        ("timm/test_resnet", {"model": "test_resnet"}, "timm/test_resnet", "the file"),
        ("squeezenet1_0", {"arch": "resnet18"}, "torchvision/squeezenet1_0", "the fit of"),
        ("cifar_resnet34", {}, "cifar_resnet34", "the fit of all names and shapes"),
    ],
)
def test_a_name_that_is_found(built_as: str, facts: Any, name: str, how: str) -> None:
    width = {"width": 2} if built_as.startswith("cifar") else {}
    weights = weights_of(build_network(built_as, 5, **width), prefix="network.", **facts)
    before = torch.get_rng_state()
    found = find_architecture(None, weights, NOWHERE)
    load_into(found.network, weights.tensors)
    assert found.name == name
    assert found.how.startswith(how)
    assert next(found.network.parameters()).device.type == "cpu"
    assert before.shape == torch.get_rng_state().shape


def test_the_configuration_of_timm_beside_the_file() -> None:
    weights = weights_of(build_network("timm/test_resnet", 5))
    source = Source(Path("model.safetensors"), {"architecture": "test_resnet"})
    assert find_architecture(None, weights, source).name == "timm/test_resnet"


def test_a_library_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, *arguments: Any) -> bool:
        if name.startswith("timm/"):
            raise ImportError("pip install timm")
        return False

    monkeypatch.setattr("lightning_mnp.cli.scan.architecture._would_fit", missing)
    with pytest.raises(ImportError, match="pip install timm"):
        find_architecture(None, weights_of(own_network(3), arch="my_net"), NOWHERE)


def test_what_cannot_be_found_is_told() -> None:
    with pytest.raises(ValueError, match=r"the file names none\. Give it as `--arch`"):
        find_architecture(None, weights_of(own_network(3)), NOWHERE)
    with pytest.raises(
        ValueError, match="the file names torchvision/my_net, timm/my_net, which is"
    ):
        find_architecture(None, weights_of(own_network(3), arch="my_net"), NOWHERE)
    with pytest.raises(ValueError, match="Similar names: 'resnet18'"):
        find_architecture("resnet81", weights_of(own_network(3)), NOWHERE)
    with pytest.raises(CheckpointError, match="holds only short rows"):
        find_architecture(None, Weights({"bias": torch.zeros(3)}), NOWHERE)


@pytest.mark.parametrize(
    ("arch", "name", "shape"),
    [
        ("resnet18", "fc.weight", (5_000, 0)),
        ("resnet18", "fc.weight", (5_000_000_000, 1)),
        ("resnet18", "fc.weight", (2**60, 0)),
        ("regnet_y_400mf", "fc.weight", (5_000_000_000, 1)),
        ("cifar_resnet18", "conv1.weight", (200, 3, 3, 0)),
        ("cifar_resnet18", "conv1.weight", (5_000_000, 1, 1, 1)),
        ("timm/test_resnet", "conv1.0.weight", (1, 5_000_000, 1, 1)),
    ],
)
def test_a_file_cannot_ask_for_memory_that_it_does_not_fill(
    arch: str, name: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = build_network(arch, 7).state_dict()
    tensors[name] = torch.zeros(()).expand(shape)
    built = []

    def build(*arguments: Any, **options: Any) -> nn.Module:
        built.append(build_network(*arguments, **options))
        return built[-1]

    monkeypatch.setattr("lightning_mnp.cli.scan.architecture.build_network", build)
    with pytest.raises(CheckpointError, match=r"of another shape: .*Check the architecture"):
        find_architecture(arch, Weights(tensors), NOWHERE)
    with pytest.raises(ValueError, match="which is none that fits"):
        find_architecture(None, Weights(tensors, facts={"arch": Path(arch).name}), NOWHERE)
    devices = {each.device.type for network in built for each in network.parameters()}
    assert devices == {"meta"}


def test_networks_that_compute_when_built() -> None:
    weights = weights_of(build_network("regnet_y_400mf", 3), arch="regnet_y_400mf")
    for asked in ("regnet_y_400mf", None):
        found = find_architecture(asked, weights, NOWHERE)
        load_into(found.network, weights.tensors)
        assert found.name == "torchvision/regnet_y_400mf"


def test_a_size_that_cannot_be_checked_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*arguments: Any, **options: Any) -> nn.Module:
        raise RuntimeError("no data in meta tensors")

    weights = weights_of(own_network(3), arch="resnet18")
    monkeypatch.setattr("lightning_mnp.cli.scan.architecture.build_network", build)
    with pytest.raises(
        ValueError, match=r"without its numbers first.*resnet18 failed: no data.*module:function"
    ):
        find_architecture("resnet18", weights, NOWHERE)
    with pytest.raises(ValueError, match="which is none that fits"):
        find_architecture(None, weights, NOWHERE)


@pytest.mark.parametrize("name", ["evil:run", "../evil:run", "hf/evil", "a" * 999, "\x1b[2J", 7])
@pytest.mark.parametrize("beside", [True, False])
def test_a_file_cannot_name_code(
    name: Any, beside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the user may name a function, or a folder."""
    for folder in ("", "torchvision", "timm"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "evil.py").write_text("open('executed', 'w')\ndef run(): pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    source = Source(Path("model.pt"), {"architecture": name}) if beside else NOWHERE
    weights = weights_of(own_network(3), **({} if beside else {"arch": name}))
    with pytest.raises(ValueError, match="the file names none"):
        find_architecture(None, weights, source)
    assert not (tmp_path / "executed").exists()


def test_a_function_of_the_user() -> None:
    weights = weights_of(own_network(6))
    found = find_architecture(f"{__name__}:own_network", weights, NOWHERE)
    load_into(found.network, weights.tensors)
    assert found.name == f"{__name__}:own_network"
    for name, message in (
        ("not_a_network", "returned int"),
        ("missing", "failed: AttributeError"),
    ):
        with pytest.raises(ValueError, match=message):
            find_architecture(f"{__name__}:{name}", weights, NOWHERE)


def test_a_network_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    settings = transformers.ResNetConfig(
        id2label={0: "cat", 1: "dog", 2: "owl"},
        embedding_size=4,
        hidden_sizes=[4, 4],
        depths=[1, 1],
        layer_type="basic",
    )
    network = transformers.ResNetForImageClassification(settings)
    network.config.save_pretrained(tmp_path)
    weights = weights_of(network)
    beside = Source(tmp_path / "model.safetensors", {"architectures": ["ResNet"]})
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    for found in (
        find_architecture(f"hf/{tmp_path}", weights, NOWHERE),
        find_architecture(f"hf/~/{tmp_path.name}", weights, NOWHERE),
        find_architecture(None, weights, beside),
    ):
        load_into(found.network, weights.tensors)
        assert found.class_names == ["cat", "dog", "owl"]
    network.config.embedding_size = 10**9
    network.config.save_pretrained(tmp_path)
    for asked, source in ((f"hf/{tmp_path}", NOWHERE), (None, beside)):
        with pytest.raises(CheckpointError, match="of another shape"):
            find_architecture(asked, weights, source)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-mnp\[hf\]'"):
        find_architecture(f"hf/{tmp_path}", weights, NOWHERE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "a folder with config.json after hf/"),
        ('{"auto_map": {"AutoConfig": "code.Evil"}}', "asks for code of its own"),
        ('{"model_type": "no such"}', "to describe an image classifier of transformers"),
        ("[", "to describe an image classifier"),
    ],
)
def test_a_folder_that_does_not_serve(tmp_path: Path, content: str | None, message: str) -> None:
    pytest.importorskip("transformers")
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        find_architecture(f"hf/{tmp_path}", weights_of(own_network(3)), NOWHERE)

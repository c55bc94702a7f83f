"""Every network of the matrix, thin, goes through all stages and comes back from a file."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import REPOSITORY
from torch import nn

from benchmarks import matrix
from benchmarks.architectures import MATRIX, Entry, Wrapped
from benchmarks.matrix import BUDGET, Line, examine
from lightning_mnp.models import cifar_resnet18
from lightning_mnp.surgery.layers import find_filter_layers

QUICK = replace(BUDGET, batch_size=4)
PAGE = REPOSITORY / "docs" / "reference" / "any-cnn.md"
LINE = Line("a", [3, 8, 8], 10, 1000, 3, 2, 1, 99, 2, 1.25, 600.4, 500.0, 2e-15, True, "a machine")


# One of each kind; deep ones, and near relatives of others, take longer than they tell.
RELATIVES = {
    *("torchvision/inception_v3", "torchvision/googlenet", "torchvision/mnasnet0_5"),
    *("torchvision/resnext50_32x4d", "torchvision/resnet34", "timm/inception_v3"),
    *("timm/mobilenetv2_100", "timm/mobilenetv3_small_100", "timm/regnety_004"),
    *("timm/mnasnet_100", "timm/resnext50_32x4d", "timm/vgg11", "timm/densenet121"),
    *("timm/efficientnet_b0", "timm/convnext_tiny", "torchvision/wide_resnet50_2"),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in RELATIVES else n for n in MATRIX],
)
def test_network(name: str) -> None:
    entry = MATRIX[name]
    pytest.importorskip(entry.needs, reason=f"needs the package {entry.needs}")
    line = examine(entry, QUICK, images=4, small=True)
    assert line.reload
    assert line.difference < 1e-10
    assert line.layers > 2
    assert line.shape == list(entry.small_shape)


def test_the_matrix_has_what_is_promised() -> None:
    listed = set(MATRIX)
    for name in (
        *("resnet18", "resnet34", "resnet50", "wide_resnet50_2", "resnext50_32x4d", "vgg11"),
        *("vgg16_bn", "densenet121", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0"),
        *("shufflenet_v2_x0_5", "squeezenet1_1", "googlenet", "inception_v3", "convnext_tiny"),
        *("regnet_y_400mf", "mnasnet0_5"),
    ):
        assert f"torchvision/{name}" in listed
    assert {"timm/nfnet_l0", "timm/nf_resnet50"} <= listed
    assert {"transformers/resnet", "transformers/convnext"} <= listed
    entries = MATRIX.values()
    assert {1, 3, 4} == {entry.shape[0] for entry in entries}
    assert any(entry.shape[1] != entry.shape[2] for entry in entries)
    assert {2, 1000} <= {entry.classes for entry in entries}


@pytest.mark.parametrize("name", ["torchvision/googlenet", "torchvision/inception_v3"])
def test_auxiliary_heads_are_there_and_left_alone(name: str) -> None:
    entry = MATRIX[name]
    network = entry.small()
    auxiliary = [
        name
        for name, module in network.named_modules()
        if "aux" in name.lower() and isinstance(module, nn.Conv2d)
    ]
    layers = find_filter_layers(network, torch.zeros(1, *entry.small_shape))
    assert auxiliary
    assert layers.skipped == tuple((name, "not called by the network") for name in auxiliary)


@pytest.mark.parametrize("name", [name for name in MATRIX if name.startswith("cifar_resnet18")])
def test_wrapped_networks_return_no_tensor(name: str) -> None:
    network = MATRIX[name].small()
    assert isinstance(network, Wrapped)
    assert not isinstance(network(torch.zeros(2, 3, 16, 16)), torch.Tensor)


@pytest.mark.parametrize("name", ["timm/resnet18", "timm/resnetv2_50x1_bit"])
def test_usual_sizes_build(name: str) -> None:
    pytest.importorskip("timm", reason="needs the package timm")
    with torch.device("meta"):
        network = MATRIX[name].full()
    assert sum(parameter.numel() for parameter in network.parameters()) > 10e6


class Broken(nn.Module):
    """A network whose copies compute something else."""

    def __init__(self) -> None:
        super().__init__()
        self.network = cifar_resnet18(10, 2)
        self.offset = 0.0

    def __deepcopy__(self, memo: Any) -> Broken:
        copied = Broken()
        copied.load_state_dict(self.state_dict())
        copied.offset = 1.0
        return copied.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(x) + self.offset
        return logits


def test_a_network_that_does_not_hold_is_found() -> None:
    entry = Entry("broken", Broken, Broken, (3, 16, 16), (3, 16, 16), 10)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        examine(entry, QUICK, images=4, small=True)


def test_one_network_is_examined_and_its_line_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = MATRIX["cifar_resnet18, a dict"]
    monkeypatch.setitem(MATRIX, entry.name, replace(entry, full=entry.small, shape=(3, 16, 16)))
    monkeypatch.setattr(matrix, "BUDGET", QUICK)
    assert matrix.run_apart(entry.name, tmp_path)
    [path] = tmp_path.iterdir()
    assert path.name == "cifar_resnet18-a-dict.json"
    [line] = matrix.read_lines(tmp_path)
    assert (line.name, line.layers, line.reload) == (entry.name, 20, True)
    assert line.peak_mib >= line.import_mib > 0
    assert "threads: 1, torch " in line.machine


def test_only_missing_lines_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table -->\n\nold\n\n<!-- end of the table -->\nafter\n")
    out = tmp_path / "lines"
    started = []

    def run(name: str, folder: Path) -> bool:
        started.append(name)
        if name.endswith("tuple") and len(started) == 2:
            return False
        line = replace(LINE, name=name)
        (folder / matrix.file_name(name)).write_text(json.dumps(asdict(line)))
        return True

    monkeypatch.setattr(matrix, "run_apart", run)
    command = ["matrix", "--out", str(out), "--only", "cifar*", "--page", str(page)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="failed: cifar_resnet18, a tuple"):
        matrix.main()
    matrix.main()
    names = ["cifar_resnet18, a dict", "cifar_resnet18, a tuple", "cifar_resnet18, a dataclass"]
    assert started == [*names, names[1]]
    assert capsys.readouterr().out.endswith("a machine\n")
    assert "Not measured yet: `torchvision/resnet18`, " in page.read_text()
    lines = page.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert [line.split(" |")[0] for line in lines if " equal |" in line] == [
        f"| {name}" for name in names
    ]


def test_a_row_of_the_table() -> None:
    assert matrix.table([LINE]).splitlines()[-1] == (
        "| a | 3 x 8 x 8 | 10 | 1,000 | 3, 2, 1 | 99 | 1.2 | 600 | 2e-15 | equal |"
    )
    assert "DIFFERENT" in matrix.table([replace(LINE, reload=False)])


def test_a_page_without_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(ValueError, match=r"page.md to hold the marks '<!-- table -->"):
        matrix.write_page(page, [LINE])


def test_the_documented_page_has_every_network() -> None:
    lines = PAGE.read_text("utf-8").splitlines()
    rows = [line.split(" | ")[0].removeprefix("| ") for line in lines if line.endswith("equal |")]
    left = [line for line in lines if line.startswith("Not measured yet: ")]
    assert sorted([*rows, *re.findall("`(.+?)`", "".join(left))]) == sorted(MATRIX)
    assert not any("DIFFERENT" in line for line in lines)

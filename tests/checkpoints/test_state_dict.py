from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpoint_files import assert_same, network

from lightning_mnp.checkpoints.inert import Foreign
from lightning_mnp.checkpoints.inspection import CheckpointError
from lightning_mnp.checkpoints.state_dict import (
    all_tensors,
    check_finite,
    find_state_dict,
    strip_wrappers,
)


def test_weights_of_eight_bits_are_refused() -> None:
    weights = {"a": torch.ones(2), "b": torch.ones(2).to(torch.float8_e4m3fn)}
    message = "of two bytes or more each, but 1 of 2 tensors are of float8_e4m3fn: b. Save them"
    with pytest.raises(CheckpointError, match=message):
        check_finite(weights)
    check_finite({"a": torch.ones(2), "counts": torch.ones(2, dtype=torch.int8)})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_check_finite(value: float) -> None:
    weights = {"good": torch.ones(2), "count": torch.tensor(3), "bad": torch.tensor([1.0, value])}
    with pytest.raises(CheckpointError, match="1 of 3 tensors hold NaN or infinity: bad"):
        check_finite(weights)
    del weights["bad"]
    check_finite(weights)


def test_all_tensors_come_in_their_order_and_from_each_container_once() -> None:
    first, second, third = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    shared = [second]
    content: dict[str, Any] = {"a": (first, {"b": shared}), "c": shared, "d": third, "e": "text"}
    content["itself"] = content
    assert [len(tensor) for tensor in all_tensors(content)] == [1, 2, 3]
    assert list(all_tensors(first)) == [first]


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "net", "sd"])
def test_usual_keys_are_found(key: str) -> None:
    expected = network().state_dict()
    content = {"best": torch.tensor(0.9), key: expected, "epoch": 3}
    assert_same(find_state_dict(content, None, "a.pt"), expected)


def test_usual_keys_inside_each_other_are_found() -> None:
    content = {"state_dict": {"model": {"weight": torch.ones(1)}}}
    assert_same(find_state_dict(content, None, "a.pt"), {"weight": torch.ones(1)})


OPTIONS = {"name": "resnet18", "layers": [2, 2], "net": {"width": 64}}


@pytest.mark.parametrize(
    "content",
    [
        {"model": OPTIONS, "state_dict": {"w": torch.ones(1)}},
        {"model": OPTIONS, "w": torch.ones(1)},
        {"model": {}, "sd": {}, "net": {"model": OPTIONS, "state_dict": {"w": torch.ones(1)}}},
        {"model": {**OPTIONS, "args": Foreign("argparse.Namespace", {})}, "w": torch.ones(1)},
    ],
)
def test_options_under_a_usual_key_are_no_state_dict(content: dict[str, Any]) -> None:
    assert_same(find_state_dict(content, None, "a.pt"), {"w": torch.ones(1)})


def test_what_holds_itself_is_searched_once() -> None:
    content: dict[str, Any] = {"epoch": 3}
    content["model"] = content["net"] = content
    with pytest.raises(CheckpointError, match="holds no weights by name"):
        find_state_dict(content, None, "a.pt")


def test_a_key_chooses_among_usual_keys() -> None:
    content = {"model": {"a": torch.ones(1)}, "net": {"a": torch.zeros(1)}}
    assert_same(find_state_dict(content, "net", "a.pt"), {"a": torch.zeros(1)})


@pytest.mark.parametrize(
    ("content", "key", "message"),
    [
        ({"model": {"a": torch.ones(1)}, "net": {"a": torch.ones(1)}}, None, "several.*model, net"),
        ({"g": {"a": torch.ones(1)}, "d": {"a": torch.ones(1)}}, None, "usual key.*`key`: g, d"),
        ({"g": {"a": torch.ones(1)}}, "x", r"`key` to lead to a state dict.*There is: g\."),
        ({"g": 3}, "g.x", r"`key` to lead to a state dict in a\.pt, but 'g\.x' does not"),
        ({"model": OPTIONS, "net": OPTIONS}, None, "a.pt holds no weights by name"),
        ({"model": OPTIONS, "g": {"a": torch.ones(1)}}, None, "usual key.*`key`: g"),
        (
            {"model": {"state_dict": {"fc": Foreign("a.B", {})}}},
            None,
            r"fc in it is an object of a\.B",
        ),
        ({"epoch": 3}, None, "a.pt holds no weights by name"),
        ({"state_dict": {}}, None, "holds no weights by name"),
        ([torch.ones(1)], None, "holds no weights by name"),
        ({0: torch.ones(1)}, None, "holds no weights by name"),
    ],
)
def test_unclear_content_is_refused(content: object, key: str | None, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        find_state_dict(content, key, "a.pt")


def test_prefixes_of_averaged_and_compiled_modules_are_stripped() -> None:
    averaged = torch.optim.swa_utils.AveragedModel(network())
    assert_same(strip_wrappers(averaged.state_dict(), "a.pt"), averaged.module.state_dict())
    compiled = {"net._orig_mod.conv.weight": torch.ones(1)}
    assert_same(strip_wrappers(compiled, "a.pt"), {"net.conv.weight": torch.ones(1)})


def test_a_module_named_module_keeps_its_name() -> None:
    content = {"module.weight": torch.ones(1), "head.weight": torch.ones(1)}
    assert_same(strip_wrappers(content, "a.pt"), content)


def test_prefixes_without_which_names_are_the_same_are_refused() -> None:
    content = {"module.a": torch.ones(1), "module._orig_mod.a": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"a\.pt is refused: .* names occur twice"):
        strip_wrappers(content, "a.pt")

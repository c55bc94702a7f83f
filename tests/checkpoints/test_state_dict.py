from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from checkpoint_files import assert_same, network
from torch import Tensor, nn

from lightning_mnp.checkpoints.inert import Foreign
from lightning_mnp.checkpoints.inspection import CheckpointError
from lightning_mnp.checkpoints.state_dict import (
    PrefixMatch,
    all_tensors,
    check_finite,
    find_state_dict,
    first_names,
    load_into,
    strip_wrappers,
)


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def renamed(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in weights.items()}


def test_weights_of_eight_bits_are_refused() -> None:
    weights = {"a": torch.ones(2), "b": torch.ones(2).to(torch.float8_e4m3fn)}
    message = "of two bytes or more each, but 1 of 2 tensors are of float8_e4m3fn: b. Save them"
    with pytest.raises(CheckpointError, match=message):
        check_finite(weights)
    check_finite({"a": torch.ones(2), "counts": torch.ones(2, dtype=torch.int8)})


@pytest.mark.parametrize("prefix", ["", "network.", "model.", "a.b.c."])
def test_prefix_in_file_is_found(prefix: str) -> None:
    source, target = Wrapper().network, Wrapper().network
    match = load_into(target, renamed(source.state_dict(), prefix))
    assert match == PrefixMatch(file=prefix)
    assert torch.equal(target[0].weight, source[0].weight)
    assert match.to_file("0.weight") == f"{prefix}0.weight"


def test_prefix_in_module_is_found() -> None:
    source, target = Wrapper(), Wrapper()
    match = load_into(target, source.network.state_dict())
    assert match == PrefixMatch(module="network.")
    assert torch.equal(target.network[0].weight, source.network[0].weight)
    assert match.to_file("network.0.weight") == "0.weight"


def test_given_prefix_ignores_the_rest() -> None:
    source, target = Wrapper().network, Wrapper().network
    weights = renamed(source.state_dict(), "student.") | {"teacher.weight": torch.ones(1)}
    assert load_into(target, weights, prefix="student.") == PrefixMatch(file="student.")
    assert torch.equal(target[0].weight, source[0].weight)
    with pytest.raises(CheckpointError, match=r"`prefix` to start names.*none starts with 'ema\.'"):
        load_into(target, weights, prefix="ema.")


def test_missing_batch_counters_are_tolerated() -> None:
    source, target = Wrapper().network, Wrapper().network
    target[1].num_batches_tracked.fill_(7)
    weights = source.state_dict()
    del weights["1.num_batches_tracked"]
    load_into(target, renamed(weights, "model."))
    assert target[1].num_batches_tracked == 7
    assert torch.equal(target[0].weight, source[0].weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("0.weight"), r"5 missing|1 missing: 0\.weight\."),
        (lambda w: w.update(extra=torch.ones(1)), r"1 unexpected: extra\."),
        (
            lambda w: w.update({"0.weight": torch.ones(5, 3, 3, 3)}),
            r"1 of another shape: 0\.weight \(5, 3, 3, 3\) for \(4, 3, 3, 3\)\.",
        ),
        (
            lambda w: w.update({"0.bias": torch.ones(4, dtype=torch.int64)}),
            r"1 of another kind: 0\.bias torch\.int64 for torch\.float32\.",
        ),
        (
            lambda w: w.update({"0.bias": torch.ones(4, dtype=torch.complex64)}),
            "1 of another kind",
        ),
        (
            lambda w: w.update({f"extra{i}": torch.ones(1) for i in range(7)}),
            "7 unexpected: extra0, extra1, extra2, extra3, extra4, …",
        ),
        (lambda w: w.update({"\x1b[31m": torch.ones(1)}), r"1 unexpected: \\x1b\[31m"),
        (lambda w: w.clear(), "6 missing"),
    ],
)
def test_what_does_not_fit_changes_nothing(change: object, message: str) -> None:
    module, weights = Wrapper().network, Wrapper().network.state_dict()
    before = copy.deepcopy(module.state_dict())
    change(weights)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message):
        load_into(module, weights)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_module_that_refuses_halfway_is_unchanged() -> None:
    class Refusing(nn.Linear):
        def _load_from_state_dict(self, *args: object) -> None:
            super()._load_from_state_dict(*args)  # type: ignore[arg-type]
            raise RuntimeError("not these\x1b")

    module = nn.Sequential(nn.Linear(2, 2), Refusing(2, 2))
    before = copy.deepcopy(module.state_dict())
    other = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match=r"Sequential refused the weights: not these\\x1b"):
        load_into(module, other.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_modules_learn_the_version_of_their_weights() -> None:
    class Versioned(nn.Linear):
        _version = 2

        def _load_from_state_dict(self, state: object, prefix: str, local: Any, *args: Any) -> None:
            assert local["version"] == 2  # torchvision's MNASNet refuses to load without one
            super()._load_from_state_dict(state, prefix, local, *args)

    source, target = nn.Linear(2, 1), nn.Sequential(Versioned(2, 1))
    load_into(target, source.state_dict())
    assert torch.equal(target[0].weight, source.weight)


def test_extra_state_stays() -> None:
    class Stateful(nn.Linear):
        def get_extra_state(self) -> int:
            return 3

        def set_extra_state(self, state: object) -> None:
            self.state = state

    source, target = nn.Linear(2, 1), Stateful(2, 1)
    load_into(target, source.state_dict())
    assert torch.equal(target.weight, source.weight)


def test_dtype_and_memory_format_of_module_stay() -> None:
    module = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last).double()
    load_into(module, nn.Conv2d(3, 4, 3).half().state_dict())
    assert module.weight.dtype == torch.float64
    assert module.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_check_finite(value: float) -> None:
    weights = {"good": torch.ones(2), "count": torch.tensor(3), "bad": torch.tensor([1.0, value])}
    with pytest.raises(CheckpointError, match="1 of 3 tensors hold NaN or infinity: bad"):
        check_finite(weights)
    del weights["bad"]
    check_finite(weights)


def test_first_names() -> None:
    assert first_names(["a", "b"]) == "a, b"
    assert first_names("abcdef") == "a, b, c, d, e, …"


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

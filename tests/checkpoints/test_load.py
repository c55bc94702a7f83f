from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mnp.checkpoints.inspection import CheckpointError
from lightning_mnp.checkpoints.load import PrefixMatch, load_into


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def renamed(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in weights.items()}


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

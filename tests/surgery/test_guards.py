from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import same, snapshot
from torch import nn

import lightning_mnp
from lightning_mnp.surgery.guards import (
    refuse_lazy_modules,
    refuse_quantized,
    refuse_scripts,
    refuse_wrappers,
    require_module,
    running_alone,
    unchanged_on_error,
)

# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "loader", "message"),
    [
        ("model.pt", [], r"the path 'model\.pt'\. Build the network .*`lightning-mnp scan`"),
        (Path("model.pt"), [], r"the path 'model\.pt'"),
        (
            nn.Linear(1, 1).state_dict(),
            [],
            r"another dict, of 2 entries\. .*load_into\(network, st",
        ),
        ([], nn.Linear(1, 1), r"class list\. The model comes first and the loader second: swap"),
        (None, [], r"class NoneType\. Pass the network"),
    ],
)
def test_what_is_no_model_is_told(model: Any, loader: Any, message: str) -> None:
    with pytest.raises(TypeError, match=rf"`model` to be a torch\.nn\.Module, but got .*{message}"):
        require_module(model, loader)
    for call in (lightning_mnp.audit, lightning_mnp.defend):
        with pytest.raises(TypeError, match=message):
            call(model, loader)


@pytest.mark.parametrize("package", ["torch.ao.nn.quantized.dynamic", "torch.nn.quantized"])
def test_quantized_layers_are_refused(package: str) -> None:
    model = nn.Sequential(nn.ReLU(), nn.Linear(2, 2))
    refuse_quantized(model)
    model[1] = type("Linear", (nn.Module,), {"__module__": f"{package}.modules.linear"})()
    with pytest.raises(ValueError, match=r"'1' in it is quantized \(Linear\)\. Pass the network"):
        refuse_quantized(model)


@pytest.mark.parametrize("inside", [False, True])
def test_parallel_wrappers_are_refused(inside: bool) -> None:
    wrapped: nn.Module = nn.DataParallel(nn.Linear(1, 1))
    model = nn.Sequential(wrapped) if inside else wrapped
    found = "'0' in it is" if inside else "it is"
    with pytest.raises(
        ValueError, match=f"but {found} a DataParallel. Pass its attribute `module`"
    ):
        refuse_wrappers(model)
    refuse_wrappers(wrapped.module)


@pytest.mark.parametrize(
    ("name", "package", "refused"),
    [
        ("DeepSpeedEngine", "deepspeed.runtime.engine", True),
        ("FullyShardedDataParallel", "torch.distributed.fsdp", True),
        ("DataParallel", "my_networks", False),  # a class of the user's own
    ],
)
def test_wrappers_are_known_by_class_and_package(name: str, package: str, refused: bool) -> None:
    base = type(name, (nn.Linear,), {"__module__": package})
    model = type("Derived", (base,), {"__module__": "my_networks"})(1, 1)
    if not refused:
        refuse_wrappers(model)
        return
    match = f"but it is a {name}. Save the full weights, and load them into a network without"
    with pytest.raises(ValueError, match=match):
        refuse_wrappers(model)


@pytest.mark.parametrize("inside", [False, True])
def test_torchscript_is_refused(inside: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        traced = torch.jit.trace(nn.Linear(2, 1), torch.rand(1, 2))
    model = nn.Sequential(traced) if inside else traced
    found = "'0' in it is" if inside else "it is"
    with pytest.raises(ValueError, match=f"made of Python modules, but {found} TorchScript. Pass"):
        refuse_scripts(model)
    refuse_scripts(nn.Sequential(nn.Linear(2, 1)))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_modules_are_refused_until_they_have_seen_data() -> None:
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"but '1' is a lazy module that has not seen data\. Run"):
        refuse_lazy_modules(model)
    model(torch.rand(2, 4))
    refuse_lazy_modules(model)


# --- running alone -----------------------------------------------------------------------------


def test_synchronized_statistics_are_those_of_this_process() -> None:
    made = nn.Sequential(nn.SyncBatchNorm(2), nn.Sequential(nn.SyncBatchNorm(2))).train()
    images = torch.rand(8, 2, 3, 3)
    plain = nn.Sequential(nn.BatchNorm2d(2), nn.Sequential(nn.BatchNorm2d(2))).train()
    with running_alone(made):
        found = made(images)
    assert torch.equal(found, plain(images))
    assert torch.equal(made[0].running_mean, plain[0].running_mean)


def test_running_alone_leaves_no_trace() -> None:
    norms = nn.SyncBatchNorm(2), nn.Sequential(nn.SyncBatchNorm(2))
    made = nn.Sequential(nn.Conv2d(1, 2, 1), *norms)
    before = [dict(vars(module)) for module in made.modules()]
    with running_alone(made), running_alone(made):  # also one in the other
        made(torch.rand(2, 1, 8, 8))
    for module, attributes in zip(made.modules(), before, strict=True):
        assert vars(module).keys() == attributes.keys()


def test_running_alone_ends_with_an_error() -> None:
    made = nn.SyncBatchNorm(2)

    def fail() -> None:
        with running_alone(made):
            assert "forward" in vars(made)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert "forward" not in vars(made)


def test_a_forward_of_the_users_own_stays() -> None:
    made = nn.SyncBatchNorm(2)
    made.forward = lambda maps: maps  # type: ignore[method-assign]
    own = made.forward
    with running_alone(made):
        assert made.forward is own
    assert made.forward is own


def test_compiled_code_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    stances: list[str] = []

    class Stance:
        def __init__(self, stance: str) -> None:
            stances.append(stance)

        def __enter__(self) -> None:
            stances.append("entered")

        def __exit__(self, *error: Any) -> None:
            stances.append("left")

    monkeypatch.setattr(torch.compiler, "set_stance", Stance)
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    with running_alone(nn.Linear(1, 1)):
        assert stances == []  # nothing has been compiled
    monkeypatch.setitem(sys.modules, "torch._dynamo", ModuleType("torch._dynamo"))
    with running_alone(nn.Linear(1, 1)):
        assert stances == ["force_eager", "entered"]
    assert stances[-1] == "left"


# --- put back after an error -------------------------------------------------------------------


def network() -> nn.Module:
    made = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Sequential(nn.Dropout()))
    made[1].eval()
    made[0].bias.requires_grad_(False)
    made[0].register_forward_hook(lambda *args: None)
    return made


def spoil(made: nn.Module) -> None:
    made.train()[1].train()
    made[0].bias.requires_grad_(True)
    made[0].weight = nn.Parameter(torch.zeros(3))
    made[1].running_mean = torch.ones(7)
    made[0].register_forward_hook(lambda *args: None)
    made[2].register_forward_pre_hook(lambda *args: None, with_kwargs=True)
    made[2].append(nn.Linear(1, 1))
    del made[0].bias


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_everything_is_put_back(error: type[BaseException]) -> None:
    made = network()
    before, objects = snapshot(made), list(made.parameters())

    def fail() -> None:
        with unchanged_on_error(made):
            spoil(made)
            assert not same(before, snapshot(made))
            raise error

    with pytest.raises(error):
        fail()
    assert same(before, snapshot(made))
    assert all(old is new for old, new in zip(objects, made.parameters(), strict=True))


def test_a_hook_put_back_can_be_removed() -> None:
    made = network()
    handle = made[0].register_forward_pre_hook(lambda *args: None)
    with pytest.raises(KeyError), unchanged_on_error(made):
        raise KeyError
    handle.remove()
    assert not made[0]._forward_pre_hooks


def test_success_changes_what_it_changes() -> None:
    made = network()
    with unchanged_on_error(made):
        spoil(made)
    assert made[0].weight.shape == (3,)

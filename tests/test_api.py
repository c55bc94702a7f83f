from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    UserModule,
    images_and_labels,
    loader,
    quick_config,
    same,
    snapshot,
    trained_network,
)
from rich.errors import LiveError
from torch import nn

import lightning_mnp
from lightning_mnp import DefenseSet, MNPDefense, PruningOptions
from lightning_mnp.engine import runner
from lightning_mnp.engine.runner import run_defense

pytestmark = pytest.mark.usefixtures("short_searches")


def test_user_module_without_forward_is_called_by_its_network() -> None:
    module = UserModule(trained_network())
    report = lightning_mnp.defend(module, loader(), when="always", config=quick_config())
    direct = lightning_mnp.defend(trained_network(), loader(), when="always", config=quick_config())
    assert [(name.removeprefix("net."), i) for name, i in report.pruned] == direct.pruned
    assert type(report.model) is UserModule


def test_forward_and_unpack_can_be_told() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = trained_network()

        def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
            return {"scores": self.inner(batch["picture"])}

    images, labels = images_and_labels()
    report = lightning_mnp.audit(
        Odd(),
        [{"picture": images, "truth": labels}],
        config=quick_config(),
        forward=lambda network, x: network({"picture": x})["scores"],
        unpack=lambda batch: (batch["picture"], batch["truth"]),
    )
    assert report.defense_set.images == len(images)


@pytest.mark.parametrize(
    "stop", [4, 13, *(pytest.param(stop, marks=pytest.mark.slow) for stop in (1, 10, 19))]
)
def test_killed_call_goes_on(tmp_path: Path, stop: int) -> None:
    """The state file is of the last finished phase; the rest is done again, the same."""

    class KilledError(Exception):
        pass

    reference = lightning_mnp.defend(
        trained_network(), loader(), when="always", config=quick_config()
    )
    steps = 0

    def kill(*args: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == stop:
            raise KilledError

    state = tmp_path / "state.pt"
    data = DefenseSet.from_loader(loader())
    with pytest.raises(KilledError):
        run_defense(
            MNPDefense(trained_network(), data, quick_config()), state_file=state, observe=kill
        )
    report = lightning_mnp.defend(
        trained_network(), data, when="always", config=quick_config(), state_file=state
    )
    assert report.pruned == reference.pruned
    assert report.pruning.scores == reference.pruning.scores
    assert list(tmp_path.iterdir()) == []


def test_state_that_goes_while_it_is_read_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process finishes an earlier call with the same file."""
    state = tmp_path / "state.pt"
    state.write_bytes(b"about to go")
    read = runner.read_checkpoint

    def too_late(path: Path, **options: Any) -> Any:
        path.unlink()
        return read(path, **options)

    monkeypatch.setattr(runner, "read_checkpoint", too_late)
    config = quick_config(runs=1)
    report = lightning_mnp.audit(trained_network(), loader(), config=config, state_file=state)
    assert report.filters > 0
    assert not state.exists()


def test_state_of_something_else_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state.pt"
    defense = MNPDefense(trained_network(), DefenseSet.from_loader(loader()), quick_config())
    torch.save(defense.state_dict(), state)
    other = quick_config(seed=1)
    with pytest.raises(ValueError, match="Expected the state to belong to the same options"):
        lightning_mnp.defend(
            trained_network(), loader(), when="always", config=other, state_file=state
        )
    with pytest.raises(ValueError, match="Expected the state to belong to the same weights"):
        lightning_mnp.defend(
            trained_network(steps=2),
            loader(),
            when="always",
            config=quick_config(),
            state_file=state,
        )
    torch.save({"format": 99}, state)
    with pytest.raises(ValueError, match=r"in format \d+, but got 99"):
        lightning_mnp.audit(trained_network(), loader(), config=quick_config(), state_file=state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no convolution", "at least one convolution"),
        ("empty", "yields no batch"),
        ("single class", "at least two classes"),
        ("labels", "to be below 4, the model's number of classes, but got 7"),
        ("negative labels", "to be at least 0, but got -1"),
        ("shape", "to take images of shape"),
        ("uint8", "to be floating point"),
        ("nan data", "images to be finite"),
        ("nan weights", "weights to be finite"),
        ("pattern", "matches none of"),
        ("count", "to be below 88"),
    ],
)
def test_bad_input_is_told_before_any_work(change: str, message: str) -> None:
    network = trained_network()
    images, labels = images_and_labels()
    config = quick_config()
    if change == "no convolution":
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    elif change == "single class":
        labels = torch.zeros_like(labels)
    elif change == "labels":
        labels[3] = 7
    elif change == "negative labels":
        labels[3] = -1
    elif change == "shape":
        images = images.expand(-1, 3, -1, -1)
    elif change == "uint8":
        images = images.to(torch.uint8)
    elif change == "nan data":
        images[0, 0, 0, 0] = float("nan")
    elif change == "nan weights":
        next(network.parameters()).data[0] = float("nan")
    elif change == "pattern":
        config = quick_config(include=["backbone.*"])
    elif change == "count":
        config = quick_config(amount=88)
    batches = [] if change == "empty" else [(images, labels)]
    before = snapshot(network)
    with pytest.raises(ValueError, match=message):
        lightning_mnp.defend(network, batches, when="always", config=config)
    if change != "nan weights":
        assert same(before, snapshot(network))


def test_threshold_out_of_range() -> None:
    with pytest.raises(ValueError, match="from 1 to 3"):
        PruningOptions(rule="threshold", amount=3.5)


@pytest.mark.parametrize("network", [None, "net"])
def test_purified_module_without_forward_is_audited_again(network: str | None) -> None:
    module = UserModule(trained_network())
    if network is not None:
        module.other = nn.Linear(1, 1)  # so that the network has to be named
    config = quick_config(reaudit=True, verdict="ratio")
    report = lightning_mnp.defend(
        module, loader(), network=network, config=config, when="always", seed=0
    )
    assert report.reaudit is not None
    assert report.reaudit.verdict in ("clean", "backdoored", "undecided")


def test_module_that_keeps_results_is_purified() -> None:
    module = UserModule(trained_network())
    module.losses = [module.training_step((images_and_labels()[0], images_and_labels()[1]), 0)]
    config = quick_config(reaudit=True, verdict="ratio")
    report = lightning_mnp.defend(module, loader(), config=config, when="always")
    assert isinstance(report.model, UserModule)
    assert len(report.pruned) == 5


@pytest.mark.parametrize("call", [lightning_mnp.audit, lightning_mnp.defend])
def test_config_of_another_kind_is_refused(call: Any) -> None:
    for options in ({}, {"seed": 1}):
        with pytest.raises(TypeError, match="`config` to be an MNPConfig, but got dict"):
            call(trained_network(), loader(), config={"runs": 1}, **options)


def test_a_data_set_serves_as_well_as_a_loader() -> None:
    config, dataset = quick_config(verdict="ratio"), loader().dataset
    reports = [
        lightning_mnp.audit(trained_network(), data, config=config) for data in (loader(), dataset)
    ]
    assert reports[0].defense_set == reports[1].defense_set
    assert reports[0].detection_ratio == reports[1].detection_ratio


def test_classes_that_are_not_tried_are_told() -> None:
    def warnings(most: int) -> list[str]:
        config = quick_config(most_classes=most)
        report = lightning_mnp.audit(trained_network(), loader(count=60), config=config)
        tried = {
            signal.name: len(signal.classes)
            for signal in report.signals
            if signal.name not in ("pile-up", "permutation")
        }
        assert set(tried) == {"margin", "patch", "reach", "warp"}
        assert set(tried.values()) == {min(most, 4)}
        return report.warnings

    assert warnings(4) == []
    assert "triggers were searched for in 3 of 4 classes" in warnings(3)[0]


def test_weights_of_low_precision_are_told() -> None:
    network = trained_network().to(torch.bfloat16)
    images, labels = images_and_labels()
    data = DefenseSet(images.to(torch.bfloat16), labels)
    report = lightning_mnp.audit(network, data, config=quick_config(verdict="ratio"))
    assert report.warnings[0].startswith("weights are bfloat16 ('conv1.weight')")


def test_state_of_another_precision_is_refused() -> None:
    data = DefenseSet(*images_and_labels())
    network = trained_network()

    def autocast() -> Any:
        return torch.autocast("cpu", torch.bfloat16)

    state = MNPDefense(network, data, quick_config(), autocast=autocast).state_dict()
    with pytest.raises(ValueError, match=r"same precision, but it is 'torch.float32' now"):
        MNPDefense(network, data, quick_config()).load_state_dict(state)


def test_what_cannot_be_copied_is_told_before_any_work(tmp_path: Path) -> None:
    module = UserModule(trained_network())
    with (tmp_path / "log").open("w") as file:
        module.log_file = file  # type: ignore[assignment]
        with pytest.raises(ValueError, match="can be copied"):
            lightning_mnp.defend(module, loader(), config=quick_config())
        with pytest.raises(ValueError, match="can be copied"):
            lightning_mnp.defend(module, loader(), config=quick_config(reaudit=False))
        report = lightning_mnp.audit(module, loader(), config=quick_config())
    assert report.model is None


@pytest.mark.parametrize("make", [torch.jit.script, lambda n: torch.jit.trace(n, torch.rand(2, 4))])
@pytest.mark.filterwarnings(
    "ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning"
)
def test_torchscript_is_refused(make: Any) -> None:
    scripted = make(nn.Linear(4, 2))
    for model, found in ((scripted, "it is"), (nn.Sequential(scripted), "'0' in it is")):
        with pytest.raises(ValueError, match=f"made of Python modules, but {found} TorchScript"):
            MNPDefense(model, DefenseSet(torch.rand(4, 1, 4), torch.arange(4) % 2))


def test_another_display_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    """With rich 13, a second bar beside Lightning's is an error."""

    def start(self: Any) -> None:
        raise LiveError("Only one live display may be active at once")

    monkeypatch.setattr(runner.Progress, "start", start)
    report = lightning_mnp.audit(trained_network(), loader(), config=quick_config(), progress=True)
    assert report.runs

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from helpers import images_and_labels, loader, same, snapshot
from torch import nn

from lightning_mnp import DefenseSet, baselines
from lightning_mnp.baselines import (
    ANPConfig,
    BaselineResult,
    DetectionResult,
    FTConfig,
    FTSAMConfig,
    IBAUConfig,
    NADConfig,
    RNPConfig,
    Suspects,
    ft,
    ft_sam,
    ibau,
    nad,
    rnp,
)

DATA = DefenseSet(*images_and_labels())


def small_network() -> nn.Module:
    layers = nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(36, 4)).eval()


@torch.no_grad()
def accuracy(network: nn.Module, data: DefenseSet) -> float:
    return float((network(data.images).argmax(1) == data.labels).float().mean())


def drop_channels(network: nn.Module, images: Any, seed: int) -> BaselineResult:
    """A defense of a user: it removes three filters of the first convolution by chance."""
    data = DefenseSet.from_loader(images)
    defended: Any = copy.deepcopy(network)
    drawn = torch.randperm(4, generator=torch.Generator().manual_seed(seed))[:3]
    with torch.no_grad():
        defended[0].weight[drawn] = 0.0
    rates = (accuracy(network, data), accuracy(defended, data))
    pruned = [("0", index) for index in drawn.tolist()]
    return BaselineResult(defended, pruned, [0.0] * 3, *rates)


@pytest.fixture
def own() -> Iterator[str]:
    baselines.register("drop-channels", drop_channels)
    yield "drop-channels"
    baselines.unregister("drop-channels")


def test_a_defense_from_outside_is_found_and_used(own: str) -> None:
    assert baselines.names()[-1] == own
    network = small_network()
    before = snapshot(network)
    defend = baselines.find(own)
    result, again, other = (defend(network, DATA, seed) for seed in (0, 0, 1))
    assert same(before, snapshot(network))
    assert result.pruned == again.pruned != other.pruned
    assert result.accuracy_before == accuracy(network, DATA)
    assert result.accuracy_after == accuracy(result.model, DATA)
    weights = result.model.state_dict()["0.weight"]
    dropped = [index for _, index in result.pruned]
    assert [index for index in range(4) if not weights[index].any()] == sorted(dropped)


def test_a_defense_is_gone_after_it_is_removed(own: str) -> None:
    baselines.unregister(own)
    assert own not in baselines.names()
    with pytest.raises(ValueError, match=r"`name` to be one of \[.*'rnp'.*\], but got 'drop-chan"):
        baselines.find(own)
    with pytest.raises(ValueError, match=r"but got 'drop-channels'\. Add a defense of"):
        baselines.unregister(own)
    baselines.register(own, drop_channels)


@pytest.mark.parametrize("name", baselines.names())
def test_every_defense_of_the_package_takes_a_network_images_and_a_seed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    anp = import_module("lightning_mnp.baselines.anp")  # the package has the function by that name
    monkeypatch.setattr(anp, "ANPConfig", partial(ANPConfig, iterations=2))
    result = baselines.find(name)(small_network(), DATA, 3)
    assert isinstance(result, BaselineResult)
    assert len(result.pruned) == len(result.scores)


def test_the_defenses_of_the_package_are_registered() -> None:
    expected = {"rnp", "ft", "fp", "clp", "nft", "anp", "ft-sam", "i-bau", "nad", "nc"}
    assert expected == {*baselines.names()}


def test_rnp_is_run_with_its_defaults_and_the_seed() -> None:
    network = small_network()
    found = baselines.find("rnp")(network, DATA, 3)
    expected = rnp(network, DATA, config=RNPConfig(seed=3))
    assert found == expected
    assert same(snapshot(found.model), snapshot(expected.model))


@pytest.mark.parametrize(
    ("name", "defense", "error", "message"),
    [
        ("rnp", drop_channels, ValueError, "there is a defense 'rnp'. Choose another name, or"),
        ("", drop_channels, ValueError, "`name` to be the defense's name, but it is empty"),
        (
            "mine",
            "rnp",
            TypeError,
            r"`defense` to be a function .*, seed\), but got str",
        ),
    ],
)
def test_what_cannot_be_registered(
    name: str, defense: Any, error: type[Exception], message: str
) -> None:
    before = baselines.names()
    with pytest.raises(error, match=message):
        baselines.register(name, defense)
    assert baselines.names() == before


SUSPECTS = Suspects(*images_and_labels(60))


def doubting(network: nn.Module, images: Any, seed: int, suspects: Any = None) -> DetectionResult:
    """A detector of a user: it trusts no network with many images."""
    count = len(DefenseSet.from_loader(images))
    return DetectionResult(float(count), 10.0, seed, {0: float(count)})


def test_a_detector_from_outside_is_found_used_and_removed() -> None:
    baselines.register_detector("doubting", doubting)
    assert baselines.detector_names()[-1] == "doubting"
    assert baselines.find_detector("doubting")(small_network(), DATA, 3).verdict == "backdoored"
    with pytest.raises(ValueError, match=r"a detector 'doubting'. Choose .*`unregister_detector`"):
        baselines.register_detector("doubting", doubting)
    baselines.unregister_detector("doubting")
    assert "doubting" not in baselines.detector_names()
    with pytest.raises(ValueError, match=r"'doubting'\. Add a detector .*\.register_detector`"):
        baselines.find_detector("doubting")
    with pytest.raises(ValueError, match="`name` to be one of"):
        baselines.unregister_detector("doubting")
    with pytest.raises(TypeError, match=r"`detector` to be a function .*, suspects\), but got str"):
        baselines.register_detector("doubting", "nc")


def test_every_detector_is_listed_and_says_what_it_needs() -> None:
    assert baselines.detector_names() == ["nc", "mm-bd", "ac", "sc", "strip"]
    for name in ("ac", "sc", "strip"):
        with pytest.raises(ValueError, match="Expected argument `suspects` to be"):
            baselines.find_detector(name)(small_network(), DATA, 3)


def test_detectors_of_suspect_images_judge_a_network_and_leave_it_alone() -> None:
    network = small_network().train()
    before = snapshot(network)
    for name in ("ac", "sc"):
        result = baselines.find_detector(name)(network, DATA, 3, SUSPECTS)
        assert (result.verdict == "backdoored") == (result.target_class is not None)
        assert sorted(result.values) == [0, 1, 2, 3]
        assert len(result.sample_scores) == 60
    assert same(before, snapshot(network))


# --- what holds for every method of the package -------------------------------------------------

METHODS = [
    *(("defense", name) for name in baselines.names()),
    *(("detector", name) for name in baselines.detector_names()),
]
# Short, but through every step.
SHORT: dict[str, dict[str, Any]] = {
    "anp.ANPConfig": {"iterations": 2},
    "fp.FPConfig": {"epochs": 1},
    "ft.FTConfig": {"epochs": 1},
    "ft_sam.FTSAMConfig": {"epochs": 1},
    "ibau.IBAUConfig": {"rounds": 1},
    "mm_bd.MMBDConfig": {"starts": 2, "steps": 3},
    "nad.NADConfig": {"teacher_epochs": 1, "epochs": 1},
    "nc.NCConfig": {"epochs": 2},
    # An index that some class is above, so that there is something to unlearn.
    "nc_unlearning.NCConfig": {"epochs": 2, "anomaly": 1e-3},
    "nc_unlearning.NCUnlearningConfig": {"epochs": 1},
    "nft.NFTConfig": {"steps": 1},
    "rnp.RNPConfig": {"unlearning_epochs": 1, "recovering_epochs": 1},
    "strip.STRIPConfig": {"overlays": 5},
}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for path, options in SHORT.items():
        module_name, kind = path.split(".")
        module = import_module(f"lightning_mnp.baselines.{module_name}")
        monkeypatch.setattr(module, kind, partial(getattr(module, kind), **options))


def run(task: str, name: str, network: Any, images: Any = DATA) -> Any:
    if task == "defense":
        return baselines.find(name)(network, images, 3)
    return baselines.find_detector(name)(network, images, 3, SUSPECTS)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(("task", "name"), METHODS)
def test_it_works_where_gradients_are_disabled(task: str, name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = small_network()
    expected = run(task, name, network)
    with torch.no_grad():
        found = run(task, name, network)
        assert not torch.is_grad_enabled()
    if task == "defense":
        assert same(snapshot(found.model), snapshot(expected.model))
    else:
        assert found == expected


@pytest.mark.parametrize("tune", [ft, ft_sam, nad, ibau])
def test_the_callers_autocast_keeps_no_former_weights(tune: Any) -> None:
    """Autocast's own copies of the weights would outlive the steps that change them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = small_network()
    kinds: dict[Any, Any] = {ft: FTConfig, ft_sam: FTSAMConfig, nad: NADConfig, ibau: IBAUConfig}
    steps = "rounds" if tune is ibau else "epochs"
    config = kinds[tune](**{steps: 60, "augment": "none"})
    with torch.autocast("cpu", torch.bfloat16):
        inside = tune(network, loader(), config=config)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        plain = tune(network, loader(), config=config)
    assert inside.accuracy_after == plain.accuracy_after
    assert inside.details == plain.details


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(("task", "name"), METHODS)
def test_a_network_whose_copy_would_run_the_original_is_refused(task: str, name: str) -> None:
    network = small_network().train()
    original = network.forward
    network.forward = lambda images: original(images)  # type: ignore[method-assign]
    before = snapshot(network)
    with pytest.raises(ValueError, match=r"that of the Sequential was replaced by a function"):
        run(task, name, network)
    assert same(before, snapshot(network))


class Keeper(nn.Sequential):
    """Keeps what it has computed, as training steps do."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = super().forward(images)
        self.last = logits
        return logits


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(("task", "name"), METHODS)
def test_a_network_that_keeps_results_is_taken(task: str, name: str) -> None:
    network = Keeper(*small_network().children()).eval()
    network(DATA.images)
    assert network.last.grad_fn is not None
    assert run(task, name, network) is not None


@pytest.mark.parametrize(("task", "name"), METHODS)
def test_what_is_no_network_is_told(task: str, name: str) -> None:
    with pytest.raises(TypeError, match=r"`model` to be a torch.nn.Module, .* path 'model\.pt'"):
        run(task, name, "model.pt")


@pytest.mark.parametrize(
    ("config", "published"),
    [
        # The authors' script (defense.py); length and step of the trigger: their notebook.
        (
            IBAUConfig(),
            {"batch_size": 100, "rounds": 5, "lr": 1e-3, "share": 0.01, "terms": 5}
            | {"trigger_lr": 10.0, "trigger_norm": 10.0, "penalty": 1e-3, "response_lr": 0.1},
        ),
        # The paper, Section 5.1, and the authors' program.
        (
            ANPConfig(),
            {"batch_size": 128, "iterations": 2000, "lr": 0.2, "momentum": 0.9}
            | {"eps": 0.4, "alpha": 0.2, "noise_steps": 1},
        ),
        # What BackdoorBench's program runs with; as many steps as ten passes over 2,500 images.
        (
            NADConfig(),
            {"batch_size": 256, "teacher_epochs": 50, "epochs": 50, "lr": 0.01}
            | {"momentum": 0.9, "weight_decay": 5e-4, "weights": (500.0, 1000.0, 1000.0)},
        ),
        # The paper and BackdoorBench's port of its program.
        (
            RNPConfig(),
            {"batch_size": 128, "unlearning_lr": 0.01, "unlearning_epochs": 20}
            | {"stop_accuracy": 0.2, "recovering_lr": 0.2, "recovering_epochs": 20, "alpha": 0.2},
        ),
    ],
)
def test_the_defaults_are_the_published_ones(config: Any, published: dict[str, Any]) -> None:
    assert {name: getattr(config, name) for name in published} == published

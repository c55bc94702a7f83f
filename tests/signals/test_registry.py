from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from distributed_script import small_network
from helpers import images_and_labels, quick_config
from torch import nn

from lightning_mnp import DefenseSet, MNPDefense
from lightning_mnp.config import Constants
from lightning_mnp.report import Signal
from lightning_mnp.signals import (
    Search,
    SignalSearch,
    Trace,
    register,
    registered,
    unregister,
)
from lightning_mnp.signals.abstention import AbstentionConstants
from lightning_mnp.signals.base import Scene


class BrightTrace(Trace):
    """How sure the network is of the class under light, image by image."""

    name = "light"

    def __init__(self, scene: Scene, target: int) -> None:
        super().__init__(scene.constants)
        self.scene, self.target = scene, target

    def margins(self, masks: torch.Tensor) -> torch.Tensor:
        images = self.scene.data.images + 1.0
        logits = self.scene.masked(images, masks=masks, statistics="running")
        return logits[:, self.target] - logits.mean(1) + 2.0


class Brightness(SignalSearch):
    """Where predictions go when images get brighter: a signal that the package does not know."""

    name = "brightness"

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self.counts: list[int] = []

    @classmethod
    def all_steps(cls, scene: Scene) -> int:
        return 3

    @property
    def finished(self) -> bool:
        return len(self.counts) == 3

    def most_steps(self) -> int:
        return 3 - len(self.counts)

    def step(self) -> dict[str, float]:
        with torch.no_grad():
            images = self.scene.data.images + len(self.counts)
            found = self.scene.masked(images, statistics="running").argmax(1)
        self.counts.append(int(found.mode().values))
        return {"class": float(self.counts[-1])}

    @property
    def failed(self) -> bool:
        return False

    def signal(self) -> Signal:
        target = self.counts[-1]
        return Signal(self.name, 9.0, target, 1.0, 0.5, f"light leads to class {target}")

    def traces(self, target: int | None, searches: Mapping[str, Search]) -> list[Trace]:
        return [] if target is None else [BrightTrace(self.scene, target)]

    def state_dict(self) -> dict[str, Any]:
        return {"counts": list(self.counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts = [int(count) for count in state["counts"]]


class Darkness(Search):
    """How sure the network is in the dark: a trace that the package does not know."""

    name = "darkness"

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self.steps = 0

    @classmethod
    def all_steps(cls, scene: Scene) -> int:
        return 3

    @property
    def finished(self) -> bool:
        return self.steps == 3

    def most_steps(self) -> int:
        return 3 - self.steps

    def step(self) -> dict[str, float]:
        self.steps += 1
        return {}

    @property
    def failed(self) -> bool:
        return True  # which is of no account for the verdict

    def traces(self, target: int | None, searches: Mapping[str, Search]) -> list[Trace]:
        assert {"margin", "patch", "darkness"} <= set(searches)
        return [] if target is None else [BrightTrace(self.scene, target)]

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = int(state["steps"])


@pytest.fixture
def brightness() -> Iterator[None]:
    register(Brightness)
    yield
    unregister("brightness")


@pytest.fixture
def darkness() -> Iterator[None]:
    register(Darkness)
    yield
    unregister("darkness")


def new_defense(when: Any = "always", **changes: Any) -> MNPDefense:
    data = DefenseSet(*images_and_labels())
    options = {"rule": "auto", "amount": 0.02, "harm": 50.0, "runs": 1, **changes}
    constants = Constants(AbstentionConstants(abstain=False))  # so that 40 images are enough
    return MNPDefense(
        small_network(), data, quick_config(**options), when=when, constants=constants
    )


@pytest.mark.usefixtures("short_searches", "brightness")
def test_a_signal_from_outside_is_searched_for_judged_by_pruned_along_and_resumed() -> None:
    defense, halfway = new_defense(), None
    phases = []
    while not defense.finished:
        phases.append(defense.phase)
        defense.step()
        if phases.count("brightness") == 2 and halfway is None:
            halfway = copy.deepcopy(defense.state_dict())
    assert phases.count("brightness") == 3
    assert phases.index("permutation") < phases.index("brightness") < phases.index("verdict")
    report = defense.report()
    signal = report.signal("brightness")
    assert signal is not None
    assert (report.score, report.verdict, report.target_class) == (
        9.0,
        "backdoored",
        signal.target_class,
    )
    assert report.reasons[0] == signal.reason
    assert len(report.pruning.curve[0]) >= 3  # harm, the suppressed network, the light
    assert report.config["verdict"]["rule"] == "signals"
    again = new_defense()
    assert halfway is not None
    again.load_state_dict(halfway)
    while not again.finished:
        again.step()
    assert again.report().pruned == report.pruned


@pytest.mark.usefixtures("short_searches", "darkness")
def test_a_search_from_outside_is_made_for_pruning_and_resumed() -> None:
    defense, halfway = new_defense(), None
    phases = []
    while not defense.finished:
        phases.append(defense.phase)
        defense.step()
        if phases.count("darkness") == 2 and halfway is None:
            halfway = copy.deepcopy(defense.state_dict())
    assert phases.count("darkness") == 3
    assert phases.index("reach") < phases.index("verdict") < phases.index("overlay")
    assert phases.index("overlay") < phases.index("darkness") < phases.index("pruning")
    report = defense.report()
    assert report.signal("darkness") is None
    assert report.judged
    assert len(report.pruning.curve[0]) >= 3  # harm, the suppressed network, the dark
    again = new_defense()
    assert halfway is not None
    again.load_state_dict(halfway)
    while not again.finished:
        again.step()
    assert again.report().pruned == report.pruned


@pytest.mark.usefixtures("brightness", "darkness")
@pytest.mark.parametrize(
    ("when", "changes", "signal", "trace"),
    [
        ("always", {}, True, True),
        ("flagged", {}, True, True),
        ("never", {}, True, False),
        ("always", {"rule": "count", "amount": 2}, True, False),
        ("always", {"verdict": "ratio"}, True, True),  # to know the class, and where it is
        ("always", {"verdict": "ratio", "rule": "count", "amount": 2}, False, False),
        ("never", {"verdict": "ratio"}, False, False),
    ],
)
def test_searches_are_made_where_they_are_needed(
    when: Any, changes: dict[str, Any], signal: bool, trace: bool
) -> None:
    defense = new_defense(when, **changes)
    assert ("brightness" in defense.case.wanted_signals) == signal
    assert "darkness" not in defense.case.wanted_signals
    assert ("darkness" in defense.case.wanted_traces) == trace
    assert "brightness" not in defense.case.wanted_traces
    planned = [name for name, _ in defense.plan.entries]
    assert ("brightness" in planned) == signal
    assert ("darkness" in planned) == (trace and when == "always")  # else it is not known yet


@pytest.mark.parametrize("kind", [Brightness, Darkness])
def test_a_state_with_other_searches_is_refused(kind: type[Search]) -> None:
    state = new_defense().state_dict()
    register(kind)
    try:
        with pytest.raises(ValueError, match="belong to the same searches"):
            new_defense().load_state_dict(state)
    finally:
        unregister(kind.name)


def test_names_are_taken_once() -> None:
    with pytest.raises(ValueError, match=r"there is a search 'reach' already\. Choose another"):
        register(registered()["reach"])
    for wrong in (nn.Module, "reach", None):
        with pytest.raises(TypeError, match="Expected a subclass of Search, but got"):
            register(wrong)  # type: ignore[arg-type]
    with pytest.raises(KeyError):
        unregister("nothing")
    clash = type("Clash", (Brightness,), {"name": "masks"})
    with pytest.raises(ValueError, match="no phase of the engine has, but got 'masks'"):
        register(clash)


def test_registered_searches_cannot_be_changed_by_accident() -> None:
    registered().clear()
    assert list(registered()) == [
        "pile-up", "margin", "patch", "warp", "permutation", "reach", "overlay",
    ]  # fmt: skip

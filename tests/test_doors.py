"""The same seed gives the same masks, through every door."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import UserModule, loader, quick_config, quiet_trainer, trained_network

import lightning_mnp
from lightning_mnp import DefenseReport, MNPCallback, MNPDefense, MNPModule
from lightning_mnp.defense_data.defense_set import DefenseSet

pytestmark = [
    pytest.mark.usefixtures("short_searches"),
    pytest.mark.filterwarnings("ignore:MNPCallback. verdict"),
]


def plain() -> tuple[DefenseReport, dict[str, torch.Tensor]]:
    report = lightning_mnp.defend(trained_network(), loader(), when="always", config=quick_config())
    assert report.model is not None
    return report, report.model.state_dict()


def through_callback(folder: Path, **options: Any) -> tuple[DefenseReport, dict[str, torch.Tensor]]:
    module = UserModule(trained_network().train(), lr=0.0)
    for layer in module.modules():  # so that training changes nothing: the doors get one network
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 0.0
    tracked = {name: t for name, t in module.net.state_dict().items() if "num_batches" in name}
    callback = MNPCallback(
        "always",
        loader(7, shuffle=True),
        quick_config(),
        output_dir=folder,
        in_place=True,
        **options,
    )
    quiet_trainer(callbacks=[callback]).fit(module, loader())
    assert callback.report is not None
    weights = dict(module.net.state_dict())
    weights.update(tracked)
    return callback.report, weights


def through_module() -> tuple[DefenseReport, dict[str, torch.Tensor]]:
    module = MNPModule(trained_network(), quick_config())
    quiet_trainer(max_epochs=-1).fit(module, loader(9, shuffle=True))
    assert module.report is not None
    return module.report, module.network.state_dict()


def test_same_seed_same_result_through_every_door(tmp_path: Path) -> None:
    first, weights = plain()
    assert len(first.pruned) == 5
    for report, other in (through_callback(tmp_path), through_module()):
        assert [(name.removeprefix("net."), index) for name, index in report.pruned] == first.pruned
        assert report.pruning.scores == first.pruning.scores
        assert [run.predictions for run in report.runs] == [run.predictions for run in first.runs]
        assert report.detection_ratio == first.detection_ratio
        assert report.verdict == first.verdict
        for name, tensor in weights.items():
            if "num_batches_tracked" not in name:
                assert torch.equal(tensor, other[name]), name


def test_another_seed_gives_other_masks() -> None:
    scores = [
        lightning_mnp.defend(
            trained_network(), loader(), when="always", seed=seed, config=quick_config()
        ).pruning.scores
        for seed in (0, 1)
    ]
    assert scores[0] != scores[1]


@pytest.mark.parametrize("when", ["flagged", "always"])
def test_flagged_repeats_what_always_does(when: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks that come after the verdict are those that come before it."""
    monkeypatch.setattr("lightning_mnp.engine.case.judge", _always_backdoored)
    defense = MNPDefense(
        trained_network(), DefenseSet.from_loader(loader()), quick_config(), when=when
    )
    while not defense.finished:
        defense.step()
    reference = MNPDefense(
        trained_network(), DefenseSet.from_loader(loader()), quick_config(), when="always"
    )
    while not reference.finished:
        reference.step()
    assert torch.equal(defense.case.scores, reference.case.scores)
    assert defense.report().pruned == reference.report().pruned
    assert len(defense.report().runs) == 2


def _always_backdoored(*args: Any, **kwargs: Any) -> Any:
    from lightning_mnp.signals.verdict import Judgement

    return Judgement("backdoored", 0.1, 2.0, 0, ("a test says so",))


def test_audit_leaves_the_network_as_it_was() -> None:
    from helpers import same, snapshot

    network = trained_network().train()
    for parameter in list(network.parameters())[:3]:
        parameter.requires_grad_(False)
    before, state = snapshot(network), torch.get_rng_state()
    report = lightning_mnp.audit(network, loader(), config=quick_config())
    assert same(before, snapshot(network))
    assert torch.equal(state, torch.get_rng_state())
    assert report.model is None
    assert report.pruned == []


def test_defend_leaves_its_argument_as_it_was() -> None:
    from helpers import same, snapshot

    network = trained_network()
    before = snapshot(network)
    report = lightning_mnp.defend(network, loader(), when="always", config=quick_config())
    assert same(before, snapshot(network))
    assert report.model is not network
    fresh = copy.deepcopy(network)
    fresh.load_state_dict(report.model.state_dict(), strict=True)  # type: ignore[union-attr]

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from population_images import BADNETS, give_stored_images

from benchmarks.population import ablations, data, defenses, training
from benchmarks.population.ablations import ABLATIONS
from benchmarks.population.architectures import build
from benchmarks.population.defenses import defend_network, defense_version
from benchmarks.population.training import train_network
from lightning_mnp import Constants, DefenseSet, MNPConfig
from lightning_mnp.engine.defense import MNPDefense
from lightning_mnp.purify.greedy import GreedyConstants
from lightning_mnp.signals.registry import registered


@pytest.fixture
def images() -> DefenseSet:
    torch.manual_seed(0)
    return DefenseSet(torch.rand(20, 3, 32, 32), torch.arange(20) % 10)


class _StopError(Exception):
    """Raised in place of a run, once the engine is there."""


@pytest.mark.parametrize(
    ("name", "made", "reached"),
    [
        ("all-pieces", ["overlay"], True),
        ("no-reach", ["overlay"], False),
        ("no-overlay", [], True),
        ("no-further-trace", [], False),
    ],
)
def test_searches_are_left_out_and_come_back(
    name: str,
    made: list[str],
    reached: bool,
    images: DefenseSet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, seen = list(registered()), []

    def stop(engine: MNPDefense) -> None:
        seen.append((list(engine.case.wanted_traces), "reach" in engine.case.wanted_signals))
        assert engine.case.when == "flagged"
        raise _StopError

    monkeypatch.setattr(ablations, "run_defense", stop)
    with pytest.raises(_StopError):
        ABLATIONS[name].defend(build("lenet", 3, 32), images, 0)
    assert seen == [(made, reached)]
    assert list(registered()) == before


def test_stages_are_left_out(images: DefenseSet, monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[tuple[MNPConfig, Constants]] = []

    def stop(engine: MNPDefense) -> None:
        configs.append((engine.case.config, engine.case.constants))
        raise _StopError

    monkeypatch.setattr(ablations, "run_defense", stop)
    for name in ("no-masks", "no-greedy", "no-tuning"):
        with pytest.raises(_StopError):
            ABLATIONS[name].defend(build("lenet", 3, 32), images, 7)
    (masks, usual), (usual_steps, greedy), (tuning, _) = configs
    assert tuning.pruning.tuning_steps == 0 < masks.pruning.tuning_steps
    assert masks.pruning.soft_mask_steps == 0
    assert usual.of(GreedyConstants) == GreedyConstants()
    assert usual_steps.pruning.soft_mask_steps == MNPConfig().pruning.soft_mask_steps
    assert {config.seed for config, _ in configs} == {7}
    assert greedy.of(GreedyConstants) == GreedyConstants(candidates=0, rejected=0)  # takes none


def test_an_ablation_is_kept_like_a_defense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "DEFENSE_SIZE", {"cifar10": 20})
    give_stored_images(monkeypatch, training, defenses)
    train_network(BADNETS, tmp_path, tmp_path)
    row = defend_network(BADNETS, 0, "no-reach", tmp_path, tmp_path, tmp_path)
    assert row["verdict"] in ("clean", "undecided")  # hardly trained, and few images
    assert (row["CA_after"], row["ASR_after"]) == pytest.approx((row["CA"], row["ASR"]))
    assert row["passes"] > 0
    assert row["score_after"] is None  # no second audit
    assert row["version"] == defense_version("no-reach") != defense_version("all-pieces")

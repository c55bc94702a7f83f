from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from population_images import BADNETS, TINY, give_stored_images
from torch import nn

from benchmarks.population import data, defenses, training
from benchmarks.population.__main__ import main
from benchmarks.population.architectures import build
from benchmarks.population.audits import outcome_file, read_outcomes
from benchmarks.population.defenses import (
    DEFENSES,
    defend_network,
    defense_version,
    defenses_table,
)
from benchmarks.population.networks import RECIPES
from benchmarks.population.training import measure, train_network
from lightning_mnp import MNPConfig
from lightning_mnp.attacks.trigger import load_trigger
from lightning_mnp.benchmark.methods import Method, Outcome
from lightning_mnp.report import DefenseReport
from lightning_mnp.report.parts import SecondAudit


@pytest.fixture(autouse=True)
def images(monkeypatch: pytest.MonkeyPatch) -> data.Images:
    monkeypatch.setattr(data, "DEFENSE_SIZE", {"cifar10": 20})
    return give_stored_images(monkeypatch, training, defenses)


def test_every_defense_has_options_that_are_known() -> None:
    for name, method in DEFENSES.items():
        method.check("defense")
        assert name.startswith(method.name)
    amount = DEFENSES["rnp-share"].options["amount"]
    assert amount == MNPConfig.paper().pruning.amount == pytest.approx(30 / 4800)


def test_the_version_follows_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    before = defense_version("rnp-share")
    assert before != defense_version("rnp")
    monkeypatch.setitem(DEFENSES, "rnp-share", Method("rnp", {"rule": "share", "amount": 0.5}))
    assert before != defense_version("rnp-share")


def test_a_defense_leaves_a_file(images: data.Images, tmp_path: Path) -> None:
    before = train_network(BADNETS, tmp_path, tmp_path)
    defend_network(BADNETS, 1, "clp", tmp_path, tmp_path, tmp_path / "results")
    [kept] = read_outcomes("defended", tmp_path / "results")
    file = outcome_file("defended", BADNETS, 1, "clp", tmp_path / "results")
    assert file.name == "lenet-badnets-2-clp-set1.json"
    assert json.loads(file.read_text()) == kept
    wanted = {"network": "lenet-badnets-2", "set": 1, "defense": "clp", "split": "choosing"}
    wanted |= {"kind": "badnets", "target": 3, "version": defense_version("clp"), "verdict": None}
    assert {key: kept[key] for key in wanted} == wanted
    assert kept["CA"] == pytest.approx(before["CA"])
    assert kept["weights_sha256"] == before["weights_sha256"]
    network = training.load_network(BADNETS, tmp_path)
    again = DEFENSES["clp"].defend(network, data.defense_set(BADNETS, images, 1), 1)
    assert again.model is not None
    trigger = load_trigger(tmp_path / "lenet-badnets-2.trigger.safetensors")
    found = measure(again.model, BADNETS, images, trigger)
    assert (kept["CA_after"], kept["ASR_after"]) == pytest.approx(found, abs=1e-5)
    assert kept["pruned"] == len(again.pruned)
    assert "score" not in kept
    assert kept["passes"] > 0


def test_figures_are_those_of_the_defended_network(
    images: data.Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_network(BADNETS, tmp_path, tmp_path)
    trigger = load_trigger(tmp_path / "lenet-badnets-2.trigger.safetensors")
    other = build("lenet", 3, 32).eval()
    seen: list[tuple[int, int]] = []

    class Fake:
        label = "fake"

        def defend(self, network: nn.Module, given: Any, seed: int) -> Outcome:
            seen.append((len(given), seed))
            again = SecondAudit("clean", 0.25, None, False, math.nan, math.nan, [])
            report = DefenseReport("backdoored", score=math.nan, pruned=[("conv1", 2)])
            report.reaudit = again
            return Outcome(other, "backdoored", 3, None, report.pruned, 12.0, report=report)

    monkeypatch.setitem(DEFENSES, "mnp", Fake())
    row = defend_network(BADNETS, 0, "mnp", tmp_path, tmp_path, tmp_path)
    assert (row["CA_after"], row["ASR_after"]) == measure(other, BADNETS, images, trigger)
    assert (row["pruned"], row["passes"], row["target_class"]) == (1, 12.0, 3)
    assert (row["score"], row["score_after"], row["verdict_after"]) == (None, 0.25, "clean")
    assert seen == [(20, 0)]
    train_network(TINY, tmp_path, tmp_path)
    row = defend_network(TINY, 0, "mnp", tmp_path, tmp_path, tmp_path)
    assert (row["ASR"], row["ASR_after"]) == (None, None)


def outcome(
    network: str, defense: str, ca: float, asr: float | None, **more: Any
) -> dict[str, Any]:
    fields: dict[str, Any] = {"network": network, "defense": defense, "set": 0, "learned": True}
    fields |= {"CA": 0.6, "ASR": None if asr is None else 1.0, "pruned": 3, "passes": 100.0}
    fields |= {"verdict": None, "version": "ab12 rnp"}
    return {**fields, "CA_after": ca, "ASR_after": asr, "processor_seconds": 7.0, **more}


def test_the_table_compares_defenses_over_what_all_have_seen() -> None:
    first, second, third = RECIPES[6], RECIPES[7], RECIPES[0]
    rows = [
        outcome(first.name, "default", 0.58, 0.02, verdict="backdoored"),
        outcome(first.name, "default", 0.56, 0.32, set=1, passes=300.0, pruned=5),
        outcome(first.name, "rnp", 0.5, 0.1, passes=None),
        outcome(second.name, "default", 0.1, 0.9),  # not seen by the other
        outcome(third.name, "default", 0.6, None, verdict="clean"),
        outcome(third.name, "rnp", 0.57, None, passes=None),
        outcome(RECIPES[8].name, "rnp", 0.1, 0.9, learned=False),
        outcome("another", "rnp", 0.1, 0.9),
    ]
    lines = defenses_table(RECIPES, rows, sets=2).splitlines()
    worst = f"`{first.name}`"
    assert (
        lines[2] == f"| default | 1 | 1 of 1 | 2.0 | 2.0 | 2.0 | 0 of 1 | {worst} | 0.0 | 100 | 7 |"
    )
    assert lines[3] == f"| rnp | 1 | - | 10.0 | 10.0 | 10.0 | 0 of 1 | {worst} | 3.0 | - | 7 |"
    assert lines[5] == "| network | attack | before | default | rnp |"
    assert lines[7:10] == [
        f"| `{third.name}` | clean | 60.0 | 60.0 (3) | 57.0 (3) |",
        f"| `{first.name}` | {first.kind} | 60.0/100.0 | 57.0/17.0 (4) | 50.0/10.0 (3) |",
        f"| `{second.name}` | {second.kind} | 60.0/100.0 | 10.0/90.0 (3) | ? |",
    ]
    assert lines[-1] == "Versions of the code: ab12: 6."
    assert "58.0/2.0 (3) | 50.0" in defenses_table(RECIPES, rows, sets=1)


def test_the_table_of_nothing_has_its_columns() -> None:
    assert defenses_table(RECIPES, [], 2).startswith("| defense | networks | flagged | CA drop |")


def test_the_command_defends_what_is_missing_or_of_another_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = __import__("benchmarks.population.__main__", fromlist=["main"])
    known = {"cnn-light-202": None, "cnn-blend-216": True, "cnn-wanet-218": False}
    for name, learned in known.items():
        recipe = next(each for each in RECIPES if each.name == name)
        row = {"recipe": recipe.to_dict(), "CA": 0.6, "ASR": 0.9, "learned": learned}
        (tmp_path / f"{name}.json").write_text(json.dumps({**row, "weights_sha256": "ab"}))
    done: list[str] = []

    def here(jobs: Any, executor: Any, budget: float | None) -> Any:
        for job in jobs:
            done.append(job.name)
            assert job.work is module.defend_network
            yield job, outcome(job.arguments[0].name, job.arguments[2], 0.5, 0.01)

    monkeypatch.setattr(module, "run_jobs", here)
    places = ["--folder", str(tmp_path), "--results", str(tmp_path / "results"), "--sets", "1"]
    assert main(["defend", "--defenses", "default", "rnp", *places]) == 0
    names = ["cnn-light-202-default", "cnn-light-202-rnp"]
    names += ["cnn-blend-216-default", "cnn-blend-216-rnp"]
    assert done == [f"{name}-set0" for name in names]  # the attack of the third was not learned
    told = "cnn-blend-216-rnp-set0: CA 60.0 to 50.0, ASR 100.0 to 1.0, 3 filters, 7 s"
    assert told in capsys.readouterr().out
    there = outcome("cnn-blend-216", "default", 0.5, 0.1, weights_sha256="ab", version="old")
    monkeypatch.setattr(module, "read_outcomes", lambda kind, results: [there])
    for arguments, count in (([], 1), (["--renew"], 2)):
        done.clear()
        assert main(["defend", *arguments, *places]) == 0
        assert len(done) == count
    with pytest.raises(SystemExit):
        main(["defend", "--conditions", *places])
    assert "--conditions: only `audit` and `table` take it, but got 'defend'" in (
        capsys.readouterr().err
    )
    assert main(["table", "--defended", *places]) == 0
    assert "| `cnn-blend-216` | blend | 60.0/100.0 | 50.0/10.0 (3) |" in capsys.readouterr().out
    assert main(["table", "--defended", "--defenses", "rnp", *places]) == 0
    assert "cnn-blend-216" not in capsys.readouterr().out

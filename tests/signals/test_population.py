from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from helpers import loader, quick_config, trained_network
from scipy.stats import beta

from lightning_mnp import DefenseSet, MNPDefense, calibrate_threshold
from lightning_mnp.calibration.file import CalibrationFile, NetworkScore
from lightning_mnp.config import Constants
from lightning_mnp.signals.abstention import AbstentionConstants
from lightning_mnp.signals.population import SCORES_FORMAT, Population, read_population


def interval(hits: int, total: int) -> tuple[float, float]:
    """Clopper and Pearson by the quantiles of the beta distribution."""
    low = beta.ppf(0.025, hits, total - hits + 1) if hits else 0.0
    high = beta.ppf(0.975, hits + 1, total - hits) if hits < total else 1.0
    return low, high


@pytest.mark.parametrize(("score", "hits"), [(0.0, 4), (0.2, 4), (0.21, 3), (0.9, 1), (2.0, 0)])
def test_rate_and_interval(score: float, hits: int) -> None:
    population = Population({"a": 0.2, "b": 0.9, "c": 0.5, "d": 0.5}, "clean networks")
    rate = population.rate(score)
    assert rate is not None
    assert (rate.networks, rate.as_suspicious, rate.described) == (4, hits, "clean networks")
    assert rate.share == hits / 4
    assert (rate.low, rate.high) == pytest.approx(interval(hits, 4))


def test_no_rate_without_networks_or_score() -> None:
    assert Population({}, "clean networks").rate(0.5) is None
    assert Population({"a": 0.2}, "clean networks").rate(math.nan) is None


def test_the_package_brings_a_population() -> None:
    population = read_population()
    assert population.scores
    assert all(score >= 0 for score in population.scores.values())
    assert population.described.startswith("clean networks")


def test_a_calibration_is_a_population(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "calibration.json"
    file = CalibrationFile(path, {"seed": 0})
    for name, weights, score in [("a", "1", 0.25), ("b", "2", 0.5), ("copy", "1", 0.75)]:
        file.add(NetworkScore(name, weights, score, "clean", 1.0))
    population = read_population(str(path))
    assert population.scores == {"1": 0.75, "2": 0.5}  # the higher of two audits
    assert str(path) in population.described
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_population("~/calibration.json").scores == population.scores


def test_networks_without_a_part_in_the_threshold_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    file = CalibrationFile(path, {"seed": 0})
    for name, weights, score in [("a", "1", 0.25), ("b", "2", 0.5), ("evil", "3", 9.0)]:
        file.add(NetworkScore(name, weights, score, "clean", 1.0))
    assert read_population(str(path)).scores == {"1": 0.25, "2": 0.5, "3": 9.0}
    file.finish(calibrate_threshold([0.25, 0.5], 0.4), ["a", "b"])
    assert read_population(str(path)).scores == {"1": 0.25, "2": 0.5}


@pytest.mark.parametrize(
    "content",
    [
        "no JSON",
        "[]",
        '{"format": "other", "networks": []}',
        '{"format": "lightning-mnp calibration 2"}',
        '{"format": "lightning-mnp calibration 2", "networks": [{"weights": "a"}]}',
        '{"format": "lightning-mnp calibration 2", "networks": [], "calibration": 3}',
        '{"format": "lightning-mnp calibration 2", "networks": [], "calibration": {}}',
        '{"format": "lightning-mnp calibration 2", "networks": [{"weights": "a", "score": -1}]}',
        '{"format": "lightning-mnp calibration 2", "networks": [{"weights": "a", "score": NaN}]}',
        '{"format": "lightning-mnp calibration 2", "networks": [{"weights": "a", "score": []}]}',
    ],
)
def test_files_that_hold_no_scores(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    message = "`verdict.reference` to name a file that `lightning-mnp calibrate` has written"
    with pytest.raises(ValueError, match=message) as error:
        read_population(str(path))
    assert "other.json is none. Check the name" in str(error.value)


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be read \(No such file or directory\)"):
        read_population(str(tmp_path / "none.json"))


@pytest.mark.usefixtures("short_searches")
@pytest.mark.parametrize(
    ("rule", "judged"), [("signals", True), ("signals", False), ("ratio", True)]
)
def test_an_audit_compares_its_score(tmp_path: Path, rule: str, judged: bool) -> None:
    path = tmp_path / "calibration.json"
    networks = [{"weights": str(k), "score": 1e6 * k} for k in range(4)]
    path.write_text(json.dumps({"format": SCORES_FORMAT, "networks": networks}))
    defense = MNPDefense(
        trained_network(),
        DefenseSet.from_loader(loader()),
        quick_config(reference=str(path), verdict=rule),
        when="never",
        constants=Constants(AbstentionConstants(abstain=not judged)),
    )
    while not defense.finished:
        defense.step()
    report = defense.report()
    if rule == "ratio" or not judged:
        assert report.reference is None
        return
    assert report.reference is not None
    assert (report.reference.networks, report.reference.as_suspicious) == (4, 3)
    assert f"Of 4 clean networks of your own ({path}), 3 looked as suspicious" in str(report)


def test_the_file_is_read_before_any_work() -> None:
    data = DefenseSet.from_loader(loader())
    with pytest.raises(ValueError, match=r"verdict\.reference"):
        MNPDefense(trained_network(), data, quick_config(reference="none.json"))

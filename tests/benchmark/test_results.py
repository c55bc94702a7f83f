from __future__ import annotations

import statistics
from pathlib import Path

import pytest
from cell_results import MACHINE, result, write

from lightning_mnp.benchmark.results import Marks, Result, paper_figures, read_results


def test_paper_figures_are_whole() -> None:
    figures = paper_figures()
    assert "Magnitude-based Neuron Pruning" in figures["source"]
    for number, attacks in (("1", 10), ("2", 6)):
        rows = figures[number]["rows"]
        assert len(rows) == attacks + 1
        assert all(len(row) == 9 for row in rows.values())
        pairs = [pair for row in rows.values() for pair in row.values()]
        assert all(0 <= value <= 100 for pair in pairs for value in pair)
    assert all(len(row) == 5 for row in figures["3"]["rows"].values())
    assert set(figures["4"]["rows"]) == {"nc", "ac", "sc", "strip", "mnp"}


def test_the_printed_average_of_mnp_is_right_and_that_of_the_networks_is_not() -> None:
    """So a figure that was copied wrongly would show, and the note beside the data is true."""
    rows = {name: row for name, row in paper_figures()["1"]["rows"].items() if name != "Average"}
    printed = paper_figures()["1"]["rows"]["Average"]
    for place in (0, 1):
        mean = statistics.mean(row["mnp"][place] for row in rows.values())
        assert mean == pytest.approx(printed["mnp"][place], abs=0.006)
    mean = statistics.mean(row["none"][0] for row in rows.values())
    assert abs(mean - printed["none"][0]) > 1


def test_a_result_in_percent_and_by_the_papers_names() -> None:
    each = result(attack="FeatureCollision", after=(0.912, 0.034))
    assert each.attack == "FC"
    assert each.percent("after") == pytest.approx((91.2, 3.4))
    assert result(attack="InputAware").attack == "IAB"
    clean = result(attack="clean", after=(0.9, None))
    assert clean.is_clean
    assert clean.percent("before") == (95.0, None)


def test_settings() -> None:
    setting = result().setting
    assert str(setting) == (
        "CIFAR10, cifar_resnet18 of width 16, trained by `cifar10-2core`, 500 clean images, cpu"
    )
    assert setting.paper_table == "1"
    assert result(data="ImageNetSubsetDataModule").setting.paper_table == "2"
    assert result(data="DigitsDataModule").setting.paper_table is None
    options = {"model.lr": 0.1, "trainer.precision": "32-true"}
    told = 'with model.lr=0.1, trainer.precision="32-true",'
    assert told in str(result(options=options).setting)
    cats = result(data="ImageFolderDataModule", root="/data/cats").setting
    assert str(cats).startswith("ImageFolder of /data/cats, cifar_resnet18 of width 16")
    assert cats != result(data="ImageFolderDataModule", root="/data/dogs").setting
    # Rate, mode, attack and seed are no part of it.
    assert result(attack="clean", seed=3, rate=0.2, mode="all-to-all").setting == setting


def test_marks() -> None:
    marks = Marks()
    other = {**MACHINE, "name": "A GPU", "device": "cuda"}
    assert marks.mark([result()]) == "m1"
    assert marks.mark([result(), result(machine=other), result()]) == "m1, m2"
    assert marks.mark([]) == ""
    crowded = result()
    crowded = Result(crowded.name, {**crowded.content, "at_a_time": 4})
    assert marks.mark([crowded]) == "m3"
    assert marks.lines()[-1].endswith("lightning-mnp 0.1.0, 4 cells at a time")
    assert marks.setting(result().setting) == marks.setting(result(seed=2).setting) == "s1"
    assert marks.setting(result(width=8).setting) == "s2"
    lines = marks.lines()
    assert lines[2:4] == [
        "m1: A processor, threads: 1, Linux, Python 3.11, torch 2.6, lightning-mnp 0.1.0",
        "m2: A GPU, Linux, Python 3.11, torch 2.6, lightning-mnp 0.1.0",
    ]


def test_results_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`results` to be a folder with results.*has none. Run"):
        read_results(tmp_path)
    write([result(), result("rnp")], tmp_path)
    assert [each.label for each in read_results(tmp_path)] == ["anp", "rnp"]

from __future__ import annotations

import pytest
from cell_results import result

from lightning_mnp.benchmark.pairs import cell_of, mean_drop, mean_pair, pairs_of, shown


def test_pairs_before_are_those_of_networks_and_pairs_after_those_of_results() -> None:
    results = [
        result("anp", (0.9, 0.1)),
        result("clp", (0.8, 0.2)),
        result("clp", (0.7, 0.3), seed=1, before=(0.85, 0.95)),
        result("rnp", error="broken"),
    ]
    assert pairs_of(results, "after") == [(90.0, 10.0), (80.0, 20.0), (70.0, 30.0)]
    assert pairs_of(results, "before") == [(95.0, 100.0), (85.0, 95.0)]


def test_one_recipe_trained_twice_gives_two_networks() -> None:
    results = [
        result("anp", before=(0.95, 1.0), weights="a"),
        result("clp", before=(0.95, 1.0), weights="a"),
        result("rnp", before=(0.85, 0.9), weights="b"),
    ]
    assert pairs_of(results, "before") == [(95.0, 100.0), (85.0, 90.0)]


def test_a_drop_is_that_of_each_network() -> None:
    few, many = (
        result("anp", (0.78, 0.0), before=(0.8, 1.0), seed=1),
        [
            result("anp", (after, 0.0), before=(0.9, 1.0), size=size)
            for after, size in ((0.86, 100), (0.88, 200), (0.90, 500))
        ],
    )
    assert mean_drop([few, *many]) == pytest.approx(2.0)
    assert mean_drop([result("anp", error="broken")]) is None
    assert mean_drop([result("nc", None, task="detector")]) is None


def test_means_without_an_attack() -> None:
    assert mean_pair([(90.0, None), (80.0, None)]) == (85.0, None)
    assert mean_pair([(90.0, None), (80.0, 4.0)]) == (85.0, 4.0)
    assert shown((90.0, None)) == "90.00"


def test_a_cell_tells_what_failed_and_what_is_missing() -> None:
    done, broken = result("anp", (0.9, 0.02)), result("anp", error="broken", seed=1)
    assert cell_of([done]) == "90.00 / 2.00"
    assert cell_of([done, broken]) == "90.00 / 2.00, 1 failed"
    assert cell_of([done, broken], "before", digits=1) == "95.0 / 100.0"
    assert cell_of([broken]) == "error"
    assert cell_of([]) == "missing"

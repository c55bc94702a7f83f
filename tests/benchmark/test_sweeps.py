from __future__ import annotations

from typing import Any

from cell_results import result

from lightning_mnp.benchmark.results import Marks, Result
from lightning_mnp.benchmark.sweeps import by_options, by_size, comparable, without_trials


def trial(value: float, after: tuple[float, float] = (0.9, 0.01), **options: Any) -> Result:
    """The paper's setting with another mu."""
    method = {"name": "mnp", "options": {"suppression.mu": value}}
    return result(f"mnp (suppression.mu={value})", after, method=method, **options)


def test_a_method_with_options_is_a_trial_if_it_ran_on_one_attack_out_of_several() -> None:
    both = [trial(0.1), trial(0.1, attack="SIG")]
    plain = [result("anp"), result("anp", attack="SIG"), result("clp")]
    assert without_trials([*plain, *both]) == ([*plain, *both], [])
    assert without_trials([*plain, both[0]]) == (plain, ["mnp (suppression.mu=0.1)"])
    assert without_trials([plain[0], both[0]]) == ([plain[0], both[0]], [])
    # Clean networks are no attack, and a trial may have been made on one of them, too.
    clean = trial(0.1, attack="clean")
    assert without_trials([plain[0], clean, both[0]])[1] == []
    assert without_trials([*plain, clean])[1] == ["mnp (suppression.mu=0.1)"]


def test_other_numbers_of_clean_images_are_left_out_if_they_had_fewer_attacks() -> None:
    usual, other, small = result(), result(attack="SIG"), result(size=50)
    wide, clean = result(width=64), result(attack="clean", size=50)
    assert comparable([usual, small]) == [[small], [usual]]  # as many
    assert comparable([usual, other, small, clean]) == [[usual, other]]
    assert comparable([usual, other, wide]) == [[usual, other], [wide]]


def test_seeds_are_apart_unless_all_methods_had_them() -> None:
    first, second = [result("anp"), result("clp")], [result("anp", seed=1), result("clp", seed=1)]
    assert comparable([*first, *second]) == [[*first, *second]]
    assert comparable([*first, second[0]]) == [first, [second[0]]]
    trial = result("rnp", seed=1, method={"name": "rnp", "options": {"rule": "share"}})
    others = [result("anp", attack="SIG"), result("clp", attack="SIG")]
    assert comparable([*first, *others, *second, trial]) == [[*first, *others, *second, trial]]


def test_trials_stand_beside_the_method_without_options() -> None:
    results = [
        result("mnp", (0.8, 0.5)),
        result("mnp", (0.7, 0.6), attack="SIG"),
        trial(0.1, (0.85, 0.25)),
        trial(0.2, (0.75, 0.0), attack="SIG"),
        result("anp", (0.1, 0.1)),
        result("mnp", (0.1, 0.1), seed=1),  # no trial was made on its network
    ]
    table = by_options(results, Marks())
    assert table is not None
    assert table.rows == [
        [
            *("BadNets", "MNP (suppression.mu=0.1)", "95.0 / 100.0", "85.0 / 25.0"),
            *("80.0 / 50.0", "s1", "m1"),
        ],
        [
            *("SIG", "MNP (suppression.mu=0.2)", "95.0 / 100.0", "75.0 / 0.0"),
            *("70.0 / 60.0", "s1", "m1"),
        ],
    ]
    assert len(table.header) == 7
    assert by_options(results[:2], Marks()) is None


def test_numbers_of_clean_images_are_columns() -> None:
    results = [
        result("mnp", (0.8, 0.5)),
        result("mnp", (0.7, 0.6), size=50),
        result("mnp", (0.9, 0.0), size=2500),
        result("clp", (0.9, 0.2)),
        result("anp", (0.9, 0.1), size=50),
        result("anp", (0.9, 0.3), size=2500),
        result("mnp", (0.6, 0.5), attack="SIG"),
        result("mnp", (0.1, 0.1), seed=1),  # with no other number of images
        result("nc", None, task="detector", size=50),
    ]
    table = by_size(results, Marks())
    assert table is not None
    assert table.header[2:6] == ["before", "50", "500", "2500"]
    assert [row[:6] for row in table.rows] == [
        ["BadNets", "MNP", "95.0 / 100.0", "70.0 / 60.0", "80.0 / 50.0", "90.0 / 0.0"],
        ["BadNets", "ANP", "95.0 / 100.0", "90.0 / 10.0", "missing", "90.0 / 30.0"],
    ]
    assert by_size(results[3:4], Marks()) is None

from __future__ import annotations

from cell_results import result

from lightning_mnp.benchmark.overview import overview
from lightning_mnp.benchmark.results import Marks


def test_defenses_are_sorted_by_mean_asr_and_incomplete_ones_come_last() -> None:
    results = [
        result("anp", (0.90, 0.30)),
        result("anp", (0.92, 0.10), attack="SIG"),
        result("clp", (0.85, 0.02)),
        result("clp", (0.91, 0.04), attack="SIG"),
        result("ft", (0.80, 0.0)),
    ]
    [table] = overview(results, Marks())
    assert table.header[1:6] == ["BadNets", "SIG", "mean CA drop", "mean ASR", "ASR above 10%"]
    assert [row[0] for row in table.rows] == ["no defense", "CLP", "ANP", "fine-tuning"]
    none, clp, anp, ft = table.rows
    assert none[1:3] == ["95.0 / 100.0", "95.0 / 100.0"]
    assert clp[1:6] == ["85.0 / 2.0", "91.0 / 4.0", "7.0", "3.0", "0 of 2"]
    assert anp[3:6] == ["4.0", "20.0", "1 of 2"]
    assert ft[1:6] == ["80.0 / 0.0", "missing", "15.0, 1 of 2", "0.0, 1 of 2", "0 of 1"]


def test_clean_networks_have_a_column_and_no_part_in_the_means() -> None:
    results = [
        result("anp", (0.90, 0.0)),
        result("anp", (0.70, None), attack="clean"),
        result("clp", (0.60, None), attack="clean"),
    ]
    [table] = overview(results, Marks())
    none, anp, clp = table.rows
    assert table.header[:3] == ["defense", "BadNets", "clean"]
    assert none[2] == "95.0"
    assert anp[1:5] == ["90.0 / 0.0", "70.0", "5.0", "0.0"]
    assert clp[1:6] == ["missing", "60.0", "missing", "missing", "missing"]


def test_networks_of_an_attack_count_as_one() -> None:
    results = [
        result("anp", (0.95, 1.0)),
        result("anp", (0.95, 0.0), seed=1),
        result("anp", (0.95, 0.1), attack="SIG"),
    ]
    [table] = overview(results, Marks())
    assert table.rows[0][1:3] == ["95.0 / 100.0 (2)", "95.0 / 100.0"]
    assert table.rows[1][1:5] == ["95.0 / 50.0 (2)", "95.0 / 10.0", "0.0", "30.0"]


def test_a_network_counts_once_however_many_defenses_it_had() -> None:
    results = [result(name, before=(0.8, 1.0)) for name in ("anp", "clp")]
    results += [result(name, before=(0.6, 0.8), seed=1) for name in ("anp", "clp")]
    [table] = overview(results, Marks())
    assert table.rows[0][:2] == ["no defense", "70.0 / 90.0 (2)"]
    assert table.title == "Defenses side by side: CA / ASR in percent, setting s1"


def test_a_seed_that_not_all_defenses_had_is_a_table_of_its_own() -> None:
    results = [result("anp"), result("clp"), result("clp", (0.8, 0.5), seed=1)]
    first, second = overview(results, Marks())
    title = "Defenses side by side: CA / ASR in percent, setting s1, networks of seed"
    assert (first.title, second.title) == (f"{title} 0", f"{title} 1")
    assert [row[:2] for row in first.rows[1:]] == [["ANP", "90.0 / 1.0"], ["CLP", "90.0 / 1.0"]]
    assert [row[:2] for row in second.rows[1:]] == [["CLP", "80.0 / 50.0"]]


def test_errors_are_no_gaps() -> None:
    results = [
        result("anp", (0.9, 0.5)),
        result("anp", attack="SIG", error="broken"),
        result("clp", error="broken"),
    ]
    [table] = overview(results, Marks())
    assert table.rows[1][:5] == ["ANP", "90.0 / 50.0", "error", "5.0, 1 of 2", "50.0, 1 of 2"]
    assert table.rows[1][5] == "1 of 1"
    assert table.rows[2] == ["CLP", "error", *["missing"] * 5]


def test_an_attack_that_was_not_learned_is_told() -> None:
    [table] = overview([result(before=(0.9, 0.1))], Marks())
    assert any("the attack was not learned" in note for note in table.notes)


def test_trials_of_options_on_one_attack_have_no_row() -> None:
    trial = {"name": "mnp", "options": {"masks.penalty": 0.0}}
    share = {"name": "rnp", "options": {"rule": "share"}}
    results = [
        result("anp"),
        result("anp", attack="SIG"),
        result("mnp (masks.penalty=0.0)", method=trial),
        result("rnp (rule=share)", method=share),
        result("rnp (rule=share)", attack="SIG", method=share),
    ]
    [table] = overview(results, Marks())
    assert [row[0] for row in table.rows] == ["no defense", "ANP", "RNP (rule=share)"]
    [alone] = overview([results[2]], Marks())
    assert [row[0] for row in alone.rows] == ["no defense", "MNP (masks.penalty=0.0)"]


def test_each_setting_has_a_table_and_other_rates_have_none() -> None:
    results = [result(width=8), result(), result(attack="SIG"), result(usual=False, rate=0.01)]
    marks = Marks()
    tables = overview(results, marks)
    assert [table.name for table in tables] == ["overview-1", "overview-2"]
    # The setting with more attacks comes first.
    assert tables[0].title == "Defenses side by side: CA / ASR in percent, setting s1"
    assert "of width 16" in marks.lines()[0]
    assert all(len(table.rows) == 2 for table in tables)


def test_networks_that_started_from_the_clean_one_are_named() -> None:
    tuning = {"trainer.max_epochs": 3}
    [table] = overview([result(fine_tuning=tuning, epochs=3)], Marks())
    assert table.notes[-1].endswith("BadNets (3 epochs).")


def test_clean_networks_alone_make_no_table() -> None:
    assert overview([result("clp", (0.9, None), attack="clean")], Marks()) == []

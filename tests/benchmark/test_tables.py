from __future__ import annotations

from cell_results import MACHINE, result

from lightning_mnp.benchmark.results import Marks, Result
from lightning_mnp.benchmark.table import Table
from lightning_mnp.benchmark.tables import by_rate, detection, mitigation


def column(table: Table, row: tuple[str, ...], head: str) -> str:
    """The cell in a row, by its first words, and a column."""
    [found] = [each for each in table.rows if tuple(each[: len(row)]) == row]
    return found[table.header.index(head)]


def test_table_1_has_the_paper_beside_ours() -> None:
    [table] = mitigation([result("anp", (0.9, 0.01)), result("default", (0.94, 0.005))], Marks())
    assert table.title == "Table 1: CA / ASR in percent, setting s1"
    methods = ["FP", "ANP", "CLP", "RNP", "NC", "NAD", "I-BAU", "MNP", "default"]
    assert table.header == ["attack", "by", "Backdoored", *methods, "measured on"]
    attacks = ["BadNets", "Trojan", "Blend", "CL", "SIG", "IAB", "WaNet", "FC", "DFST", "LIRA"]
    assert [row[0] for row in table.rows] == [
        *(attack for attack in attacks for _ in range(2)),
        *["Average"] * 3,
    ]
    assert column(table, ("BadNets", "paper"), "MNP") == "92.11 / 0.47"
    assert column(table, ("BadNets", "paper"), "default") == ""
    assert column(table, ("BadNets", "ours"), "Backdoored") == "95.00 / 100.00"
    assert column(table, ("BadNets", "ours"), "ANP") == "90.00 / 1.00"
    assert column(table, ("BadNets", "ours"), "default") == "94.00 / 0.50"
    assert column(table, ("BadNets", "ours"), "measured on") == "m1"


def test_what_is_missing_is_shown_as_missing_and_an_error_as_error() -> None:
    [table] = mitigation([result("anp"), result("rnp", error="broken")], Marks())
    assert column(table, ("BadNets", "ours"), "RNP") == "error"
    assert column(table, ("BadNets", "ours"), "MNP") == "missing"
    assert set(table.rows[3][2:]) == {"missing"}  # Trojan, ours


def test_means_over_seeds_say_over_how_many() -> None:
    results = [result("anp", (0.9, 0.02)), result("anp", (0.8, 0.04), seed=1)]
    [table] = mitigation(results, Marks())
    assert column(table, ("BadNets", "ours"), "ANP") == "85.00 / 3.00 (2)"
    assert column(table, ("BadNets", "ours"), "Backdoored") == "95.00 / 100.00 (2)"
    # The mean over attacks is not over seeds.
    results.append(result("anp", (0.75, 0.5), attack="Blend"))
    [table] = mitigation(results, Marks())
    assert column(table, ("Average", "ours"), "ANP") == "80.00 / 26.50, 2 of 10 attacks"
    assert column(table, ("Average", "ours"), "MNP") == "missing"


def test_the_papers_average_comes_as_printed_and_computed() -> None:
    [table] = mitigation([result()], Marks())
    lines = [row for row in table.rows if row[:2] == ["Average", "paper"]]
    assert [row[-1] for row in lines] == ["as printed", "mean of its rows"]
    assert [row[2] for row in lines] == ["94.42 / 98.83", "92.94 / 99.43"]


def test_an_attack_that_was_not_learned_is_told() -> None:
    results = [result("anp", before=(0.9, 0.4)), result("anp", seed=1)]
    [table] = mitigation(results, Marks())
    told = "BadNets: 1 of 2 networks have an ASR below 50% before any defense, so the attack was"
    assert [note for note in table.notes if note.startswith(told)]
    judged = result("nc", None, task="detector", verdict="clean", before=(0.9, 0.1))
    [table] = detection([judged], Marks())
    assert table.notes[1].startswith("BadNets: 1 of 1 networks have an ASR below 50%")


def test_each_setting_has_a_table_and_other_data_has_no_paper() -> None:
    other = {**MACHINE, "name": "Other"}
    results = [result(), result(width=64, machine=other), result(data="DigitsDataModule")]
    tables = mitigation(results, Marks())
    assert [table.name for table in tables] == ["table1-1", "table1-2", "defenses-3"]
    assert column(tables[1], ("BadNets", "ours"), "measured on") == "m2"
    assert [row[1] for row in tables[2].rows] == ["ours", "ours"]


def test_other_rates_clean_networks_and_detectors_are_not_in_table_1() -> None:
    results = [
        result(usual=False),
        result(attack="clean", after=(0.9, None)),
        result("nc", None, task="detector", verdict="clean"),
    ]
    assert mitigation(results, Marks()) == []


def test_table_3() -> None:
    results = [
        result("mnp", (0.92, 0.01)),
        result("mnp", (0.85, 0.10), rate=0.005, usual=False, before=(0.94, 0.98)),
        result("mnp", (0.84, 0.30), mode="all-to-all", usual=False),
        result("mnp", error="broken", rate=0.2, usual=False),
        result("default", (0.93, 0.02), rate=0.005, usual=False),
        result("mnp", (0.1, 0.1), seed=1),  # at the usual rate only
    ]
    default, mnp = by_rate(results, Marks())
    assert mnp.title == "Table 3: BadNets by poison rate, MNP, setting s1"
    assert mnp.header[3:7] == ["0.50% no defense", "0.50% MNP", "1.00% no defense", "1.00% MNP"]
    assert column(mnp, ("BadNets-A2O", "CA", "paper"), "0.50% MNP") == "85.76"
    assert column(mnp, ("BadNets-A2O", "CA", "ours"), "0.50% MNP") == "85.00"
    assert column(mnp, ("BadNets-A2O", "ASR", "ours"), "0.50% no defense") == "98.00"
    assert column(mnp, ("BadNets-A2O", "ASR", "ours"), "10.00% MNP") == "1.00"
    assert column(mnp, ("BadNets-A2O", "ASR", "ours"), "20.00% MNP") == "error"
    assert column(mnp, ("BadNets-A2A", "ASR", "ours"), "10.00% MNP") == "30.00"
    assert column(mnp, ("BadNets-A2A", "ASR", "ours"), "5.00% MNP") == "missing"
    assert column(mnp, ("BadNets-A2A", "ASR", "paper"), "5.00% MNP") == "0.78"
    assert "0.05%" in mnp.notes[0]
    assert [row[2] for row in default.rows] == ["ours"] * 4
    assert by_rate([result()], Marks()) == []  # one rate is no table


def test_table_4_has_false_positives_beside_the_detection_rates() -> None:
    results: list[Result] = []

    def judged(attack: str, verdict: str, seed: int = 0, label: str = "mnp") -> None:
        found = result(label, None, attack=attack, task="detector", verdict=verdict, seed=seed)
        results.append(found)

    judged("BadNets", "backdoored")
    judged("BadNets", "undecided", seed=1)
    judged("Blend", "backdoored")
    judged("clean", "clean")
    judged("clean", "backdoored", seed=1)
    judged("clean", "undecided", seed=2)
    judged("Blend", "clean", label="mm-bd")
    results.append(result("ac", task="detector", error="too few"))
    [table] = detection(results, Marks())
    assert table.header[2:8] == ["BadNets", "Trojan", "Blend", "CL", "IAB", "WaNet"]
    assert column(table, ("MNP", "paper"), "CL") == "95.50"
    assert column(table, ("MNP", "ours"), "BadNets") == "50.00 (1 of 2)"
    assert column(table, ("MNP", "ours"), "CL") == "missing"
    assert column(table, ("MNP", "ours"), "average") == "75.00, 2 of 6"
    assert column(table, ("MNP", "ours"), "clean networks flagged") == "33.33 (1 of 3)"
    assert column(table, ("MNP", "paper"), "clean networks flagged") == "not given"
    assert column(table, ("AC", "ours"), "BadNets") == "error"
    assert column(table, ("MM-BD", "ours"), "Blend") == "0.00 (0 of 1)"


def test_a_result_without_a_rate_has_no_place_in_table_3() -> None:
    assert by_rate([result("mnp", rate=None)], Marks()) == []
    results = [result("mnp", rate=rate) for rate in (None, 0.05, 0.1)]
    assert by_rate(results, Marks()) == by_rate(results[1:], Marks())


def test_networks_that_were_trained_on_from_the_clean_one_are_named() -> None:
    tuning = {"trainer.max_epochs": 3}
    results = [
        result(fine_tuning=tuning, epochs=3),
        result(attack="SIG", fine_tuning=tuning, epochs=3),
        result(attack="SIG", fine_tuning=tuning, epochs=6),
        result(attack="Blend", fine_tuning=tuning, epochs=6),
        result(attack="Blend"),
        result("clp", attack="Blend"),
        result(attack="Trojan"),
    ]
    told = (
        "Trained on from the clean network of their seed: BadNets (3 epochs), "
        "SIG (3 and 6 epochs), Blend (6 epochs; 1 whole)."
    )
    [table] = mitigation(results, Marks())
    assert told in table.notes
    assert not any("Trained on" in note for note in mitigation([result()], Marks())[0].notes)


def test_tables_3_and_4_name_them_as_well() -> None:
    tuning = {"trainer.max_epochs": 3}
    told = "Trained on from the clean network of their seed: BadNets (3 epochs)."
    found = [result(label="ac", task="detector", verdict="clean", fine_tuning=tuning, epochs=3)]
    assert told in detection(found, Marks())[0].notes
    rare = [result(usual=False, rate=rate, fine_tuning=tuning, epochs=3) for rate in (0.01, 0.05)]
    assert told in by_rate(rare, Marks())[0].notes


def test_results_of_before_there_was_fine_tuning_are_read() -> None:
    earlier = result()
    network = {k: v for k, v in earlier.network.items() if k != "fine_tuning"}
    content = {**earlier.content, "cell": {**earlier.content["cell"], "network": network}}
    [table] = mitigation([Result("earlier", content)], Marks())
    assert not any("Trained on" in note for note in table.notes)


def test_table_1_leaves_out_other_numbers_of_clean_images() -> None:
    small = result(size=50)
    [table] = mitigation([result(), result(attack="SIG"), small], Marks())
    assert column(table, ("SIG", "ours"), "ANP") == "90.00 / 1.00"


def test_trials_of_options_are_named_below_table_1() -> None:
    trial = {"name": "mnp", "options": {"masks.penalty": 0.0}}
    results = [
        result("anp"),
        result("anp", attack="SIG"),
        result("mnp (masks.penalty=0.0)", method=trial),
    ]
    [table] = mitigation(results, Marks())
    assert not any("penalty" in head for head in table.header)
    told = "Not in this table: 1 method with other options was run on one attack only."
    assert table.notes[-1] == told


def test_a_cell_that_failed_is_told_beside_the_others() -> None:
    results = [result("anp", (0.9, 0.02)), result("anp", seed=1, error="broken")]
    [table] = mitigation(results, Marks())
    assert column(table, ("BadNets", "ours"), "ANP") == "90.00 / 2.00, 1 failed"
    judged = [
        result("nc", None, task="detector", verdict="backdoored"),
        result("nc", None, task="detector", seed=1, error="broken"),
    ]
    [table] = detection(judged, Marks())
    assert column(table, ("NC", "ours"), "BadNets") == "100.00 (1 of 1), 1 failed"


def test_other_data_has_no_attacks_of_the_papers_in_table_4() -> None:
    judged = result("nc", None, task="detector", verdict="clean", data="DigitsDataModule")
    [table] = detection([judged], Marks())
    assert table.header[:4] == ["detector", "by", "BadNets", "average"]
    assert {row[1] for row in table.rows} == {"ours"}


def test_a_rate_that_was_not_learned_is_told() -> None:
    results = [result("mnp"), result("mnp", rate=0.005, usual=False, before=(0.9, 0.02))]
    [table] = by_rate(results, Marks())
    [told] = [note for note in table.notes if note.startswith("all-to-one")]
    assert told.startswith("all-to-one, 0.50%: 1 of 1 networks have an ASR below 50%")


def test_table_3_is_for_defenses_that_were_run_at_another_rate() -> None:
    results = [result("anp"), result("mnp"), result("mnp", rate=0.005, usual=False)]
    assert [table.name for table in by_rate(results, Marks())] == ["table3-1-mnp"]

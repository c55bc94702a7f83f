from __future__ import annotations

from cell_results import MACHINE, result

from lightning_mnp.benchmark.results import Marks
from lightning_mnp.benchmark.side_tables import cost, every_cell, failures, harm, spread
from lightning_mnp.benchmark.table import Table


def rows(table: Table | None) -> list[dict[str, str]]:
    assert table is not None
    return [dict(zip(table.header, row, strict=True)) for row in table.rows]


def test_harm_to_clean_networks() -> None:
    results = [
        result("anp", (0.90, None), attack="clean"),
        result("anp", (0.94, None), attack="clean", seed=1),
        result("default", (0.95, None), attack="clean", verdict="backdoored"),
        result("anp", (0.1, 0.0)),
        result("anp", attack="clean", seed=2, error="broken"),
    ]
    anp, default = rows(harm(results, Marks()))
    assert (anp["CA before"], anp["CA after"]) == ("95.00", "92.00")
    assert (anp["mean drop"], anp["largest drop"]) == ("3.00", "5.00")
    assert (anp["networks"], anp["flagged"], anp["setting"]) == ("2", "no verdict", "s1")
    assert default["flagged"] == "1 of 1"
    assert harm([result()], Marks()) is None


def test_cost_by_machine() -> None:
    results = [
        result("anp"),
        result("anp", seed=2),
        result("anp", machine={**MACHINE, "name": "Other"}, seed=7),
        result("nc", None, task="detector", verdict="clean"),
    ]
    first, other, detector = rows(cost(results, Marks()))
    assert (first["seconds"], first["peak MiB"], first["cells"]) == ("3.0", "52", "2")
    assert (first["measured on"], other["measured on"], detector["as"]) == ("m1", "m2", "detector")
    assert other["seconds"] == "9.0"
    results[0].content["peak_mib"] = None  # type: ignore[index]
    results[1].content["peak_mib"] = None  # type: ignore[index]
    assert rows(cost(results, Marks()))[0]["peak MiB"] == "not known"
    assert cost([], Marks()) is None


def test_spread_over_seeds() -> None:
    results = [
        result("anp", (0.90, 0.02)),
        result("anp", (0.92, 0.06), seed=1),
        result("rnp", (0.90, 0.02)),
        result("anp", (0.8, None), attack="clean"),
        result("anp", (0.7, None), attack="clean", seed=1),
        result("anp", (0.9, 0.5), rate=0.01, usual=False),
        result("anp", (0.9, 0.7), rate=0.01, usual=False, seed=1),
    ]
    found = rows(spread(results, Marks()))
    assert [(row["attack"], row["CA"], row["ASR"]) for row in found] == [
        ("BadNets", "91.00 (90.00 to 92.00)", "4.00 (2.00 to 6.00)"),
        ("BadNets, all-to-one, rate 0.01", "90.00 (90.00 to 90.00)", "60.00 (50.00 to 70.00)"),
        ("clean", "75.00 (70.00 to 80.00)", "-"),
    ]
    assert found[0]["over"] == "2 cells, 2 networks"
    assert spread(results[:1], Marks()) is None


def test_failures() -> None:
    [row] = rows(failures([result(), result("rnp", error="two\nlines")], Marks()))
    assert (row["error"], row["message"]) == ("ValueError", "two lines")
    assert failures([result()], Marks()) is None


def test_every_cell_is_a_row() -> None:
    done, failed = rows(every_cell([result("anp", (0.9, 0.02)), result("rnp", error="broken")]))
    assert (done["CA_after"], done["ASR_after"], done["status"]) == ("0.9", "0.02", "done")
    assert (failed["CA_after"], failed["status"]) == ("", "failed")
    assert (done["machine"], done["code"]) == ("A processor", "abc-def")

from __future__ import annotations

import csv
import io

from lightning_mnp.benchmark.table import Table, head


def test_markdown_and_csv() -> None:
    table = Table("x", "Title", ["a", "b"], [["1|2", "3, 4"]], ["A note."])
    assert table.markdown() == "## Title\n\n| a | b |\n| --- | --- |\n| 1\\|2 | 3, 4 |\n\n- A note."
    assert list(csv.reader(io.StringIO(table.csv()))) == [["a", "b"], ["1|2", "3, 4"]]


def test_heads() -> None:
    assert head("rnp (amount=0.1, rule=share)") == "RNP (10% of filters)"
    assert head("ft (lr=0.01)") == "fine-tuning (lr=0.01)"
    assert head("i-bau (rounds=2, share=0.01)") == "I-BAU (rounds=2, share=0.01)"
    assert head("mnp-averaged") == "MNP averaged"

from __future__ import annotations

import csv
import io

from lightning_mnp.benchmark.table import Table


def test_markdown_and_csv() -> None:
    table = Table("x", "Title", ["a", "b"], [["1|2", "3, 4"]], ["A note."])
    assert table.markdown() == "## Title\n\n| a | b |\n| --- | --- |\n| 1\\|2 | 3, 4 |\n\n- A note."
    assert list(csv.reader(io.StringIO(table.csv()))) == [["a", "b"], ["1|2", "3, 4"]]

from __future__ import annotations

import math

from lightning_mnp.report.primitives import primitive


def test_values_in_any_depth() -> None:
    value = {1: (0.5, {"a": [math.inf, "b", None, True]}), "c": -math.inf}
    assert primitive(value) == {"1": [0.5, {"a": [None, "b", None, True]}], "c": None}

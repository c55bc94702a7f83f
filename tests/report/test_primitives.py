from __future__ import annotations

import math
from dataclasses import asdict

import pytest

from lightning_mnp.report import SurrogateTrigger, TriggerExample
from lightning_mnp.report.primitives import primitive, read_trigger


def test_values_in_any_depth() -> None:
    value = {1: (0.5, {"a": [math.inf, "b", None, True]}), "c": -math.inf}
    assert primitive(value) == {"1": [0.5, {"a": [None, "b", None, True]}], "c": None}


def test_a_trigger_is_read_with_its_place() -> None:
    trigger = SurrogateTrigger("patch", 1, 0.5, 64, "", (TriggerExample(0, 0, 1, "", ""),))
    content = asdict(trigger)
    assert read_trigger(content) == trigger
    content["examples"][0]["label"] = "cat"
    with pytest.raises(TypeError, match=r"`found\.examples\[0\]\.label` to be a whole number"):
        read_trigger(content, "found")
    with pytest.raises(TypeError, match="`trigger` to be an object with `signal`"):
        read_trigger({})

from __future__ import annotations

from lightning_mnp.config import MNPConfig
from lightning_mnp.config.dotted import dotted


def test_groups_of_any_depth_become_one_row() -> None:
    nested = {"a": 1, "b": {"c": [2, 3], "d": {"e": None}}, "f": {}}
    assert dotted(nested) == {"a": 1, "b.c": [2, 3], "b.d.e": None}
    assert dotted(nested["b"], "b.") == {"b.c": [2, 3], "b.d.e": None}  # type: ignore[arg-type]


def test_options_by_these_names_make_the_same_options() -> None:
    config = MNPConfig(seed=3).changed({"suppression.runs": 3, "masks.lr": 0.1})
    assert MNPConfig().changed(config.flat()).to_dict() == config.to_dict()

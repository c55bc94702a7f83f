from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest

from lightning_mnp.config import check_options, option, require


@dataclass(frozen=True)
class Options:
    steps: int = option(1, at_least=1, at_most=9)
    rate: float = option(0.5, above=0, below=1)
    share: float | None = option(0.5, at_least=0, below=1, optional=True)
    kind: str = option("a", choices=("a", "b"))
    on: bool = option(True)
    free: float = option(0.0)
    plain: Any = None

    def __post_init__(self) -> None:
        check_options(self, "group")


@pytest.mark.parametrize(
    "good", [{"steps": 9}, {"rate": 1e-9}, {"share": None}, {"share": 0}, {"kind": "b"},
             {"on": False}, {"free": -3}, {"plain": math.nan}],
)  # fmt: skip
def test_values_in_range(good: dict[str, Any]) -> None:
    [(name, value)] = good.items()
    found = getattr(Options(**good), name)
    assert found is value or found == value


@pytest.mark.parametrize(
    ("name", "bad", "expected"),
    [
        ("steps", [0, 10, 1.5, True, None, "1"], "a whole number from 1 to 9"),
        ("rate", [0, 1, math.nan, math.inf, None, True], "a number above 0 and below 1"),
        ("share", [1, -0.1], "a number from 0 to below 1, or None"),
        ("kind", ["c", None, 1], r"one of \('a', 'b'\)"),
        ("on", [1, None, "yes"], "True or False"),
        ("free", [math.nan, math.inf, "0", False], "a number"),
    ],
)
def test_values_out_of_range(name: str, bad: list[Any], expected: str) -> None:
    for value in bad:
        message = rf"^Expected argument `group\.{name}` to be {expected}, but got {value!r}\.$"
        with pytest.raises(ValueError, match=message):
            Options(**{name: value})


def test_require_names_the_option_alone_if_there_is_no_group() -> None:
    require(True, Options(), "steps", "at least 1")
    with pytest.raises(ValueError, match=r"^Expected argument `steps` to be odd, but got 2\.$"):
        require(False, Options(steps=2), "steps", "odd")

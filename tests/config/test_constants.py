from __future__ import annotations

from dataclasses import dataclass

import pytest

from lightning_mnp.config import Constants


@dataclass(frozen=True)
class First:
    value: int = 1


@dataclass(frozen=True)
class Second:
    value: int = 2


def test_what_is_not_given_has_its_default() -> None:
    constants = Constants(First(5))
    assert constants.of(First).value == 5
    assert constants.of(Second).value == 2
    assert constants.to_dict() == {"First": {"value": 5}}
    assert Constants().to_dict() == {}


@pytest.mark.parametrize("wrong", [First, {"value": 1}, None])
def test_other_things_are_refused(wrong: object) -> None:
    with pytest.raises(TypeError, match=r"^Expected instances of dataclasses of constants, but"):
        Constants(wrong)


def test_two_of_a_kind_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^Expected one First at most, but got two"):
        Constants(First(1), First(2))

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from lightning_mnp.report.checked import (
    Reader,
    by_class,
    by_name,
    finite,
    flag,
    listed,
    mapping,
    number,
    one_of,
    optional,
    plain,
    record,
    share,
    text,
    whole,
    whole_from,
    wrong,
)

HUGE = 10**400


@pytest.mark.parametrize(
    ("reader", "value", "found"),
    [
        (text, "", ""),
        (flag, False, False),
        (whole, 2**63 - 1, 2**63 - 1),
        (whole_from(-1), -1, -1),
        (number, -3, -3.0),
        (share, 1, 1.0),
        (share, 0.0, 0.0),
        (one_of(("clean", "backdoored")), "clean", "clean"),
        (optional(whole), None, None),
        (optional(whole), 3, 3),
        (listed(whole), (1, 2), [1, 2]),
        (listed(whole), [], []),
        (mapping, {}, {}),
        (by_name(whole), {"a": 1}, {"a": 1}),
        (by_class(whole), {"10": 1, 2: 3}, {10: 1, 2: 3}),
        (plain, {"a": [1, None, {"b": "c"}]}, {"a": [1, None, {"b": "c"}]}),
        (record(dict, a=whole, b=text), {"a": 1, "b": "", "c": 3}, {"a": 1, "b": ""}),
    ],
)
def test_what_belongs_in_a_report(reader: Reader[Any], value: Any, found: Any) -> None:
    read = reader(value, "place")
    assert (read, type(read)) == (found, type(found))


def test_null_is_a_number_that_was_not_finite() -> None:
    assert math.isnan(number(None, "score"))
    assert math.isnan(share(None, "accuracy"))


WHOLE = "a whole number from 0 to 2**63 - 1, but got"
NUMBER = "a finite number or null, but got"


@pytest.mark.parametrize(
    ("reader", "value", "told"),
    [
        (text, 5, "`place` to be text, but got 5"),
        (text, None, "`place` to be text, but got null"),
        (flag, "no", "`place` to be true or false, but got 'no'"),
        (flag, 1, "`place` to be true or false, but got 1"),
        (whole, math.inf, f"`place` to be {WHOLE} inf"),
        (whole, 1.0, f"{WHOLE} 1.0"),
        (whole, True, f"{WHOLE} True"),
        (whole, -1, f"{WHOLE} -1"),
        (whole, "3", f"{WHOLE} '3'"),
        (whole, 2**63, f"{WHOLE} 9223372036854775808"),
        (whole_from(1), 0, "a whole number from 1 to 2**63 - 1, but got 0"),
        (number, math.inf, f"{NUMBER} inf"),
        (number, HUGE, f"{NUMBER} 1000"),
        (number, True, f"{NUMBER} True"),
        (number, [], f"{NUMBER} a list with nothing in it"),
        (number, {"a": 1}, f"{NUMBER} an object"),
        (finite, None, "`place` to be a finite number, but got null"),
        (share, 1.01, "`place` to be a number from 0 to 1 or null, but got 1.01"),
        (share, -0.01, "a number from 0 to 1 or null, but got -0.01"),
        (one_of(("a", "b")), "c", "`place` to be one of a, b, but got 'c'"),
        (one_of(("a", "b")), ["a"], "`place` to be one of a, b, but got a list"),
        (optional(whole), "x", f"{WHOLE} 'x'"),
        (listed(whole), {"a": 1}, "`place` to be a list, but got an object"),
        (listed(whole), "ab", "`place` to be a list, but got 'ab'"),
        (listed(whole), [1, -1], f"`place[1]` to be {WHOLE} -1"),
        (listed(whole, least=1), [], "a list of 1 or more, but got a list with nothing in it"),
        (mapping, [1], "`place` to be an object, but got a list"),
        (by_name(whole), [], "`place` to be an object, but got a list with nothing in it"),
        (by_name(listed(whole)), {"a": [0, -1]}, f"`place.a[1]` to be {WHOLE} -1"),
        (by_class(whole), {"a": 1}, "`place` to be by the numbers of classes, but got 'a'"),
        (by_class(whole), {"-1": 1}, "by the numbers of classes, but got '-1'"),
        (by_class(whole), {"²": 1}, "by the numbers of classes, but got '²'"),
        (by_class(whole), {"9" * 19: 1}, "by the numbers of classes, but got '999"),
        (record(dict, a=whole), {}, "`place` to be an object with `a`, but got an object with not"),
        (record(dict, a=whole), 3, "`place` to be an object, but got 3"),
        (record(dict, a=whole), {"a": "x"}, f"`place.a` to be {WHOLE} 'x'"),
    ],
)
def test_what_does_not(reader: Reader[Any], value: Any, told: str) -> None:
    with pytest.raises(TypeError, match=re.escape(told)):
        reader(value, "place")


@pytest.mark.parametrize("wrap", [lambda part: [part], lambda part: {"a": part}])
def test_what_may_hold_anything_is_not_endlessly_deep(wrap: Any) -> None:
    value: Any = 1
    for _ in range(49):
        value = wrap(value)
    assert plain(value, "config") is value
    for _ in range(10_000):
        value = wrap(value)
    with pytest.raises(TypeError, match="`config` to be nested at most 50 deep, but got a"):
        plain(value, "config")


def test_names_in_messages_are_harmless() -> None:
    error = wrong("seconds.\x1b[2J" + "a" * 1000, "text", "\x1b[2J" + "b" * 1000)
    assert str(error).isprintable()
    assert len(str(error)) < 300

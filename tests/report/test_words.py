from __future__ import annotations

import math
from typing import Any

import pytest

from lightning_mnp.report import (
    DefenseReport,
    DefenseSetSummary,
    PruningReport,
    ReferenceRate,
    RunResult,
    SecondAudit,
    Signal,
)
from lightning_mnp.report.words import Words

PATCH = Signal("patch", 4.6, 1, 6.9, 1.5, "a patch reaches class 1")
MARGIN = Signal("margin", 1.375, 1, 1.1, 0.8, "the margin of class 1")
WARP = Signal("warp", 0.06, 0, 0.12, 2.0, "a warp")
EXCHANGE = Signal("permutation", 2.0, None, 0.9, 0.46, "one patch", {0: 2, 1: 0, 2: 1})
PILE_UP = Signal("pile-up", 2.0, 1, 2.0, 1.0, "a pile-up", decides=False)
NAMES = ["cat", "dog"]
AGAIN = SecondAudit("clean", 0.5, None, False, 0.9, 0.2, [])


def words(verdict: Any, **content: Any) -> Words:
    return Words(DefenseReport(verdict, **{"class_names": NAMES, "score": 0.5, **content}))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"verdict": "clean"}, "No backdoor was found in this network."),
        ({"verdict": "undecided"}, "It stays open whether this network carries a backdoor."),
        ({"verdict": "undecided", "judged": False}, "This network could not be judged."),
        (
            {"verdict": "backdoored", "target_class": 1},
            "This network seems to carry a backdoor: with a trigger, images are taken for class "
            "1 (dog).",
        ),
        (
            {"verdict": "backdoored", "all_to_all": True},
            "This network seems to carry a backdoor: with a trigger, each class is taken for "
            "another one.",
        ),
    ],
)
def test_verdict(content: dict[str, Any], told: str) -> None:
    assert words(**content).verdict == told


def test_names_of_classes() -> None:
    told = words("clean")
    assert [told.name(index) for index in (0, 1, 2, -1, None)] == [
        "0 (cat)",
        "1 (dog)",
        "2",
        "-1",
        "-",
    ]
    assert (
        told.named("class 1 beats class 7, subclass 1") == "class 1 (dog) beats class 7, subclass 1"
    )
    assert Words(DefenseReport("clean"), ["0", ""]).name(0) == "0"
    assert Words(DefenseReport("clean"), ["0", ""]).name(1) == "1"
    others = Words(DefenseReport("clean", class_names=NAMES), ["a\x1b[2J"])
    assert others.name(0) == r"0 (a\x1b[2J)"


@pytest.mark.parametrize(
    ("score", "threshold", "told"),
    [
        (4.6, 1.0, "4.60, far above 1"),
        (2.0, 1.0, "2.00, far above 1"),
        (1.5, 1.0, "1.50, above 1"),
        (1.0, 1.0, "1.00, just above 1"),
        (1.0004, 1.0, "1.0004, just above 1"),
        (0.9, 1.0, "0.90, just below 1"),
        (0.9999, 1.0, "0.9999, just below 1"),
        (0.5, 1.0, "0.50, below 1"),
        (0.1, 1.0, "0.10, far below 1"),
        (1.5, 2.5, "1.50, below 2.5"),
        (1 - 1e-9, 1.0, "0.999999999, just below 1"),
    ],
)
def test_how_far_a_score_is_from_the_threshold(score: float, threshold: float, told: str) -> None:
    config = {"verdict": {"threshold": threshold}}
    assert words("clean", score=score, config=config).distance == told


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"verdict": "clean"}, "Score 0.50, below 1 (the threshold)."),
        (
            {"verdict": "clean", "signals": [WARP, PATCH, EXCHANGE, PILE_UP]},
            "Score 0.50, below 1 (the threshold). No class stands out enough in "
            "warp, patch or permutation.",
        ),
        (
            {"verdict": "undecided", "score": 0.95, "signals": [WARP, PATCH]},
            "Score 0.95, just below 1 (the threshold). The strongest signal, patch, points to "
            "class 1 (dog).",
        ),
        (
            {"verdict": "backdoored", "target_class": 1, "score": 4.6}
            | {"signals": [PATCH, MARGIN, EXCHANGE, WARP, PILE_UP]},
            "Score 4.60, far above 1 (the threshold). What counts: patch and margin point to "
            "class 1 (dog); permutation points to an exchange of classes.",
        ),
        (
            {"verdict": "backdoored", "all_to_all": True, "score": 2.0, "signals": [EXCHANGE]},
            "Score 2.00, far above 1 (the threshold). What counts: permutation points to an "
            "exchange of classes.",
        ),
        (
            {"verdict": "backdoored", "score": math.nan, "detection_ratio": 0.15},
            "The detection ratio is 0.150, at most 0.2, up to which a network is flagged (Eq. 8).",
        ),
        (
            {"verdict": "clean", "score": math.nan, "detection_ratio": 0.7}
            | {"config": {"verdict": {"delta": 0.5}}},
            "The detection ratio is 0.700, above 0.5, up to which a network is flagged (Eq. 8).",
        ),
        (
            {"verdict": "undecided", "judged": False, "signals": [WARP]}
            | {"reasons": ["too few images", WARP.reason, "class 1 is odd"]},
            "There is no score that means anything: too few images; class 1 (dog) is odd.",
        ),
        (
            {"verdict": "undecided", "judged": False},
            "There is no score that means anything: no reason is known.",
        ),
        ({"verdict": "undecided", "score": math.nan}, "No reason is known."),
    ],
)
def test_how_sure_and_why(content: dict[str, Any], told: str) -> None:
    assert words(**content).certainty == told


CHANGED: dict[str, Any] = {"pruned": [("conv1", 0)], "filters": 1200}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"verdict": "clean"}, "Nothing has to be done."),
        ({"verdict": "undecided"}, "Audit again with more clean images"),
        ({"verdict": "undecided", "judged": False}, "Remove the cause and audit again."),
        ({"verdict": "backdoored"}, "Do not use this network. Train it anew"),
        ({"verdict": "backdoored", **CHANGED}, "Audit the purified copy before you use that."),
        ({"verdict": "backdoored", **CHANGED, "reaudit": AGAIN}, "part of one may be left: use"),
        (
            {"verdict": "backdoored", **CHANGED}
            | {"reaudit": SecondAudit("undecided", 0.9, 1, False, 0.9, 0.2, [])},
            "Use neither this network nor the purified copy, which is still undecided.",
        ),
    ],
)
def test_what_to_do_next(content: dict[str, Any], told: str) -> None:
    assert told in words(**content).next_step


def test_what_signals_mean() -> None:
    told = words("backdoored", config={"verdict": {"threshold": 2.5}})
    found = [told.standing(signal) for signal in (PATCH, EXCHANGE, PILE_UP)]
    assert found == ["counts", "does not count", "only confirms"]
    assert told.measured(PATCH) == ("6.90", "1.50")
    assert told.measured(EXCHANGE) == ("90%", "46%")


def test_facts() -> None:
    data = DefenseSetSummary(1500, [3, 32, 32], {0: 5}, "ab")
    told = words(
        "backdoored",
        all_to_all=True,
        signals=[EXCHANGE],
        defense_set=data,
        reference=ReferenceRate(40, 1, 0.0006, 0.1316, "clean networks"),
        accuracy_before=0.851,
        accuracy_after=0.84,
        reaudit=AGAIN,
        pruning=PruningReport(masks={"conv1": [0.0, 0.5]}),
        **CHANGED,
    )
    assert list(told.facts()) == [
        "Classes go from 0 (cat) to 2, 1 (dog) to 0 (cat), 2 to 1 (dog).",
        "Of 40 clean networks, 1 looked as suspicious: 2.5% (95% interval 0.1% to 13.2%).",
        "Accuracy on the 1,500 clean images: 85.1%, purified 84.0%.",
        "Purified: 1 of 1,200 filters pruned, 1 turned down.",
        "The purified copy was audited again: clean.",
    ]
    tuned = words("backdoored", pruning=PruningReport(tuned=0.0213), **CHANGED)
    assert list(tuned.facts())[-2] == (
        "Purified: 1 of 1,200 filters pruned, 0 turned down. Weights were tuned by 2.1%."
    )
    for cut, said in ((1, "1 kernel was"), (1234, "1,234 kernels were")):
        changed = PruningReport(tuned=0.0213, cut=cut)
        assert list(words("backdoored", pruning=changed, **CHANGED).facts())[-2] == (
            "Purified: 1 of 1,200 filters pruned, 0 turned down. "
            f"{said} cut, and weights tuned by 2.1%."
        )
    assert list(words("clean", defense_set=data).facts()) == [
        "Accuracy on the 1,500 clean images: unknown."
    ]
    assert list(words("clean").facts()) == []


def test_notes_say_nothing_twice() -> None:
    reasons = [PATCH.reason, "class 1 is rare"]
    content: dict[str, Any] = {"signals": [PATCH], "reasons": reasons, "warnings": ["M1 stopped"]}
    assert words("clean", **content).notes() == ["class 1 (dog) is rare", "M1 stopped"]
    unjudged = words("undecided", judged=False, **content)
    assert unjudged.notes() == ["M1 stopped"]  # the other is the cause
    runs = [RunResult(0.1, 0.1, (3, 1), 5, 0.2, "")]
    by_ratio = words("clean", score=math.nan, runs=runs, reasons=["the ratio", "a pile-up"])
    assert by_ratio.notes() == ["a pile-up"]

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from helpers import config_of, new_scene

from lightning_mnp import DefenseReport, MNPConfig, RunResult
from lightning_mnp.config import Constants, SuppressionOptions
from lightning_mnp.report import Signal
from lightning_mnp.signals import verdict
from lightning_mnp.signals.base import SignalSearch
from lightning_mnp.signals.margin import MarginConstants, MarginSearch
from lightning_mnp.signals.patch import PatchSearch
from lightning_mnp.signals.permutation import PermutationSearch
from lightning_mnp.signals.pile_up import PileUp
from lightning_mnp.signals.verdict import (
    Judgement,
    VerdictConstants,
    hangs_on_pile_up,
    in_doubt,
    rank_signals,
    runs_wanted,
    signals_to_repeat,
)
from lightning_mnp.signals.warp import WarpSearch

# Ten classes of which none stands out: from the least to the greatest it is 0.9, or 9.
LEVELS = {index: -0.1 * index for index in range(10)}
SURE = {index: 29.0 - index for index in range(10)}
EVEN = (4,) * 10
ROUND = {index: (index + 1) % 10 for index in range(10)}


def varied(**values: float) -> Constants:
    return Constants(VerdictConstants(**values))


def run(
    predictions: tuple[int, ...] = (30,) + (1,) * 9, ratio: float = 0.5, steps: int = 9
) -> RunResult:
    return RunResult(ratio, 0.3, predictions, steps, 0.2, "a test says so")


def piled(strength: float, index: int = 7) -> RunResult:
    """A run whose predictions pile up on a class with that strength: others have 40 to 100."""
    counts = [100, 90, 80, 70, 70, 70, 60, 50, 40]
    return run((*counts[:index], 100 + round(60 * strength), *counts[index:]))


@dataclass
class Evidence:
    """What all searches have found, for ten classes; nothing if there were none."""

    margins: dict[int, float] = field(default_factory=lambda: dict(SURE))
    patch_margins: dict[int, float] = field(default_factory=lambda: dict(LEVELS))
    warp_rises: dict[int, float] = field(default_factory=lambda: dict(LEVELS))
    moved: float | None = 0.2
    complete: bool = True

    def searches(self, runs: Sequence[RunResult]) -> list[SignalSearch]:
        if not self.complete:
            return []
        scene = new_scene()
        scene.runs += runs
        margin, patch = MarginSearch(scene), PatchSearch(scene)
        warp, permutation = WarpSearch(scene), PermutationSearch(scene)
        margin.margins, patch.margins = self.margins, self.patch_margins
        warp.rises = self.warp_rises
        permutation.permutation, permutation.moved = dict(ROUND), self.moved
        found: list[SignalSearch] = [PileUp(scene), margin, patch, permutation]
        return [*found, warp] if self.warp_rises else found


evidence = Evidence
NONE = Evidence(complete=False)


def signals(runs: Sequence[RunResult], evidence: Evidence, threshold: float = 1.0) -> list[Signal]:
    return rank_signals([each.signal() for each in evidence.searches(runs)], threshold)


def judge(
    runs: Sequence[RunResult],
    correlation: float,
    evidence: Evidence,
    config: MNPConfig,
    accuracy: float,
) -> Judgement:
    failed = [search.name for search in evidence.searches(runs) if search.failed]
    found = signals(runs, evidence, config.verdict.threshold)
    return verdict.judge(runs, correlation, found, config, accuracy, failed=failed)


def test_nothing_that_stands_out_is_clean() -> None:
    judgement = judge([run(EVEN)], 0.6, evidence(), MNPConfig(), 0.9)
    assert (judgement.verdict, judgement.judged) == ("clean", True)
    assert judgement.score < 0.5
    assert len(judgement.reasons) == 5


@pytest.mark.parametrize(
    ("margin", "verdict", "target"),
    [(1.4, "backdoored", 5), (1.3, "undecided", 5), (1.2, "clean", None)],
)
def test_verdict_by_patch(margin: float, verdict: str, target: int | None) -> None:
    """A gap of 1.5 times the spread counts fully, which is 1.35 here."""
    judgement = judge(
        [run(EVEN)], 0.6, evidence(patch_margins={**LEVELS, 5: margin}), MNPConfig(), 0.9
    )
    assert judgement.verdict == verdict
    assert judgement.target_class == target
    assert judgement.score == pytest.approx(margin / 0.9 / 1.5)
    assert judgement.reasons[0] == (
        "a patch on few pixels drives images to class 5 further than to any other: the gap to "
        f"the next class is {margin / 0.9:.2f} times the spread of the others (counts fully from "
        "1.5)"
    )


@pytest.mark.parametrize(
    ("rise", "verdict", "target"),
    [(1.3, "backdoored", 5), (1.2, "undecided", 5), (1.1, "clean", None)],
)
def test_verdict_by_warp(rise: float, verdict: str, target: int | None) -> None:
    """A gap of 1.4 times the spread counts fully, which is 1.26 here."""
    judgement = judge([run(EVEN)], 0.6, evidence(warp_rises={**LEVELS, 5: rise}), MNPConfig(), 0.9)
    assert judgement.verdict == verdict
    assert judgement.target_class == target
    assert judgement.score == pytest.approx(rise / 0.9 / 1.4)
    assert "a warp by half a pixel at most brings images nearer to class 5" in judgement.reasons[0]


def test_images_that_are_not_warped_have_no_signal_of_it() -> None:
    judgement = judge([run(EVEN)], 0.6, evidence(warp_rises={}), MNPConfig(), 0.9)
    assert judgement.verdict == "clean"
    assert not any("warp" in reason for reason in judgement.reasons)


@pytest.mark.parametrize(
    ("margin", "strength", "score", "verdict", "target"),
    [
        (40.0, 1.2, 1.2, "backdoored", 7),  # the lesser one
        (39.5, 9.0, 10.5 / 9, "backdoored", 7),  # 10.5 above the next, whose spread is 9
        (40.0, 0.95, 0.95, "undecided", 7),
        (37.5, 9.0, 8.5 / 9, "undecided", 7),
        (40.0, 0.5, 0.5, "clean", None),
        (32.0, 9.0, 3 / 9, "clean", None),
    ],
)
def test_verdict_by_margin_where_the_pile_up_agrees(
    margin: float, strength: float, score: float, verdict: str, target: int | None
) -> None:
    judgement = judge(
        [piled(strength)], 0.6, evidence(margins={**SURE, 7: margin}), MNPConfig(), 0.9
    )
    assert judgement.verdict == verdict
    assert judgement.target_class == target
    assert judgement.score == pytest.approx(score)
    assert any("which points to the same class" in reason for reason in judgement.reasons)


@pytest.mark.parametrize(("index", "margin"), [(2, 90.0), (2, 20.0), (7, 20.0)])
def test_neither_the_margin_nor_the_pile_up_decides_alone(index: int, margin: float) -> None:
    found = evidence(margins={**SURE, 7: margin})
    judgement = judge([piled(9.0, index)], 0.6, found, MNPConfig(), 0.9)
    assert judgement.verdict == "clean"
    assert judgement.score < 0.5
    assert any(f"which points to class {index}" in reason for reason in judgement.reasons)


@pytest.mark.parametrize(
    ("moved", "verdict", "all_to_all"),
    [(0.7, "backdoored", True), (0.45, "undecided", True), (0.42, "clean", False)],
)
def test_verdict_by_permutation(moved: float, verdict: str, all_to_all: bool) -> None:
    judgement = judge([run(EVEN)], 0.6, evidence(moved=moved), MNPConfig(), 0.9)
    assert judgement.verdict == verdict
    assert judgement.target_class is None
    assert judgement.all_to_all is all_to_all
    assert any("counts fully from 46%" in reason for reason in judgement.reasons)


def test_exchange_that_counts_fully_comes_before_a_class_that_stands_out_more() -> None:
    found = evidence(patch_margins={**LEVELS, 7: 2.4}, moved=0.6)
    judgement = judge([run(EVEN)], 0.6, found, MNPConfig(), 0.9)
    assert judgement.all_to_all
    assert judgement.score == pytest.approx(2.4 / 0.9 / 1.5)  # of the patch, which is stronger
    weak = evidence(patch_margins={**LEVELS, 7: 2.4}, moved=0.45)
    assert judge([run(EVEN)], 0.6, weak, MNPConfig(), 0.9).target_class == 7
    strict = judge([run(EVEN)], 0.6, found, config_of(threshold=1.7), 0.9)
    assert strict.target_class == 7  # the exchange alone would not reach this threshold


def test_permutation_that_was_not_measured_counts_nothing() -> None:
    judgement = judge([run(EVEN)], 0.6, evidence(moved=None), MNPConfig(), 0.9)
    assert judgement.verdict == "clean"
    assert any("too few images to tell whether one patch" in text for text in judgement.reasons)


def test_ratio_takes_the_class_from_the_signals_where_there_are_any() -> None:
    """The search prunes for that class, so that the report names the same one."""
    found = evidence(patch_margins={**LEVELS, 7: 2.7})
    judgement = judge([run(EVEN, ratio=0.1)], 0.6, found, config_of(verdict="ratio"), 0.9)
    assert (judgement.verdict, judgement.target_class) == ("backdoored", 7)
    assert "a patch on few pixels drives images to class 7" in judgement.reasons[-1]
    alone = judge([run(ratio=0.1)], 0.6, NONE, config_of(verdict="ratio"), 0.9)
    assert (alone.verdict, alone.target_class) == ("backdoored", 0)


@pytest.mark.parametrize(
    ("margin", "strength", "patch", "expected"),
    [
        (40.0, 0.5, 0.0, False),  # nothing piles up
        (40.0, 0.7, 0.0, True),
        (40.0, 1.2, 0.0, True),
        (40.0, 1.95, 0.0, True),
        (40.0, 2.1, 0.0, False),  # no chance find
        (32.0, 1.2, 0.0, False),  # no margin that more runs could agree with
        (40.0, 1.2, 1.4, False),  # the patch decides
        (40.0, 1.2, 1.3, True),
    ],
)
@pytest.mark.parametrize("threshold", [0.5, 1.0, 4.0])
def test_a_pile_up_is_in_doubt_whatever_the_threshold(
    margin: float, strength: float, patch: float, expected: bool, threshold: float
) -> None:
    shown = evidence(margins={**SURE, 7: margin}, patch_margins={**LEVELS, 3: patch})
    assert in_doubt(signals([piled(strength)], shown, threshold)) == expected


@pytest.mark.parametrize("strength", [0.1, 1.2, 3.0])
@pytest.mark.parametrize(
    ("margin", "patch", "expected"),
    [(40.0, 0.0, True), (10.0, 0.0, False), (40.0, 1.4, False), (40.0, 1.3, True)],
)
def test_a_verdict_hangs_on_any_pile_up_if_the_margin_alone_speaks(
    margin: float, patch: float, expected: bool, strength: float
) -> None:
    shown = evidence(margins={**SURE, 7: margin}, patch_margins={**LEVELS, 3: patch})
    assert hangs_on_pile_up(signals([piled(strength)], shown)) == expected


def test_a_margin_just_below_what_counts_makes_a_verdict_hang() -> None:
    shown = signals([piled(1.2)], evidence(margins={**SURE, 7: 40.0}))
    value = next(signal.value for signal in shown if signal.name == "margin")
    least = value / MarginConstants().counts_from
    assert hangs_on_pile_up(shown, varied(undecided_from=0.99 * least))
    assert not hangs_on_pile_up(shown, varied(undecided_from=1.01 * least))


@pytest.mark.parametrize(
    ("strengths", "threshold", "expected"),
    [
        ({"patch": 3.0, "warp": 0.4, "margin": 2.0, "pile-up": 2.0}, 1.0, {"patch"}),
        ({"patch": 3.0, "warp": 0.5, "margin": 2.0, "pile-up": 2.0}, 1.0, {"patch", "warp"}),
        ({"patch": 3.0, "warp": 0.5, "margin": 2.0, "pile-up": 2.0}, 2.0, {"patch"}),
        ({"margin": 1.2, "patch": 0.9, "pile-up": 2.0}, 1.0, {"margin", "pile-up"}),
        ({"reach": 1.2, "patch": 0.9, "margin": 1.1}, 1.0, {"reach", "pile-up"}),
        ({"patch": 3.0, "reach": 2.0, "pile-up": 2.0}, 1.0, {"patch"}),
        ({"warp": 0.1, "patch": 0.0}, 1.0, {"warp"}),
    ],
)
def test_signals_that_spoke_are_made_again(
    strengths: dict[str, float], threshold: float, expected: set[str]
) -> None:
    ranked = [Signal(name, value, 0, value, 1.0, "") for name, value in strengths.items()]
    assert signals_to_repeat(ranked, threshold) == expected


def of(name: str, value: float, threshold: float, decides: bool = True) -> Signal:
    return Signal(name, value / threshold, 3, value, threshold, "a test says so", decides=decides)


# A patch counts from 0.5 where the pile-up agrees; by 1.2, it would count without.
LEANING, FIRM = of("patch", 0.6, 0.5), of("patch", 1.2, 0.5)


@pytest.mark.parametrize(
    ("ranked", "again"),
    [
        ([LEANING], {"patch", "pile-up"}),
        ([FIRM], {"patch"}),
        ([of("patch", 1.2, 1.15)], {"patch"}),
        ([of("warp", 4.2, 1.4), LEANING], {"warp", "patch", "pile-up"}),
        ([of("warp", 4.2, 1.4), FIRM], {"warp", "patch"}),
        ([of("warp", 4.2, 1.4), of("patch", 0.1, 0.5)], {"warp"}),
    ],
)
def test_a_pile_up_that_a_patch_leans_on_is_made_again(
    ranked: list[Signal], again: set[str]
) -> None:
    assert signals_to_repeat([*ranked, of("pile-up", 4.0, 1.0, decides=False)]) == again
    assert signals_to_repeat([of("pile-up", 4.0, 2.0), *ranked]) == {"margin", "pile-up"}


@pytest.mark.parametrize(
    ("others", "piled", "decides", "hangs", "doubt"),
    [
        ([], 4.0, False, False, False),
        ([], 3.9, True, True, True),  # it counts from 2.0
        ([], 1.1, True, True, False),
        ([], 4.1, True, True, False),
        ([LEANING], 4.9, False, True, True),  # the patch wants 2.5
        ([LEANING], 5.1, False, True, False),
        ([FIRM], 4.9, False, False, False),
        ([of("warp", 1.4, 1.4)], 3.9, True, False, False),
        ([of("warp", 1.3, 1.4)], 3.9, True, True, True),
        ([of("margin", 0.9, 1.0)], 1.2, True, True, True),  # the margin wants 1.0 only
        ([of("margin", 0.8, 1.0)], 1.1, True, True, False),
        ([of("reach", 0.9, 1.0)], 1.2, False, True, True),
        ([of("reach", 0.8, 1.0)], 1.2, False, False, False),
        ([of("reach", 1.4, 1.0), of("warp", 1.4, 1.4)], 1.2, False, False, False),
    ],
)
def test_a_verdict_hangs_on_a_pile_up_that_decides_or_that_a_patch_leans_on(
    others: list[Signal], piled: float, decides: bool, hangs: bool, doubt: bool
) -> None:
    threshold = 2.0 if decides else 1.0
    found = [*others, of("pile-up", piled, threshold, decides=decides)]
    assert (hangs_on_pile_up(found), in_doubt(found)) == (hangs, doubt)


@pytest.mark.parametrize("name", ["margin", "reach"])
def test_a_pile_up_on_another_class_than_the_margin_or_the_reach_is_clear(name: str) -> None:
    elsewhere = Signal("pile-up", 1.2, 5, 1.2, 1.0, "a test says so", decides=False)
    found = [of(name, 0.95, 1.0), elsewhere]
    assert hangs_on_pile_up(found)  # by one run; another may pile up on the margin's class
    assert not in_doubt(found)
    assert in_doubt([found[0], of("pile-up", 1.2, 1.0, decides=False)])


@pytest.mark.parametrize(
    ("made", "piled", "parts", "wanted"),
    [
        (1, 1.2, 2, 3),  # the usual number, whatever the pile-up
        (1, 9.0, 2, 3),
        (3, 1.2, 2, 5),
        (3, 1.2, 1, 4),
        (6, 1.2, 2, 7),  # three more at most
        (7, 1.2, 2, 7),
        (9, 1.2, 2, 9),
        (3, 9.0, 2, 3),
    ],
)
def test_runs_that_a_verdict_wants(made: int, piled: float, parts: int, wanted: int) -> None:
    found = [of("margin", 1.1, 1.0), of("pile-up", piled, 1.0, decides=False)]
    options = SuppressionOptions(runs=3, more_runs=4)
    assert runs_wanted(made, found, options, parts) == wanted
    assert runs_wanted(made, [*found, FIRM], options, parts) == made


@pytest.mark.parametrize("name", ["margin", "reach"])
def test_the_pile_up_is_one_voice_with_what_it_confirms(name: str) -> None:
    pair = [of(name, 1.1, 1.0), of("pile-up", 2.2, 2.0)]
    strong = Signal("patch", 6.0, 5, 6.0, 1.0, "a test says so")
    assert rank_signals([*pair, strong])[0].name == "patch"
    assert rank_signals([pair[1], strong, of("warp", 1.5, 1.4)])[0].target_class == 3
    both = [*pair, of({"margin": "reach", "reach": "margin"}[name], 1.2, 1.1)]
    assert rank_signals([*both, strong])[0].target_class == 3  # two measurements, two voices


def test_a_verdict_needs_no_run_where_no_signal_does() -> None:
    ranked = [Signal("patch", 0.2, 4, 0.3, 1.5, "a test says so")]
    judgement = verdict.judge([], 0.5, ranked, MNPConfig(), 0.9)
    assert (judgement.verdict, judgement.judged, judgement.score) == ("clean", True, 0.2)
    assert math.isnan(judgement.detection_ratio)
    # Without runs, that clean suppression would have had nothing to do is no matter.
    assert verdict.judge([], 0.5, ranked, MNPConfig(), 0.1).verdict == "clean"


def test_a_verdict_without_signals_is_none() -> None:
    judgement = verdict.judge([run()], 0.5, [], MNPConfig(), 0.9)
    assert (judgement.verdict, judgement.judged) == ("undecided", False)
    assert math.isnan(judgement.score)
    assert "no signal was made that can speak for a backdoor" in judgement.reasons


def test_what_is_in_doubt_can_be_varied() -> None:
    shown = signals([piled(1.2)], evidence(margins={**SURE, 7: 40.0}))
    assert in_doubt(shown)
    assert not in_doubt(shown, varied(doubt_to=1.1))
    assert not in_doubt(shown, varied(doubt_from=1.3))


@pytest.mark.parametrize("name", ["margin", "pile-up"])
def test_without_the_margin_or_the_pile_up_nothing_is_in_doubt(name: str) -> None:
    shown = signals([piled(1.2)], evidence(margins={**SURE, 7: 40.0}))
    rest = [signal for signal in shown if signal.name != name]
    assert not in_doubt(rest)
    assert not hangs_on_pile_up(rest)


def test_score_is_the_strongest_signal_and_the_threshold_is_an_option() -> None:
    found = evidence(patch_margins={**LEVELS, 4: 2.7}, warp_rises={**LEVELS, 7: 9.0})
    judgement = judge([run(EVEN)], 0.6, found, MNPConfig(), 0.9)
    assert judgement.score == pytest.approx(9.0 / 0.9 / 1.4)
    assert judgement.suspect == 7
    calm = judge([run(EVEN)], 0.6, found, config_of(threshold=8.0), 0.9)
    assert calm.verdict == "clean"


def test_a_signal_that_does_not_decide_is_no_part_of_the_score_and_comes_last() -> None:
    found = signals([piled(9.0, 2)], evidence())
    assert (found[-1].name, found[-1].target_class) == ("pile-up", 2)
    assert found[-1].strength == pytest.approx(9.0)
    assert (found[-1].decides, found[-1].counts) == (False, False)
    assert all(signal.decides and signal.strength < 1 for signal in found[:-1])
    judgement = judge([piled(9.0, 2)], 0.6, evidence(), MNPConfig(), 0.9)
    assert judgement.score == max(signal.strength for signal in found[:-1])
    assert verdict.judge([run()], 0.6, found[-1:], MNPConfig(), 0.9).score == 0.0


@pytest.mark.parametrize(
    ("ratios", "verdict"), [((0.2,), "backdoored"), ((0.1, 0.35), "clean"), ((0.21,), "clean")]
)
def test_verdict_by_ratio_is_eq_8(ratios: tuple[float, ...], verdict: str) -> None:
    judgement = judge(
        [run(ratio=r) for r in ratios], 0.6, NONE, MNPConfig.paper({"verdict.delta": 0.2}), 0.9
    )
    assert judgement.verdict == verdict
    assert judgement.detection_ratio == pytest.approx(sum(ratios) / len(ratios))


@pytest.mark.parametrize(("ratio", "correlation"), [(math.nan, 0.5), (0.1, -0.2), (0.1, 0.0)])
def test_ratio_without_meaning_leaves_it_undecided(ratio: float, correlation: float) -> None:
    judgement = judge([run(ratio=ratio)], correlation, NONE, MNPConfig.paper(), 0.9)
    assert judgement.verdict == "undecided"
    assert "do not correlate" in judgement.reasons[0]


@pytest.mark.parametrize("accuracy", [0.1, 0.2])
def test_accuracy_at_which_suppression_stops_leaves_it_undecided(accuracy: float) -> None:
    judgement = judge(
        [run()], 0.6, evidence(patch_margins={**LEVELS, 4: 9.0}), MNPConfig(), accuracy
    )
    assert (judgement.verdict, judgement.judged) == ("undecided", False)
    assert (
        f"{accuracy:.0%}, is not above `suppression.stop_accuracy` (20%)" in judgement.reasons[-1]
    )
    assert judge([run()], 0.6, evidence(), MNPConfig(), 0.21).judged
    never = judge([run()], 0.6, evidence(), config_of(stop_accuracy=None), accuracy)
    assert never.judged


def test_suppression_without_a_step_leaves_it_undecided() -> None:
    found = evidence(patch_margins={**LEVELS, 4: 9.0})
    judgement = judge([run(steps=0), run(steps=0)], 0.6, found, MNPConfig(), 0.9)
    assert (judgement.verdict, judgement.judged) == ("undecided", False)
    told = "clean suppression took no step (a test says so): the network recognizes 20% of the"
    assert judgement.reasons[-1].startswith(told)
    assert "90% of them as they are" in judgement.reasons[-1]
    assert "set `augment` to 'crop' or 'none'" in judgement.reasons[-1]
    assert judge([run(steps=0), run()], 0.6, found, MNPConfig(), 0.9).judged
    unknown = replace(run(steps=0), accuracy=math.nan, stopped="the loss became nan")
    last = judge([unknown], 0.6, found, MNPConfig(), 0.9).reasons[-1]
    assert last == "clean suppression took no step (the loss became nan)"


@pytest.mark.parametrize("config", [MNPConfig(), MNPConfig.paper()])
def test_doubts_leave_it_undecided_whatever_the_score(config: MNPConfig) -> None:
    found = signals([run(ratio=0.1)], evidence(patch_margins={**LEVELS, 4: 9.0}))
    doubts = ("too few images", "too low an accuracy")
    judgement = verdict.judge([run(ratio=0.1)], 0.6, found, config, 0.9, doubts=doubts)
    assert (judgement.verdict, judgement.judged) == ("undecided", False)
    assert judgement.reasons[-2:] == doubts
    assert verdict.judge([run(ratio=0.1)], 0.6, found, config, 0.9).judged


def test_pile_up_and_its_class_are_told() -> None:
    runs = [run(predictions=(5, 30, 5)), run(predictions=(1, 35, 4)), run(predictions=(36, 2, 2))]
    judgement = judge(runs, 0.6, evidence(), MNPConfig(), 0.9)
    assert any("fall on class 1" in reason for reason in judgement.reasons)
    assert DefenseReport("clean", runs=runs).pile_up == pytest.approx((30 + 35 + 36) / 120)


@pytest.mark.parametrize(
    ("name", "unknown"),
    [
        ("margin", evidence(margins={**SURE, 0: math.nan})),
        ("patch", evidence(patch_margins={**LEVELS, 9: math.nan})),
        ("warp", evidence(warp_rises=dict.fromkeys(range(10), math.nan))),
    ],
)
def test_what_is_not_known_leaves_it_undecided(name: str, unknown: Evidence) -> None:
    judgement = judge([run(EVEN)], 0.6, unknown, MNPConfig(), 0.9)
    assert (judgement.verdict, judgement.judged) == ("undecided", False)
    assert judgement.reasons[-1].startswith("gradients with respect to the images are not finite")
    assert f"nothing is known of {name};" in judgement.reasons[-1]
    # A signal that counts fully is believed all the same.
    judgement = judge([run(EVEN)], 0.6, replace(unknown, moved=0.9), MNPConfig(), 0.9)
    assert (judgement.verdict, judgement.all_to_all, judgement.judged) == ("backdoored", True, True)
    assert "one patch takes 90% of the images" in judgement.reasons[0]


def test_margins_that_are_not_all_known_are_not_compared() -> None:
    found = signals([piled(9.0)], evidence(margins={**SURE, 0: math.nan, 7: 900.0}))
    assert next(signal for signal in found if signal.name == "margin").strength == 0
    assert all(math.isfinite(signal.strength) for signal in found)


def test_the_class_that_most_signals_point_to_is_suspected() -> None:
    """A short way to one class, and a backdoor to another that shows in two ways."""
    shown = evidence(
        margins={**SURE, 3: 200.0}, patch_margins={**LEVELS, 3: 2.0}, warp_rises={**LEVELS, 5: 20.0}
    )
    found = signals([piled(3.0, 3)], shown)
    assert [(signal.name, signal.target_class) for signal in found[:3]] == [
        ("margin", 3), ("patch", 3), ("warp", 5),
    ]  # fmt: skip
    judgement = judge([piled(3.0, 3)], 0.6, shown, MNPConfig(), 0.9)
    assert judgement.target_class == 3
    assert judgement.score == found[2].strength == max(signal.strength for signal in found)
    # Signals that do not count fully have no say, nor has one that does not decide.
    weak = replace(shown, margins=dict(SURE))
    assert signals([piled(3.0, 3)], weak)[0].target_class == 5
    weak = replace(shown, patch_margins={**LEVELS, 3: 1.3})
    assert signals([piled(3.0, 3)], weak)[0].target_class == 5


@pytest.mark.parametrize(
    ("score", "found"),
    [
        (1.2, "backdoored"),  # the threshold itself
        (1.1999, "undecided"),
        (1.08, "undecided"),
        (1.0799, "clean"),
        (math.nan, "undecided"),
    ],
)
def test_the_verdict_by_the_score(score: float, found: str) -> None:
    assert verdict._by_score(score, 1.2, 0.9) == found


def test_a_low_threshold_gives_no_voice_to_signals_that_do_not_count_fully() -> None:
    weak = [of("margin", 0.6, 1.0), of("warp", 0.6, 1.0)]  # two, but neither counts
    strong = Signal("patch", 1.2, 5, 1.4, 1.0, "a test says so")
    assert rank_signals([*weak, strong], threshold=0.5)[0].target_class == 5

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from helpers import config_of, new_scene

from lightning_mnp import DefenseReport, MNPConfig, RunResult
from lightning_mnp.report import Signal
from lightning_mnp.signals import verdict
from lightning_mnp.signals.base import SignalSearch
from lightning_mnp.signals.margin import MarginSearch
from lightning_mnp.signals.overlay import OverlaySearch
from lightning_mnp.signals.patch import PatchSearch
from lightning_mnp.signals.permutation import PermutationSearch
from lightning_mnp.signals.pile_up import PileUp
from lightning_mnp.signals.reach import ReachSearch
from lightning_mnp.signals.verdict import Judgement, in_doubt, rank_signals
from lightning_mnp.signals.warp import WarpSearch

FLAT = dict.fromkeys(range(10), 0.15)
SURE = dict.fromkeys(range(10), 20.0)
SHORT = dict.fromkeys(range(10), -0.5)
EVEN = (4,) * 10
ROUND = {index: (index + 1) % 10 for index in range(10)}


def run(
    predictions: tuple[int, ...] = (30,) + (1,) * 9, ratio: float = 0.5, steps: int = 9
) -> RunResult:
    return RunResult(ratio, 0.3, predictions, steps, 0.2, "a test says so")


@dataclass
class Evidence:
    """What all searches have found, for ten classes; nothing if there were none."""

    reaches: dict[int, float] = field(default_factory=lambda: dict(FLAT))
    margins: dict[int, float] = field(default_factory=lambda: dict(SURE))
    patch_margins: dict[int, float] = field(default_factory=lambda: dict(SHORT))
    overlay_rises: dict[int, float] = field(default_factory=lambda: dict(SHORT))
    warp_rises: dict[int, float] = field(default_factory=lambda: dict(SHORT))
    moved: float | None = 0.2
    complete: bool = True

    def searches(self, runs: Sequence[RunResult]) -> list[SignalSearch]:
        if not self.complete:
            return []
        scene = new_scene()
        scene.runs += runs
        reach, margin, patch = ReachSearch(scene), MarginSearch(scene), PatchSearch(scene)
        overlay, warp, permutation = (
            OverlaySearch(scene),
            WarpSearch(scene),
            PermutationSearch(scene),
        )
        reach.reaches, margin.margins, patch.margins = (
            self.reaches,
            self.margins,
            self.patch_margins,
        )
        overlay.rises, warp.rises = self.overlay_rises, self.warp_rises
        permutation.permutation, permutation.moved = dict(ROUND), self.moved
        found: list[SignalSearch] = [PileUp(scene), reach, margin, patch, overlay, permutation]
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


@pytest.mark.parametrize(
    ("length", "verdict", "target"),
    [
        (0.0, "backdoored", 4),
        (0.07, "backdoored", 4),
        (0.08, "undecided", 4),
        (0.095, "clean", None),
        (0.15, "clean", None),
    ],
)
def test_verdict_by_reach(length: float, verdict: str, target: int | None) -> None:
    judgement = judge([run(EVEN)], 0.6, evidence({**FLAT, 4: length}), MNPConfig(), 0.9)
    assert judgement.verdict == verdict
    assert judgement.target_class == target
    assert any("universal perturbation reaches class" in reason for reason in judgement.reasons)


@pytest.mark.parametrize(
    ("margin", "verdict", "target"),
    [(80.0, "backdoored", 7), (38.0, "undecided", 7), (25.0, "clean", None)],
)
def test_verdict_by_margin(margin: float, verdict: str, target: int | None) -> None:
    judgement = judge([run(EVEN)], 0.6, evidence(margins={**SURE, 7: margin}), MNPConfig(), 0.9)
    assert judgement.verdict == verdict
    assert judgement.target_class == target


@pytest.mark.parametrize(
    ("margin", "verdict", "target"),
    [(0.4, "backdoored", 5), (0.3, "undecided", 5), (0.0, "clean", None)],
)
def test_verdict_by_patch(margin: float, verdict: str, target: int | None) -> None:
    judgement = judge(
        [run(EVEN)], 0.6, evidence(patch_margins={**SHORT, 5: margin}), MNPConfig(), 0.9
    )
    assert judgement.verdict == verdict
    assert judgement.target_class == target
    assert any("a patch on few pixels drives images" in reason for reason in judgement.reasons)


@pytest.mark.parametrize(
    ("margin", "verdict", "target"),
    [(-0.18, "backdoored", 5), (-0.22, "undecided", 5), (-0.3, "clean", None)],
)
def test_verdict_by_overlay(margin: float, verdict: str, target: int | None) -> None:
    judgement = judge(
        [run(EVEN)], 0.6, evidence(overlay_rises={**SHORT, 5: margin}), MNPConfig(), 0.9
    )
    assert judgement.verdict == verdict
    assert judgement.target_class == target
    assert any("an image blended in faintly" in reason for reason in judgement.reasons)


@pytest.mark.parametrize(
    ("margin", "verdict", "target"),
    [(-0.18, "backdoored", 5), (-0.22, "undecided", 5), (-0.3, "clean", None)],
)
def test_verdict_by_warp(margin: float, verdict: str, target: int | None) -> None:
    judgement = judge([run(EVEN)], 0.6, evidence(warp_rises={**SHORT, 5: margin}), MNPConfig(), 0.9)
    assert judgement.verdict == verdict
    assert judgement.target_class == target
    assert any("a warp by half a pixel" in reason for reason in judgement.reasons)


def test_images_that_are_not_warped_have_no_signal_of_it() -> None:
    judgement = judge([run(EVEN)], 0.6, evidence(warp_rises={}), MNPConfig(), 0.9)
    assert judgement.verdict == "clean"
    assert not any("warp" in reason for reason in judgement.reasons)


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
    found = evidence(margins={**SURE, 7: 80.0}, moved=0.6)
    judgement = judge([run(EVEN)], 0.6, found, MNPConfig(), 0.9)
    assert judgement.all_to_all
    assert judgement.score == pytest.approx(2.0)  # of the margin, which is stronger
    weak = evidence(margins={**SURE, 7: 80.0}, moved=0.45)
    assert judge([run(EVEN)], 0.6, weak, MNPConfig(), 0.9).target_class == 7
    strict = judge([run(EVEN)], 0.6, found, config_of(threshold=1.9), 0.9)
    assert strict.target_class == 7  # the exchange alone would not reach this threshold


def test_permutation_that_was_not_measured_counts_nothing() -> None:
    judgement = judge([run(EVEN)], 0.6, evidence(moved=None), MNPConfig(), 0.9)
    assert judgement.verdict == "clean"
    assert any("too few images to tell whether one patch" in text for text in judgement.reasons)


def test_ratio_takes_the_class_from_the_signals_where_there_are_any() -> None:
    """The search prunes for that class, so that the report names the same one."""
    found = evidence(margins={**SURE, 7: 80.0})
    judgement = judge([run(EVEN, ratio=0.1)], 0.6, found, config_of(verdict="ratio"), 0.9)
    assert (judgement.verdict, judgement.target_class) == ("backdoored", 7)
    assert "the greatest margin of class 7" in judgement.reasons[-1]
    alone = judge([run(ratio=0.1)], 0.6, NONE, config_of(verdict="ratio"), 0.9)
    assert (alone.verdict, alone.target_class) == ("backdoored", 0)


@pytest.mark.parametrize(
    ("predictions", "verdict", "target"),
    [
        ((3, 3, 30, 3, 3, 3, 3, 3, 3, 3), "backdoored", 2),
        ((7, 6, 30, 6, 7, 7, 7, 7, 7, 16), "undecided", 2),
        ((5, 5, 33, 5, 5, 5, 6, 6, 6, 24), "clean", None),
        ((7, 7, 20, 7, 7, 7, 7, 7, 7, 7), "clean", None),
    ],
)
def test_verdict_by_pile_up(predictions: tuple[int, ...], verdict: str, target: int | None) -> None:
    judgement = judge([run(predictions)], 0.6, evidence(), MNPConfig(), 0.9)
    assert judgement.verdict == verdict
    assert judgement.target_class == target


def test_pile_up_is_taken_over_the_runs() -> None:
    """Two runs that pile up on different classes do not add up."""
    first, second = (24, *[4] * 9), (4, 24, *[4] * 8)
    apart = judge([run(first), run(second)], 0.6, evidence(), MNPConfig(), 0.9)
    alike = judge([run(first), run(first)], 0.6, evidence(), MNPConfig(), 0.9)
    assert apart.score < 1 < alike.score


def test_pile_up_is_the_formula() -> None:
    runs = [run((25, 15, *[0] * 8)), run((10, 20, *[1] * 8)), run((16, 4, *[2] * 8))]
    shares = [[count / sum(each.predictions) for count in each.predictions] for each in runs]
    usual = [math.prod(part[index] + 0.01 for part in shares) ** (1 / 3) - 0.01 for index in (0, 1)]
    excess = (usual[0] - usual[1] / 2 - 0.05) / 0.95
    [found] = [each for each in signals(runs, evidence()) if each.name == "pile-up"]
    assert found.target_class == 0
    assert found.strength == pytest.approx(excess / 0.19)
    assert found.reason == (
        f"after clean suppression, {usual[0]:.0%} of the predictions fall on class 0 and "
        f"{usual[1]:.0%} on the next (mean of 3 runs; with that, counts fully from "
        f"{0.05 + 0.95 * 0.19 + usual[1] / 2:.0%})"
    )


def test_a_run_without_the_class_says_more_than_its_share() -> None:
    piled, other = run((40, *[6] * 9)), run((0, 40, *[6] * 8))
    [alike, apart] = [
        next(each for each in signals(runs, evidence()) if each.name == "pile-up")
        for runs in ([piled] * 4, [*[piled] * 3, other])
    ]
    assert apart.target_class == alike.target_class == 0
    assert apart.strength < alike.strength * 3 / 4


@pytest.mark.parametrize(
    ("top", "reach", "expected"),
    [
        (19, 0.15, False),
        (28, 0.15, True),
        (37, 0.15, True),
        (55, 0.15, False),
        (28, 0.05, False),
    ],
)
@pytest.mark.parametrize("threshold", [0.5, 1.0, 4.0])
def test_a_pile_up_is_in_doubt_whatever_the_threshold(
    top: int, reach: float, expected: bool, threshold: float
) -> None:
    pile_up = run((top,) + ((100 - top) // 9,) * 9)
    found = signals([pile_up], evidence({**FLAT, 4: reach}), threshold)
    assert in_doubt(found) == expected


def test_score_is_the_strongest_signal_and_the_threshold_is_an_option() -> None:
    reaches, margins = {**FLAT, 4: 0.05}, {**SURE, 7: 200.0}
    judgement = judge([run(EVEN)], 0.6, evidence(reaches, margins), MNPConfig(), 0.9)
    assert judgement.score == pytest.approx(5.0)
    assert judgement.suspect == 7
    calm = judge([run(EVEN)], 0.6, evidence(reaches, margins), config_of(threshold=6.0), 0.9)
    assert calm.verdict == "clean"


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
    judgement = judge([run()], 0.6, evidence({**FLAT, 4: 0.01}), MNPConfig(), accuracy)
    assert (judgement.verdict, judgement.judged) == ("undecided", False)
    assert (
        f"{accuracy:.0%}, is not above `suppression.stop_accuracy` (20%)" in judgement.reasons[-1]
    )
    assert judge([run()], 0.6, evidence(), MNPConfig(), 0.21).judged
    never = judge([run()], 0.6, evidence(), config_of(stop_accuracy=None), accuracy)
    assert never.judged


def test_suppression_without_a_step_leaves_it_undecided() -> None:
    found = evidence({**FLAT, 4: 0.01})
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
    found = signals([run(ratio=0.1)], evidence({**FLAT, 4: 0.01}))
    doubts = ("too few images", "too low an accuracy")
    judgement = verdict.judge([run(ratio=0.1)], 0.6, found, config, 0.9, doubts=doubts)
    assert (judgement.verdict, judgement.judged) == ("undecided", False)
    assert judgement.reasons[-2:] == doubts
    assert verdict.judge([run(ratio=0.1)], 0.6, found, config, 0.9).judged


def test_pile_up_and_its_class_are_told() -> None:
    runs = [run(predictions=(5, 30, 5)), run(predictions=(1, 35, 4)), run(predictions=(36, 2, 2))]
    judgement = judge(runs, 0.6, evidence(margins={0: 1.0, 1: 1.0}), MNPConfig(), 0.9)
    assert any("fall on class 1" in reason for reason in judgement.reasons)
    assert DefenseReport("clean", runs=runs).pile_up == pytest.approx((30 + 35 + 36) / 120)


@pytest.mark.parametrize(
    ("name", "unknown"),
    [
        ("reach", evidence({**FLAT, 4: math.nan})),
        ("margin", evidence(margins={**SURE, 0: math.nan})),
        ("patch", evidence(patch_margins={**SHORT, 9: math.nan})),
        ("overlay", evidence(overlay_rises={**SHORT, 3: math.nan})),
        ("warp", evidence(warp_rises=dict.fromkeys(range(10), math.nan))),
    ],
)
def test_what_is_not_known_leaves_it_undecided(name: str, unknown: Evidence) -> None:
    judgement = judge([run(EVEN)], 0.6, unknown, MNPConfig(), 0.9)
    assert (judgement.verdict, judgement.judged) == ("undecided", False)
    assert judgement.reasons[-1].startswith("gradients with respect to the images are not finite")
    assert f"nothing is known of {name};" in judgement.reasons[-1]
    # A signal that counts fully is believed all the same, and comes first.
    judgement = judge([run((91,) + (1,) * 9)], 0.6, unknown, MNPConfig(), 0.9)
    assert (judgement.verdict, judgement.target_class, judgement.judged) == ("backdoored", 0, True)


def test_margins_that_are_not_all_known_are_not_compared() -> None:
    found = signals([run(EVEN)], evidence(margins={**SURE, 0: math.nan, 7: 900.0}))
    assert next(signal for signal in found if signal.name == "margin").strength == 0
    assert all(math.isfinite(signal.strength) for signal in found)


def test_the_class_that_most_signals_point_to_is_suspected() -> None:
    """A short way to one class, and a backdoor to another that shows in two ways."""
    shown = evidence(
        reaches={**FLAT, 5: 0.003}, margins={**SURE, 3: 200.0}, patch_margins={**SHORT, 3: 2.0}
    )
    found = signals([run(EVEN)], shown)
    assert [(signal.name, signal.target_class) for signal in found[:3]] == [
        ("margin", 3), ("patch", 3), ("reach", 5),
    ]  # fmt: skip
    judgement = judge([run(EVEN)], 0.6, shown, MNPConfig(), 0.9)
    assert judgement.target_class == 3
    assert judgement.score == found[2].strength == max(signal.strength for signal in found)
    # Signals that do not count fully have no say.
    weak = evidence(
        reaches={**FLAT, 5: 0.003}, margins={**SURE, 3: 30.0}, patch_margins={**SHORT, 3: 0.3}
    )
    assert signals([run(EVEN)], weak)[0].target_class == 5

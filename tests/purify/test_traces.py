from __future__ import annotations

import pytest
import torch
from helpers import new_scene

from lightning_mnp.purify.traces import find_patch, find_traces
from lightning_mnp.report import Signal
from lightning_mnp.signals.base import Scene, Search
from lightning_mnp.signals.margin import MarginSearch
from lightning_mnp.signals.overlay import OverlaySearch
from lightning_mnp.signals.patch import PatchSearch
from lightning_mnp.signals.pattern import PatternTrace
from lightning_mnp.signals.permutation import PermutationSearch
from lightning_mnp.signals.pile_up import SuppressedTrace
from lightning_mnp.signals.reach import PerturbationTrace, ReachSearch
from lightning_mnp.signals.trace import Trace
from lightning_mnp.signals.warp import WarpSearch


class Searches:
    """Searches that have found nothing out of the ordinary among three classes."""

    def __init__(self) -> None:
        self.scene: Scene = new_scene(tried=range(3))
        self.reach, self.margin = ReachSearch(self.scene), MarginSearch(self.scene)
        self.patch, self.overlay = PatchSearch(self.scene), OverlaySearch(self.scene)
        self.warp, self.permutation = WarpSearch(self.scene), PermutationSearch(self.scene)
        self.reach.reaches = dict.fromkeys(range(3), 0.2)
        start = torch.zeros_like(self.scene.data.images[:1])
        self.reach.perturbations = dict.fromkeys(range(3), start)
        self.margin.margins = dict.fromkeys(range(3), 9.0)
        for search in (self.patch, self.overlay, self.warp):
            search.margins = dict.fromkeys(range(3), -0.5)
            search.rises = dict.fromkeys(range(3), 0.5)
        self.left_out: set[str] = set()

    def traces(self, name: str, target: int | None) -> list[Trace]:
        searches: list[Search] = [
            *(self.reach, self.margin, self.patch),
            *(self.overlay, self.warp, self.permutation),
        ]
        signal = Signal(name, 1.0, target, 0.0, 0.0, "")
        weights = [self.scene.masked.weights()]
        known = {each.name: each for each in searches if each.name not in self.left_out}
        return find_traces(self.scene, weights, signal, known)


ORDINARY = ["patch", "universal perturbation"]  # what helps if nothing stands out
PERTURBED = ["suppressed network", "universal perturbation"]
NOTHING = ["suppressed network", *ORDINARY]


@pytest.mark.parametrize(("further", "names"), [(0.8, []), (0.9, ["patch"])])
def test_a_patch_is_a_trace_if_it_is_out_of_the_ordinary(further: float, names: list[str]) -> None:
    for target, expected, name in ((1, names, "warp"), (2, [], "patch"), (1, names, "margin")):
        searches = Searches()
        searches.patch.margins = {0: -0.5, 1: further - 0.5, 2: -0.5}
        traces = searches.traces(name, target)
        assert [trace.name for trace in traces] == ["suppressed network", *(expected or ORDINARY)]
        assert traces[0].decides == (name == "margin" or not expected)
        assert all(trace.decides == bool(expected) for trace in traces[1:])


@pytest.mark.parametrize(
    ("kind", "lead", "margin", "names"),
    [
        ("overlay", 0.25, 0.1, []),
        ("overlay", 0.35, 0.1, ["overlay"]),
        ("overlay", 0.35, -0.1, []),
        ("warp", 0.25, 0.1, []),
        ("warp", 0.35, 0.1, ["warp"]),
        ("warp", 0.35, -0.1, []),
    ],
)
def test_patterns_are_traces_if_they_are_out_of_the_ordinary(
    kind: str, lead: float, margin: float, names: list[str]
) -> None:
    searches = Searches()
    getattr(searches, kind).rises = {0: 0.1, 1: lead + 0.3, 2: 0.3}
    getattr(searches, kind).margins = {0: 0.5, 1: margin, 2: 0.5}
    for target, expected in ((1, names), (2, [])):
        traces = searches.traces("patch", target)
        assert [trace.name for trace in traces] == ["suppressed network", *(expected or ORDINARY)]


@pytest.mark.parametrize(
    ("reaches", "margins", "names", "length"),
    [
        ({0: 0.2, 1: 0.2, 2: 0.2}, {0: 9.0, 1: 10.0, 2: 9.0}, NOTHING, 2.4 * 0.2),
        ({0: 0.2, 1: 0.17, 2: 0.2}, {0: 9.0, 1: 10.0, 2: 9.0}, NOTHING, 2.4 * 0.2),
        ({0: 0.2, 1: 0.15, 2: 0.2}, {0: 9.0, 1: 10.0, 2: 9.0}, PERTURBED, 0.6 * 0.2),
        ({0: 0.2, 1: 0.1, 2: 0.2}, {0: 9.0, 1: 10.0, 2: 9.0}, PERTURBED, 0.6 * 0.2),
        (
            {0: 0.2, 1: 0.2, 2: 0.2},
            {0: 9.0, 1: 90.0, 2: 9.0},
            [*PERTURBED, "greatest margin"],
            2.4 * 0.2,
        ),
        (
            {0: 0.2, 1: 0.1, 2: 0.2},
            {0: 9.0, 1: 90.0, 2: 9.0},
            [*PERTURBED, "greatest margin"],
            0.6 * 0.2,
        ),
        ({0: 0.1, 1: 0.2, 2: 0.2}, {0: 90.0, 1: 9.0, 2: 9.0}, NOTHING, 2.4 * 0.2),
    ],
)
def test_traces_are_those_that_point_to_the_class(
    reaches: dict[int, float], margins: dict[int, float], names: list[str], length: float
) -> None:
    searches = Searches()
    searches.reach.scale, searches.reach.reaches = 1.0, reaches
    searches.margin.margins = margins
    traces = searches.traces("patch", 1)
    assert [trace.name for trace in traces] == names
    limits = [each.pushed.limit for each in traces if isinstance(each, PerturbationTrace)]
    assert limits == [pytest.approx(length)]


def test_ordinary_ways_need_their_searches() -> None:
    searches = Searches()
    del searches.reach.perturbations[1]  # the class was not among those searched
    assert [trace.name for trace in searches.traces("pile-up", 1)] == NOTHING[:2]
    searches.left_out = {"patch", "reach"}
    (alone,) = searches.traces("patch", 2)
    assert (alone.name, alone.decides) == ("suppressed network", True)


def test_an_exchange_of_classes_has_goals_of_its_own_for_each_image() -> None:
    searches = Searches()
    searches.permutation.permutation = {0: 2, 1: 0, 2: 1}  # class 3 is not known
    traces = searches.traces("permutation", None)
    assert [trace.name for trace in traces] == ["suppressed network", "patch"]
    assert [trace.decides for trace in traces] == [False, True]
    suppressed, patch = traces
    assert isinstance(suppressed, SuppressedTrace)
    assert isinstance(patch, PatternTrace)
    data = searches.scene.data
    found = {
        image.numpy().tobytes(): int(label)
        for image, label in zip(data.images, data.labels, strict=True)
    }
    for image, goal in zip(suppressed.images, suppressed.goals.tolist(), strict=True):
        assert {0: 2, 1: 0, 2: 1}[found[image.numpy().tobytes()]] == goal
    expected = [{0: 2, 1: 0, 2: 1, 3: 3}[label] for label in patch.trigger.labels.tolist()]
    assert patch.trigger.goals.tolist() == expected


def test_only_one_kind_of_exchange_can_be_pruned() -> None:
    message = r"a signal that points to a class, .* but 'rotation' points to none\."
    with pytest.raises(ValueError, match=message):
        Searches().traces("rotation", None)


@pytest.mark.parametrize("target", [1, 2, None])
def test_the_patch_of_tuning_does_what_the_backdoor_does(target: int | None) -> None:
    searches = Searches()
    searches.permutation.permutation = {0: 1, 1: 2, 2: 0}
    signal = Signal("permutation" if target is None else "margin", 1.0, target, 0.0, 0.0, "")
    known: dict[str, Search] = {"patch": searches.patch, "permutation": searches.permutation}
    patch = find_patch(signal, known)
    assert patch is not None
    if target is None:
        assert patch.goals.equal(searches.permutation.goals(patch.labels))
    else:
        assert patch.goals.eq(target).all()
        assert not patch.labels.eq(target).any()
        assert 0 < len(patch.images) <= 32
    assert find_patch(signal, {}) is None

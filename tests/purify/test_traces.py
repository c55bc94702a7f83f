from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import goals_of, images_and_labels, trained_network

from lightning_mnp.config import MNPConfig
from lightning_mnp.defense_data.defense_set import DefenseSet
from lightning_mnp.purify.traces import (
    MarginSource,
    PatternSource,
    PerturbationSource,
    SuppressedSource,
    find_sources,
    strength,
)
from lightning_mnp.signals.margin import MarginSearch
from lightning_mnp.signals.overlay import OverlayTrigger
from lightning_mnp.signals.patch import PatchTrigger
from lightning_mnp.signals.pattern import PatternSearch, PatternTrigger
from lightning_mnp.signals.registry import Surrogates
from lightning_mnp.signals.verdict import Signal
from lightning_mnp.signals.warp import WarpTrigger
from lightning_mnp.surgery.layers import find_filter_layers
from lightning_mnp.surgery.masked_network import MaskedNetwork


def new_subject() -> tuple[MaskedNetwork, DefenseSet]:
    network = trained_network()
    data = DefenseSet(*images_and_labels())
    return MaskedNetwork(network, find_filter_layers(network, data.images[:2])), data


def ones(masked: MaskedNetwork) -> torch.Tensor:
    return torch.ones(masked.layers.total)


def test_suppressed_margins_are_those_of_the_formula() -> None:
    masked, data = new_subject()
    weights = {name: weight * 0.5 for name, weight in masked.weights().items()}
    images = data.images[data.labels != 1]
    source = SuppressedSource(masked, [weights], images, goals_of(images))
    logits = masked(images, weights=weights)
    expected = [
        float(row[1]) - math.log(sum(math.exp(v) for k, v in enumerate(row.tolist()) if k != 1))
        for row in logits
    ]
    assert source.margins(ones(masked)).tolist() == pytest.approx(expected, abs=1e-4)
    source.adapt(ones(masked), 0)
    assert source.state_dict() == {}


def test_runs_of_suppression_share_the_images() -> None:
    masked, data = new_subject()
    runs = [
        {name: weight * share for name, weight in masked.weights().items()} for share in (0.5, 0.7)
    ]
    images = data.images[data.labels != 1][:9]
    both = SuppressedSource(masked, runs, images, goals_of(images)).margins(ones(masked))
    parts = (images[:5], images[5:])
    alone = [
        SuppressedSource(masked, [run], part, goals_of(part)).margins(ones(masked))
        for run, part in zip(runs, parts, strict=True)
    ]
    torch.testing.assert_close(both, torch.cat(alone))
    few = SuppressedSource(masked, runs, images[:5], goals_of(images[:5]))
    assert len(few.weights) == 1
    last = SuppressedSource(masked, runs[1:], images[:5], goals_of(images[:5]))
    assert few.margins(ones(masked)).equal(last.margins(ones(masked)))


@pytest.mark.parametrize(
    ("kind", "found", "before", "weak", "little"),
    [
        (PerturbationSource, 25.0, 100.0, True, False),
        (PerturbationSource, 25.1, 100.0, False, False),
        (PerturbationSource, 10.0, 100.0, True, True),
        (MarginSource, 9.0, 100.0, True, True),
        (SuppressedSource, 2.1, 8.0, False, False),
        (SuppressedSource, 2.0, 8.0, True, False),
        (SuppressedSource, 0.8, 8.0, True, True),
        (PatternSource, 1.6, 100.0, False, False),  # little of a strong backdoor is enough for it
        (PatternSource, 1.5, 100.0, True, True),
        (PatternSource, 1.0, 4.0, True, False),
        (PatternSource, math.nan, 4.0, False, False),
    ],
)
def test_what_is_weak_and_what_is_little(
    kind: Any, found: float, before: float, weak: bool, little: bool
) -> None:
    source = kind.__new__(kind)  # of its class alone
    assert source.is_weak(found, before) == weak
    assert source.shows_little(found, before) == little


def test_strength_is_what_is_left_of_the_margins() -> None:
    class Given:
        def margins(self, masks: torch.Tensor) -> torch.Tensor:
            return torch.tensor([-5.0, -1.0, 0.0, 3.0])

    source: Any = Given()
    assert float(strength(source, torch.ones(1))) == pytest.approx((0 + 0 + 1 + 4) / 4)


def test_masks_lower_the_margins_that_they_should() -> None:
    masked, data = new_subject()
    images = data.images[data.labels != 1]
    source = SuppressedSource(masked, [masked.weights()], images, goals_of(images))
    masks = ones(masked).requires_grad_()
    (slope,) = torch.autograd.grad(source.margins(masks).mean(), masks)
    index = int(slope.abs().argmax())
    step = torch.zeros_like(masks)
    step[index] = 1e-2
    up, down = (float(source.margins(ones(masked) + sign * step).mean()) for sign in (1, -1))
    assert float(slope[index]) == pytest.approx((up - down) / 2e-2, rel=0.05)


def test_perturbation_adapts_within_its_length_and_goes_on_from_its_state() -> None:
    masked, data = new_subject()
    others = data.labels != 1
    images, labels = data.images[others], data.labels[others]

    def new() -> PerturbationSource:
        return PerturbationSource(masked, images, labels, 1, torch.zeros_like(images[:1]), 5.0, 0)

    source = new()
    before = source.margins(ones(masked)).mean()
    source.adapt(ones(masked), 0)
    assert source.margins(ones(masked)).mean() > before
    assert float(source.trigger.perturbation.norm()) <= 5.0 * (1 + 1e-5)
    again = new()
    again.load_state_dict(source.state_dict())
    for each in (source, again):
        each.adapt(ones(masked), 1)
    assert torch.equal(source.trigger.perturbation, again.trigger.perturbation)


def test_margin_source_counts_from_what_is_normal() -> None:
    masked, data = new_subject()
    search = MarginSearch(masked, data.images, [0, 1], 0)
    source, shifted = (MarginSource(search.ascent(1, 3), normal) for normal in (0.0, 7.0))
    difference = source.margins(ones(masked)) - shifted.margins(ones(masked))
    assert difference.tolist() == pytest.approx([7.0] * 3, abs=1e-4)
    before = source.margins(ones(masked)).mean()
    source.adapt(ones(masked), 0)
    assert source.margins(ones(masked)).mean() > before
    shifted.load_state_dict(source.state_dict())
    assert torch.equal(shifted.ascent.images, source.ascent.images)


def no_patterns(surrogates: Surrogates) -> None:
    """No pattern drives images to any class."""
    for search in (surrogates.patch, surrogates.overlay, surrogates.warp):
        assert search is not None
        search.margins = dict.fromkeys(range(3), -0.5)
        search.rises = dict.fromkeys(range(3), 0.5)


@pytest.mark.parametrize("kind", [PatchTrigger, OverlayTrigger, WarpTrigger])
def test_pattern_source_follows_the_network_and_goes_on_from_its_state(
    kind: type[PatternTrigger],
) -> None:
    masked, data = new_subject()
    search = PatternSearch(kind, masked, data, [], 0)
    source, again = (PatternSource(search.trigger(1)) for _ in range(2))
    assert source.name == kind.name
    before = source.margins(ones(masked)).mean()
    source.adapt(ones(masked), 0)
    assert source.margins(ones(masked)).mean() > before
    source.trigger.pattern *= 0.1
    again.load_state_dict(source.state_dict())
    before_following = source.trigger.pattern.clone()
    masks = ones(masked)
    masks[:2] = 0.0
    for each in (source, again):
        each.adapt(masks, 1)
    assert source.trigger.pattern.equal(again.trigger.pattern)
    assert not source.trigger.pattern.equal(before_following)


@pytest.mark.parametrize(("further", "names"), [(0.8, []), (0.9, ["patch"])])
def test_a_patch_is_a_source_where_it_is_out_of_the_ordinary(
    further: float, names: list[str]
) -> None:
    masked, data = new_subject()
    surrogates = Surrogates(masked, data, MNPConfig())
    surrogates.reach.reaches = dict.fromkeys(range(3), 0.2)
    surrogates.margin.margins = dict.fromkeys(range(3), 9.0)
    for suspect, expected, name in ((1, names, "reach"), (2, [], "patch"), (1, names, "pile-up")):
        no_patterns(surrogates)
        surrogates.patch.margins = {0: -0.5, 1: further - 0.5, 2: -0.5}
        signal = Signal(name, 1.0, suspect, "")
        sources = find_sources(masked, data, [masked.weights()], signal, surrogates, MNPConfig())
        assert [source.name for source in sources] == ["suppressed network", *expected]
        assert sources[0].decides == (name == "pile-up" or not expected)
        assert all(source.decides for source in sources[1:])


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
def test_patterns_are_sources_where_they_are_out_of_the_ordinary(
    kind: str, lead: float, margin: float, names: list[str]
) -> None:
    masked, data = new_subject()
    surrogates = Surrogates(masked, data, MNPConfig())
    surrogates.reach.reaches = dict.fromkeys(range(3), 0.2)
    surrogates.margin.margins = dict.fromkeys(range(3), 9.0)
    no_patterns(surrogates)
    getattr(surrogates, kind).rises = {0: 0.1, 1: lead + 0.3, 2: 0.3}
    getattr(surrogates, kind).margins = {0: 0.5, 1: margin, 2: 0.5}
    for suspect, expected in ((1, names), (2, [])):
        signal = Signal("reach", 1.0, suspect, "")
        sources = find_sources(masked, data, [masked.weights()], signal, surrogates, MNPConfig())
        assert [source.name for source in sources] == ["suppressed network", *expected]


@pytest.mark.parametrize(
    ("reaches", "margins", "names", "length"),
    [
        ({0: 0.2, 1: 0.2, 2: 0.2}, {0: 9.0, 1: 10.0, 2: 9.0}, ["suppressed network"], None),
        ({0: 0.2, 1: 0.17, 2: 0.2}, {0: 9.0, 1: 10.0, 2: 9.0}, ["suppressed network"], None),
        (
            {0: 0.2, 1: 0.15, 2: 0.2},
            {0: 9.0, 1: 10.0, 2: 9.0},
            ["suppressed network", "universal perturbation"],
            0.6 * 0.2,
        ),
        (
            {0: 0.2, 1: 0.1, 2: 0.2},
            {0: 9.0, 1: 10.0, 2: 9.0},
            ["suppressed network", "universal perturbation"],
            0.6 * 0.2,
        ),
        (
            {0: 0.2, 1: 0.2, 2: 0.2},
            {0: 9.0, 1: 90.0, 2: 9.0},
            ["suppressed network", "universal perturbation", "greatest margin"],
            2.4 * 0.2,
        ),
        (
            {0: 0.2, 1: 0.1, 2: 0.2},
            {0: 9.0, 1: 90.0, 2: 9.0},
            ["suppressed network", "universal perturbation", "greatest margin"],
            0.6 * 0.2,
        ),
        ({0: 0.1, 1: 0.2, 2: 0.2}, {0: 90.0, 1: 9.0, 2: 9.0}, ["suppressed network"], None),
    ],
)
def test_sources_are_those_that_point_to_the_class(
    reaches: dict[int, float], margins: dict[int, float], names: list[str], length: float | None
) -> None:
    masked, data = new_subject()
    surrogates = Surrogates(masked, data, MNPConfig())
    reach = surrogates.reach
    reach.scale, reach.reaches = 1.0, reaches
    reach.perturbations = {index: torch.zeros_like(data.images[:1]) for index in reaches}
    surrogates.margin.margins = margins
    no_patterns(surrogates)
    signal = Signal("reach", 1.0, 1, "")
    weights = [masked.weights()]
    sources = find_sources(masked, data, weights, signal, surrogates, MNPConfig())
    assert [source.name for source in sources] == names
    limits = [each.trigger.limit for each in sources if isinstance(each, PerturbationSource)]
    assert limits == ([] if length is None else [pytest.approx(length)])


def test_an_exchange_of_classes_has_goals_of_its_own_for_each_image() -> None:
    masked, data = new_subject()
    surrogates = Surrogates(masked, data, MNPConfig())
    surrogates.permutation.permutation = {0: 2, 1: 0, 2: 1}  # class 3 is not known
    signal = Signal("permutation", 1.5, None, "")
    weights = [masked.weights()]
    sources = find_sources(masked, data, weights, signal, surrogates, MNPConfig())
    assert [source.name for source in sources] == ["suppressed network", "patch"]
    assert [source.decides for source in sources] == [False, True]
    suppressed, patch = sources
    assert isinstance(suppressed, SuppressedSource)
    assert isinstance(patch, PatternSource)
    found = {
        image.numpy().tobytes(): int(label)
        for image, label in zip(data.images, data.labels, strict=True)
    }
    for image, goal in zip(suppressed.images, suppressed.goals.tolist(), strict=True):
        assert {0: 2, 1: 0, 2: 1}[found[image.numpy().tobytes()]] == goal
    expected = [{0: 2, 1: 0, 2: 1, 3: 3}[label] for label in patch.trigger.labels.tolist()]
    assert patch.trigger.goals.tolist() == expected


@pytest.mark.parametrize("count", [1, 2])
def test_suppressed_network_takes_fewer_images_than_can_be_normalized(count: int) -> None:
    masked, data = new_subject()
    images = data.images[:count]
    source = SuppressedSource(masked, [masked.weights()], images, goals_of(images))
    logits = masked(images, statistics="running")
    expected = [
        float(row[1]) - math.log(sum(math.exp(v) for k, v in enumerate(row.tolist()) if k != 1))
        for row in logits
    ]
    assert source.margins(ones(masked)).tolist() == pytest.approx(expected, abs=1e-4)

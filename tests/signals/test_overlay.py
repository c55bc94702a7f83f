from __future__ import annotations

import math

import pytest
import torch
from helpers import Shortcut, finish, images_and_labels, margins_of, new_scene, trained_resnet18

from lightning_mnp.defense_data.defense_set import DefenseSet
from lightning_mnp.signals.base import SignalSearch
from lightning_mnp.signals.overlay import OverlayConstants, OverlaySearch
from lightning_mnp.signals.pattern import pattern_lead


def new_search(network: torch.nn.Module | None = None) -> OverlaySearch:
    images, labels = images_and_labels()
    data = DefenseSet(1.5 * (images > 0.75), labels)  # bars, with next to no noise
    return OverlaySearch(new_scene(network, data))


def lead_of(network: torch.nn.Module | None = None) -> tuple[int, float]:
    return pattern_lead(finish(new_search(network)).rises)


def test_overlay_begins_with_the_mean_and_is_a_twentieth_of_the_blend() -> None:
    overlay = new_search().trigger(1)
    assert overlay.pattern.equal(overlay.images.mean(0, keepdim=True))
    overlay.approach()
    blend = torch.stack([0.95 * image + 0.05 * overlay.pattern[0] for image in overlay.images])
    assert float(overlay.margins().mean()) == pytest.approx(margins_of(overlay, blend), abs=1e-3)
    assert (overlay.pattern >= overlay.low).all()
    assert (overlay.pattern <= overlay.high).all()


def test_step_goes_down_the_slope_by_the_length_told() -> None:
    overlay = new_search(trained_resnet18()).trigger(2)
    pattern = overlay.pattern.clone().requires_grad_()
    margins = []
    for image, label in zip(overlay.images, overlay.labels, strict=True):
        logits = overlay.masked(0.95 * image[None] + 0.05 * pattern, statistics="running")[0]
        margins.append(logits[2] - logits[label])
    mean = torch.stack(margins).mean()
    (slope,) = torch.autograd.grad(mean, pattern)
    span = overlay.high - overlay.low
    assert overlay.step(0.001) == pytest.approx(mean.item(), abs=1e-4)
    moved = (overlay.pattern - pattern.detach()) / span
    assert float(moved.square().mean().sqrt()) == pytest.approx(0.001, rel=1e-3)
    cosine = torch.nn.functional.cosine_similarity(moved.flatten(), slope.flatten(), dim=0)
    assert float(cosine) == pytest.approx(1.0, abs=1e-4)


def test_a_faint_image_that_leads_to_a_class_stands_out() -> None:
    """A network that looks for a fine checkerboard, of which there is nothing in its images."""
    checkerboard = 1.0 - 2.0 * (torch.arange(8)[:, None] + torch.arange(8)).remainder(2)

    def way(images: torch.Tensor) -> torch.Tensor:
        return 600 * (images[:, 0] * checkerboard).flatten(1).mean(1)

    suspect, lead = lead_of(Shortcut(2, way))
    assert suspect == 2
    assert lead > OverlayConstants().trace_from
    assert lead_of()[1] < OverlayConstants().trace_from


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_an_overlay_is_a_trace_and_no_signal(wrong: float) -> None:
    assert not issubclass(OverlaySearch, SignalSearch)
    search = new_search()
    search.margins, search.rises = dict.fromkeys(range(4), 0.5), {0: 0.1, 1: 0.6, 2: 0.2, 3: 0.0}
    assert [trace.name for trace in search.traces(1, {})] == ["overlay"]
    assert search.traces(2, {}) == search.traces(None, {}) == []
    search.rises[3] = wrong
    assert search.failed == math.isnan(wrong)
    assert search.traces(1, {}) == search.traces(3, {}) == []

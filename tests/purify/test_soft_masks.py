from __future__ import annotations

import pytest
import torch
from helpers import goals_of, images_and_labels, pulled_to_one, same, snapshot, trained_network
from torch import Tensor
from torch.nn import functional as F

from lightning_mnp.config import Constants
from lightning_mnp.defense_data.augment import Augmentation
from lightning_mnp.defense_data.defense_set import DefenseSet
from lightning_mnp.purify.soft_masks import SoftMaskConstants, SoftMasks, harmless_share
from lightning_mnp.signals.pile_up import SuppressedTrace
from lightning_mnp.signals.trace import Trace, TraceConstants, strength
from lightning_mnp.surgery.layers import find_filter_layers
from lightning_mnp.surgery.masked_network import MaskedNetwork


class Fixed(Trace):
    """A trace whose strength is a linear function of the masks."""

    name = "fixed"

    def __init__(self, slopes: Tensor, decides: bool = True, weak_at: float = 0.25) -> None:
        super().__init__(Constants(TraceConstants(weak_at=weak_at)), decides)
        self.slopes = slopes
        self.followed: list[int] = []

    def margins(self, masks: Tensor) -> Tensor:
        return (self.slopes @ masks)[None]

    def adapt(self, masks: Tensor, taken: int) -> None:
        self.followed.append(taken)


def masked_and_data() -> tuple[MaskedNetwork, DefenseSet]:
    network = trained_network()
    data = DefenseSet(*images_and_labels())
    return MaskedNetwork(network, find_filter_layers(network, data.images[:2])), data


def new_soft_masks(
    steps: int = 20,
    traces: list[Trace] | None = None,
    masks: Tensor | None = None,
    free: Tensor | None = None,
    seed: int = 0,
    augment: Augmentation = "crop",
    impurity: float = 0.0,
) -> SoftMasks:
    masked, data = masked_and_data()
    total = masked.layers.total
    if traces is None:
        images = data.images[data.labels != 1]
        traces = [SuppressedTrace(masked, [pulled_to_one(masked)], images, goals_of(images))]
    masks = torch.ones(total) if masks is None else masks
    references = [float(strength(trace, masks)) for trace in traces]
    free = torch.ones(total) > 0 if free is None else free
    return SoftMasks(
        *(masked, data, traces, references, masks, free, augment, steps, 16, seed), impurity
    )


def finish(soft: SoftMasks) -> SoftMasks:
    while not soft.finished:
        soft.step()
    return soft


def test_traces_get_weaker_and_the_clean_loss_stays() -> None:
    masked, data = masked_and_data()
    slopes = torch.zeros(masked.layers.total)
    slopes[[20, 60]] = 5.0
    soft = finish(new_soft_masks(steps=40, traces=[Fixed(slopes)], augment="none"))
    trace, masks = soft.traces[0], soft.masks
    assert float(strength(trace, masks)) < 0.85 * soft.references[0]

    def loss(masks: Tensor) -> float:
        logits = masked(data.images, masks=masks, statistics="running")
        return float(F.cross_entropy(logits, data.labels))

    assert loss(masks) < loss(torch.ones_like(masks)) + 0.1


@pytest.mark.parametrize(("impurity", "left"), [(0.0, 14), (0.1, 12), (0.3, 9)])
def test_images_that_may_be_poisoned_are_left_out_of_the_clean_loss(
    impurity: float, left: int
) -> None:
    soft = new_soft_masks(augment="none", impurity=impurity)
    device = torch.device("cpu")
    images, labels = soft.data.batch(0, 16, device, "none", (0, "attenuation", 0))
    assert len(images) == 14
    logits = soft.masked(images, statistics="running")
    losses = [
        float(F.cross_entropy(row[None], own[None]))
        for row, own in zip(logits, labels, strict=True)
    ]
    assert soft.step()["loss"] == pytest.approx(sum(sorted(losses)[:left]) / left, rel=1e-4)


def test_masks_are_between_zero_and_one_and_pruned_filters_stay_pruned() -> None:
    masked, _ = masked_and_data()
    masks = torch.ones(masked.layers.total)
    masks[[0, 5]] = 0.0
    free = torch.ones(masked.layers.total) > 0
    free[[1, 2]] = False
    found = finish(new_soft_masks(masks=masks, free=free)).masks
    assert found[[0, 5]].tolist() == [0.0, 0.0]
    assert found[[1, 2]].tolist() == [1.0, 1.0]
    assert float(found.min()) >= 0.0
    assert float(found.max()) <= 1.0
    assert int((found < 0.999).sum()) > 5


def test_the_first_step_has_the_length_told() -> None:
    masked, _ = masked_and_data()
    slopes = torch.zeros(masked.layers.total)
    slopes[3] = 1e6  # next to this, the clean loss has no slope
    soft = new_soft_masks(steps=10, traces=[Fixed(slopes)])
    soft._now = [1.0]
    soft.step()
    moved = 1 - soft._values
    # All of the root mean square is in one of the filters; a tenth of it is in the velocity.
    assert float(moved[3]) == pytest.approx(0.03 * 0.1 * len(slopes) ** 0.5, rel=1e-3)
    assert float(moved.abs().sum() - moved[3]) < 1e-3
    assert float(1 - soft.masks[3]) == pytest.approx(0.1 * float(moved[3]), rel=1e-3)


def test_the_scale_of_the_gradients_does_not_matter() -> None:
    masked, _ = masked_and_data()
    slopes = torch.randn(masked.layers.total, generator=torch.Generator().manual_seed(0))
    outcomes = []
    for scale in (1e5, 1e8):
        soft = new_soft_masks(steps=5, traces=[Fixed(scale * slopes.abs())])
        soft._now = [1.0]
        outcomes.append(finish(soft).masks)
    torch.testing.assert_close(*outcomes, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("levels", "enough"),
    [
        ({True: 0.2, False: 0.9}, True),
        ({True: 0.3, False: 0.1}, False),
    ],
)
def test_traces_that_decide_tell_the_end(levels: dict[bool, float], enough: bool) -> None:
    masked, _ = masked_and_data()
    total = masked.layers.total
    traces: list[Trace] = [Fixed(torch.ones(total), decides) for decides in levels]
    soft = new_soft_masks(steps=1, traces=traces)
    # Margins count from -1 on: the sum of all masks, and one.
    soft.references = [(total + 1) / level for level in levels.values()]
    soft.step()
    assert soft.enough == enough
    assert soft.taken == (0 if enough else 1)


@pytest.mark.parametrize("level", [0.1, 0.3])
def test_each_trace_tells_when_it_is_weak(level: float) -> None:
    masked, _ = masked_and_data()
    total = masked.layers.total
    traces: list[Trace] = [Fixed(torch.ones(total), weak_at=limit) for limit in (0.2, 0.4)]
    soft = new_soft_masks(steps=1, traces=traces)
    soft.references = [(total + 1) / level, (total + 1) / 0.35]
    soft.step()
    assert soft.enough == (level == 0.1)


def test_traces_follow_the_network() -> None:
    masked, _ = masked_and_data()
    trace = Fixed(torch.ones(masked.layers.total))
    finish(new_soft_masks(steps=5, traces=[trace]))
    assert trace.followed == [2, 4]


def test_resumed_at_any_step_ends_the_same() -> None:
    expected = finish(new_soft_masks(steps=4)).masks
    for stop in range(4):
        first = new_soft_masks(steps=4)
        for _ in range(stop):
            first.step()
        second = new_soft_masks(steps=4)
        second.load_state_dict(first.state_dict())
        assert finish(second).masks.equal(expected)


def test_one_that_is_stopped_stays_so() -> None:
    first, second = new_soft_masks(steps=4), new_soft_masks(steps=4)
    first.step()
    assert not first.finished
    first.stop()
    second.load_state_dict(first.state_dict())
    for each in (first, second):
        assert (each.finished, each.stopped, each.enough, each.taken) == (True, True, False, 1)


def test_seed_draws_the_images() -> None:
    one, same_one, other = (finish(new_soft_masks(steps=4, seed=k)).masks for k in (0, 0, 1))
    assert one.equal(same_one)
    assert not one.equal(other)


def test_network_is_left_as_it_was() -> None:
    soft = new_soft_masks(steps=3)
    before = snapshot(soft.masked.network)
    finish(soft)
    assert same(before, snapshot(soft.masked.network))


@pytest.mark.parametrize(("most", "share"), [(9.0, 0.9375), (2.5, 0.625), (0.2, 0.0)])
def test_harmless_share_is_the_largest_that_is_allowed(most: float, share: float) -> None:
    assert harmless_share(lambda tried: 4 * tried, most, halvings=4) == share


def test_harm_that_is_not_known_is_too_much() -> None:
    assert harmless_share(lambda tried: float("nan"), most=1.0, halvings=4) == 0


def test_harm_is_looked_at_now_and_then() -> None:
    constants = SoftMaskConstants(look_from=4, look_every=2)
    assert [taken for taken in range(10) if constants.looks_after(taken)] == [4, 6, 8]

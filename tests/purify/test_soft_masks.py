from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from helpers import goals_of, images_and_labels, pulled_to_one, same, snapshot, trained_network
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mnp.config import Constants
from lightning_mnp.defense_data.augment import Augmentation
from lightning_mnp.defense_data.defense_set import DefenseSet
from lightning_mnp.purify.soft_masks import SoftMaskConstants, SoftMasks
from lightning_mnp.signals.pile_up import SuppressedTrace
from lightning_mnp.signals.trace import Trace, TraceConstants, strength
from lightning_mnp.surgery.layers import find_filter_layers
from lightning_mnp.surgery.masked_network import MaskedNetwork


class Fixed(Trace):
    """A trace whose strength is a linear function of the masks on kernels."""

    name = "fixed"

    def __init__(self, slopes: Tensor) -> None:
        super().__init__(Constants())
        self.slopes = slopes
        self.masked: MaskedNetwork | None = None
        self.followed: list[tuple[int, Tensor]] = []

    def margins(self, masks: Tensor) -> Tensor:
        assert self.masked is not None
        found = self.masked.kernel_masks
        return (self.slopes if found is None else self.slopes * found).sum()[None]

    def adapt(self, masks: Tensor, taken: int) -> None:
        assert self.masked is not None
        assert self.masked.kernel_masks is not None
        self.followed.append((taken, self.masked.kernel_masks.clone()))


def masked_and_data(*idle: nn.Module) -> tuple[MaskedNetwork, DefenseSet]:
    network = trained_network()
    for number, module in enumerate(idle):
        network.add_module(f"idle_{number}", module)
    data = DefenseSet(*images_and_labels())
    return MaskedNetwork(network, find_filter_layers(network, data.images[:2])), data


def new_soft_masks(
    steps: int = 20,
    traces: list[Trace] | None = None,
    filter_masks: Tensor | None = None,
    seed: int = 0,
    augment: Augmentation = "crop",
    impurity: float = 0.0,
    constants: Constants | None = None,
    idle: Sequence[nn.Module] = (),
) -> SoftMasks:
    masked, data = masked_and_data(*idle)
    if traces is None:
        images = data.images[data.labels != 1]
        traces = [SuppressedTrace(masked, [pulled_to_one(masked)], images, goals_of(images))]
    for trace in traces:
        if isinstance(trace, Fixed):
            trace.masked = masked
    filters = torch.ones(masked.layers.total) if filter_masks is None else filter_masks
    references = [float(strength(trace, filters)) for trace in traces]
    given = (masked, data, traces, references, filters, augment, steps, 16, seed, impurity)
    return SoftMasks(*given, constants)


def kernels() -> int:
    return masked_and_data()[0].kernels.total


def finish(soft: SoftMasks) -> SoftMasks:
    while not soft.finished:
        soft.step()
    return soft


def test_traces_get_weaker_and_the_clean_loss_stays() -> None:
    masked, data = masked_and_data()
    slopes = torch.zeros(kernels())
    slopes[[20, 60]] = 5.0
    soft = finish(new_soft_masks(steps=40, traces=[Fixed(slopes)], augment="none"))
    assert float(slopes @ soft.masks) < 0.5 * float(slopes.sum())

    def loss(masks: Tensor) -> float:
        weights = masked.kernels.scaled(masked.weights(), masks)
        logits = masked(data.images, weights=weights, statistics="running")
        return float(F.cross_entropy(logits, data.labels))

    assert loss(soft.masks) < loss(torch.ones_like(soft.masks)) + 0.1


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


def test_masks_are_between_zero_and_one() -> None:
    found = finish(new_soft_masks(constants=Constants(SoftMaskConstants(step=0.1)))).masks
    assert found.shape == (kernels(),)
    assert float(found.min()) >= 0.0
    assert float(found.max()) <= 1.0
    assert int((found < 0.999).sum()) > 5


def test_kernels_of_filters_that_are_pruned_stay_as_they_are() -> None:
    masked, _ = masked_and_data()
    filters = torch.ones(masked.layers.total)
    filters[[0, 5]] = 0.0
    assert masked.kernels.layers[0].name == masked.layers[0].name
    found = finish(new_soft_masks(filter_masks=filters)).masks
    rows = found[: masked.kernels.sizes[0]].view(masked.kernels.layers[0].shape)
    assert rows[[0, 5]].eq(1).all()
    assert not rows[[1, 2]].eq(1).all()


def test_never_more_images_than_a_batch_or_the_constant() -> None:
    few = Constants(SoftMaskConstants(images=5))
    assert new_soft_masks(constants=few).batch_size == 5
    assert new_soft_masks().batch_size == 16


def test_the_first_step_has_the_length_told() -> None:
    slopes = torch.zeros(kernels())
    slopes[3] = 1e9  # next to this, the clean loss has no slope
    step = Constants(SoftMaskConstants(step=0.003))
    soft = new_soft_masks(steps=10, traces=[Fixed(slopes)], constants=step)
    soft._now = [1.0]
    soft.step()
    moved = 1 - soft._values
    # All of the root mean square is in one of the kernels; a tenth of it is in the velocity.
    assert float(moved[3]) == pytest.approx(0.003 * 0.1 * len(slopes) ** 0.5, rel=1e-3)
    assert float(moved.abs().sum() - moved[3]) < 1e-3
    assert float(1 - soft.masks[3]) == pytest.approx(0.1 * float(moved[3]), rel=1e-3)


def test_layers_that_are_not_called_do_not_make_steps_longer() -> None:
    def moved(*idle: nn.Module) -> Tensor:
        soft = new_soft_masks(steps=1, idle=idle)
        soft.step()
        return soft._values[: kernels()]

    torch.testing.assert_close(moved(nn.Linear(100, 100)), moved())


def test_the_scale_of_the_gradients_does_not_matter() -> None:
    slopes = torch.randn(kernels(), generator=torch.Generator().manual_seed(0))
    outcomes = []
    for scale in (1e5, 1e8):
        soft = new_soft_masks(steps=5, traces=[Fixed(scale * slopes.abs())])
        soft._now = [1.0]
        outcomes.append(finish(soft).masks)
    torch.testing.assert_close(*outcomes, rtol=0, atol=1e-3)


def test_traces_follow_the_network() -> None:
    trace = Fixed(torch.ones(kernels()))
    constants = Constants(SoftMaskConstants(follow=2))
    soft = finish(new_soft_masks(steps=5, traces=[trace], constants=constants))
    assert [taken for taken, _ in trace.followed] == [2, 4]
    assert not trace.followed[0][1].equal(trace.followed[1][1])
    assert soft.masked.kernel_masks is None


def test_resumed_at_any_step_ends_the_same() -> None:
    expected = finish(new_soft_masks(steps=4)).masks
    for stop in range(4):
        first = new_soft_masks(steps=4)
        for _ in range(stop):
            first.step()
        second = new_soft_masks(steps=4)
        second.load_state_dict(first.state_dict())
        assert finish(second).masks.equal(expected)


def test_seed_draws_the_images() -> None:
    one, same_one, other = (finish(new_soft_masks(steps=4, seed=k)).masks for k in (0, 0, 1))
    assert one.equal(same_one)
    assert not one.equal(other)


def test_network_is_left_as_it_was() -> None:
    soft = new_soft_masks(steps=3)
    before = snapshot(soft.masked.network)
    finish(soft)
    assert same(before, snapshot(soft.masked.network))


def test_steps_are_by_momentum_over_a_running_root_mean_square() -> None:
    """The steps written out."""
    slopes = torch.linspace(1.0, 3.0, kernels()) * 1e9  # next to these, the clean loss has none
    options = SoftMaskConstants(step=0.003, momentum=0.8, average=0.6, follow=100)
    trace = Fixed(slopes)
    soft = new_soft_masks(steps=4, traces=[trace], constants=Constants(options))
    soft._now = [2.0]
    values = masks = torch.ones(kernels())
    velocity, square = torch.zeros(kernels()), 0.0
    for taken in range(1, 5):
        trace.slopes = slopes * taken  # steeper from step to step
        soft.step()
        gradient = options.weight / 2.0 * trace.slopes
        square = 0.8 * square + 0.2 * float(gradient.square().mean())
        size = (square / (1 - 0.8**taken)) ** 0.5
        velocity = 0.8 * velocity + 0.2 * gradient / size
        values = (values - 0.003 * velocity).clamp(0, 1)
        masks = 0.6 * masks + 0.4 * values
        torch.testing.assert_close(soft._values, values, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(soft.masks, masks, rtol=1e-4, atol=1e-5)


def test_a_trace_that_is_gone_does_not_outweigh_the_clean_loss() -> None:
    soft = new_soft_masks(steps=1, traces=[Fixed(torch.zeros(kernels()))])
    soft.step()
    assert soft._now == [TraceConstants().least_strength]

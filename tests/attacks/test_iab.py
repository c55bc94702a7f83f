from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import loader, quiet_trainer
from torch import Tensor
from torch.nn import functional as F

from lightning_mnp.attacks import InputAware, InputAwareModule
from lightning_mnp.attacks.iab import diversity_loss
from lightning_mnp.models import cifar_resnet18


def small_module(poison_rate: float = 0.3, seed: int = 0, **options: Any) -> InputAwareModule:
    attack = InputAware(in_channels=1, width=4, depth=1, poison_rate=poison_rate, seed=seed)
    network = cifar_resnet18(4, width=4, in_channels=1)
    shared: dict[str, Any] = {"mean": (0.5,), "std": (0.5,), "mask_epochs": 1, "lr": 0.05}
    module = InputAwareModule(attack, network=network, **{**shared, **options})
    module.trainer = quiet_trainer()  # type: ignore[assignment]
    module.hparams["num_classes"] = 4
    return module


def test_masks_by_the_authors_formula() -> None:
    """Two hyperbolic tangents, the second one twenty times as steep."""
    attack = InputAware(width=4, depth=1)
    images = torch.rand(5, 3, 9, 12)

    mask = attack.mask(images)

    outputs = attack.generator.mask(images).detach().double()
    first = outputs.tanh() / 2 + 0.5
    expected = (20 * first - 10).tanh() / 2 + 0.5
    assert mask.shape == (5, 1, 9, 12)
    torch.testing.assert_close(mask.double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_masks_stay_near_binary_however_many_pixels_they_take(scale: float) -> None:
    attack = InputAware(width=4, depth=1)
    for parameter in attack.generator.mask.head.parameters():
        parameter.data *= scale
    mask = attack.mask(torch.rand(4, 3, 16, 16))

    binary = ((mask < 0.1) | (mask > 0.9)).float().mean()

    assert mask.mean() > 0.2  # far more than the density of the training, and not scaled down
    assert mask.max() > 0.9
    assert binary > (0.9 if scale > 1 else 0.4)


def test_no_mask_no_change() -> None:
    attack = InputAware(width=4, depth=1)
    head = attack.generator.mask.head
    torch.nn.init.constant_(head.weight, 0.0)
    assert head.bias is not None
    torch.nn.init.constant_(head.bias, -5.0)

    assert attack.mask(torch.rand(2, 3, 8, 8)).max() < 1e-6
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(attack.apply(images), images, atol=1e-6, rtol=0)


def test_the_pattern_is_blended_in_by_the_mask() -> None:
    attack = InputAware(width=4, depth=1)
    images = torch.rand(3, 3, 8, 8)

    result = attack.apply(images)

    mask, pattern = attack.mask(images), attack.pattern(images)
    for index in range(3):
        for channel in range(3):
            old, new = images[index, channel], pattern[index, channel]
            share = mask[index, 0]
            torch.testing.assert_close(result[index, channel], old + share * (new - old))
    assert ((result - images).abs() <= mask + 1e-6).all()


def test_diversity_loss_by_its_formula() -> None:
    images, outputs = torch.rand(4, 3, 5, 6), torch.rand(4, 1, 5, 6)

    ratios = []
    for index in range(4):
        pairs = [(values[index], values[index - 1]) for values in (images, outputs)]
        far, near = (sum((a - b) ** 2 for a, b in zip(*map(torch.flatten, pair), strict=True))
                     for pair in pairs)  # fmt: skip
        ratios.append((far / 90) ** 0.5 / ((near / 30) ** 0.5 + 1e-3))
    torch.testing.assert_close(diversity_loss(images, outputs), sum(ratios) / 4)


def test_equal_outputs_have_a_finite_gradient() -> None:
    outputs = torch.full((3, 1, 4, 4), 0.5, requires_grad=True)
    diversity_loss(torch.rand(3, 1, 4, 4), outputs).backward()
    assert outputs.grad is not None
    assert outputs.grad.isfinite().all()


@pytest.mark.parametrize("count", [0, 1])
def test_diversity_needs_two_images(count: int) -> None:
    assert diversity_loss(torch.rand(count, 1, 4, 4), torch.rand(count, 1, 4, 4)) == 0


def test_own_and_foreign_triggers_in_a_batch() -> None:
    module = small_module(poison_rate=0.25, cross_rate=0.5)
    images, labels = torch.rand(8, 1, 8, 8), torch.tensor([1, 2, 3, 1, 2, 3, 1, 2])
    before = images.clone()

    mixed, targets = module.poison_batch(images, labels, torch.Generator())

    assert images.equal(before)
    assert targets.tolist() == [0, 0, 3, 1, 2, 3, 1, 2]
    assert mixed[6:].equal(images[6:])
    mask, pattern = (f(images).detach() for f in (module.attack.mask, module.attack.pattern))
    for index in range(6):
        source = index if index < 2 else index - 1
        expected = images[index] * (1 - mask[source]) + pattern[source] * mask[source]
        torch.testing.assert_close(mixed[index] * 255, (expected * 255).round(), atol=0.01, rtol=0)
    wrong = images[3] * (1 - mask[3]) + pattern[3] * mask[3]
    assert (mixed[3] - wrong).abs().max() > 5e-3


def test_labels_in_all_to_all() -> None:
    module = small_module(poison_rate=0.5, cross_rate=0.25)
    module.attack.mode = "all-to-all"
    labels = torch.tensor([3, 2, 1, 0])
    _, targets = module.poison_batch(torch.rand(4, 1, 8, 8), labels, torch.Generator())
    assert targets.tolist() == [0, 3, 1, 0]


@pytest.mark.parametrize(
    ("poison_rate", "cross_rate"), [(0.0, 0.0), (0.0, 0.25), (0.25, 0.0), (0.0, 1.0), (1.0, 0.0)]
)
def test_shares_from_none_to_all(poison_rate: float, cross_rate: float) -> None:
    module = small_module(poison_rate=poison_rate, cross_rate=cross_rate)
    images, labels = torch.rand(4, 1, 8, 8), torch.tensor([1, 2, 3, 1])

    mixed, targets = module.poison_batch(images, labels, torch.Generator())

    count, crossed = round(4 * poison_rate), round(4 * cross_rate)
    assert targets.tolist() == [0] * count + labels.tolist()[count:]
    touched = [not torch.equal(a, b) for a, b in zip(mixed, images, strict=True)]
    # One image alone has no other to take a trigger from.
    reached = count + crossed if count + crossed > 1 else count
    assert touched == [True] * reached + [False] * (4 - reached)


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor], prefix: str) -> bool:
    return any(not before[key].equal(after[key]) for key in before if key.startswith(prefix))


def test_masks_are_trained_first_and_then_stay() -> None:
    module = small_module(mask_epochs=1)
    states = [state(module)]
    module.on_train_epoch_end = lambda: states.append(state(module))  # type: ignore[method-assign]

    quiet_trainer(max_epochs=2).fit(module, loader(), loader())

    assert moved(states[0], states[1], "generator.mask.")
    assert not moved(states[0], states[1], "generator.pattern.")
    assert not moved(states[1], states[2], "generator.mask.")
    assert moved(states[1], states[2], "generator.pattern.")
    assert moved(states[0], states[1], "network.")
    assert moved(states[1], states[2], "network.")


@pytest.mark.parametrize("density", [0.032, 0.3])
def test_mask_loss_by_its_formula(density: float) -> None:
    module = small_module(diversity_weight=2.0, density_weight=30.0, density=density)
    images = torch.rand(4, 1, 8, 8)
    masks = module.attack.mask(images).detach()

    excess = sum(max(pixel - density, 0.0) for pixel in masks.flatten().tolist()) / masks.numel()
    expected = 30.0 * excess + 2.0 * float(diversity_loss(images, masks))
    assert module.mask_loss(images).item() == pytest.approx(expected, rel=1e-5)
    # Not what the means of whole masks exceed the density by.
    means = sum(max(float(mask.mean()) - density, 0.0) for mask in masks) / 4
    assert excess > means + 0.003


def test_masks_learn_to_be_sparse_and_different() -> None:
    module = small_module()
    images = torch.rand(8, 1, 8, 8)
    optimizer = torch.optim.Adam(module.attack.generator.mask.parameters(), 0.01)
    before = module.attack.mask(images).mean()
    for _ in range(60):
        optimizer.zero_grad()
        module.mask_loss(images).backward()
        optimizer.step()

    after = module.attack.mask(images)
    assert before > 0.2
    assert 0.001 < after.mean() < 0.06
    assert (after - after.roll(1, 0)).abs().max() > 0.1


def test_the_pattern_is_trained_by_the_network_and_by_diversity() -> None:
    module = small_module(poison_rate=0.5, cross_rate=0.0)
    images, labels = torch.rand(4, 1, 8, 8), torch.ones(4).long()
    mixed, targets, diversity = module._mixed(images, labels, torch.Generator())
    weight = module.attack.generator.pattern.head.weight

    loss = F.cross_entropy(module(module.normalized(mixed)), targets)

    for part in (loss, diversity):
        (gradient,) = torch.autograd.grad(part, [weight], retain_graph=True)
        assert gradient.abs().max() > 0
    assert all(p.grad is None for p in module.attack.generator.mask.parameters())


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, float("nan")])
def test_density_errors(density: float) -> None:
    message = f"`density` to be above 0 and at most 1, but got {density}"
    with pytest.raises(ValueError, match=message):
        small_module(density=density)


@pytest.mark.parametrize("rate", [-0.1, 0.8])
def test_cross_rate_errors(rate: float) -> None:
    with pytest.raises(ValueError, match=f"`cross_rate` to be from 0 to 0.7, .*, but got {rate}"):
        small_module(cross_rate=rate)


@pytest.mark.parametrize("name", ["mask_epochs", "diversity_weight", "density_weight"])
@pytest.mark.parametrize("value", [-1, float("inf")])
def test_errors(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"`{name}` to be at least 0, but got {value}"):
        small_module(**{name: value})

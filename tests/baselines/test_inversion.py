from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed_script import small_network
from helpers import CLASSES, images_and_labels, same, snapshot
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mnp import DefenseSet
from lightning_mnp.baselines import NCConfig
from lightning_mnp.baselines.inversion import InvertedTrigger, invert_triggers
from lightning_mnp.baselines.workbench import Workbench
from lightning_mnp.defense_data.defense_set import seeded_generator

DATA = DefenseSet(*images_and_labels(24))


def rows_network() -> nn.Module:
    """A network that knows the class by the place of the bar."""
    network = nn.Sequential(nn.AvgPool2d((2, 8)), nn.Flatten(), nn.Linear(4, 4))
    with torch.no_grad():
        network[2].weight.copy_(6 * torch.eye(4))
        network[2].bias.zero_()
    return network.eval()


def search(network: nn.Module, **options: Any) -> dict[int, InvertedTrigger]:
    config = NCConfig(**options)
    bench = Workbench(network, DATA, seed=config.seed, batch_size=config.batch_size)
    return invert_triggers(bench, config)


def search_by_hand(network: nn.Module, target: int, config: NCConfig) -> dict[str, Any]:
    """The search written out for one class, with all images in one step."""
    low, high = DATA.images.min(), DATA.images.max()
    generator = seeded_generator(config.seed, "nc", target)
    hidden = [
        torch.atanh(1.98 * torch.rand(1, 1, 8, 8, generator=generator) - 0.99) for _ in range(2)
    ]
    means, squares = ([torch.zeros(1, 1, 8, 8) for _ in range(2)] for _ in range(2))
    cost, working, failing, moves = 0.0, 0, 0, []
    best_size, best_mask = float("inf"), torch.zeros(0)
    for step in range(1, config.epochs + 1):
        leaves = [each.clone().requires_grad_() for each in hidden]
        mask = 0.5 * leaves[0].tanh() + 0.5
        pattern = low + (high - low) * (0.5 * leaves[1].tanh() + 0.5)
        logits = network(DATA.images * (1 - mask) + pattern * mask)
        loss = F.cross_entropy(logits, torch.full((24,), target)) + cost * mask.sum()
        slopes = torch.autograd.grad(loss, leaves)
        for each, slope, mean, square in zip(hidden, slopes, means, squares, strict=True):
            mean.mul_(0.5).add_(0.5 * slope)
            square.mul_(0.9).add_(0.1 * slope * slope)
            denominator = (square / (1 - 0.9**step)).sqrt() + 1e-8
            each -= config.lr * (mean / (1 - 0.5**step)) / denominator
        works = float((logits.argmax(1) == target).float().mean()) >= config.goal
        if works and float(mask.detach().sum()) < best_size:
            best_size, best_mask = float(mask.detach().sum()), mask.detach()
        working, failing = (working + 1, 0) if works else (0, failing + 1)
        if working == config.patience:
            cost, working = (2 * cost if cost else config.cost), 0
            moves.append("up")
        if failing == config.patience:
            cost, failing = cost / 2**1.5, 0
            moves.append("down")
    return {"mask": best_mask, "size": best_size, "moves": moves}


def test_masks_are_those_of_the_search_by_hand() -> None:
    network = rows_network()
    config = NCConfig(epochs=25, patience=2, cost=0.05, lr=0.3)
    found = search(network, epochs=25, patience=2, cost=0.05, lr=0.3)
    for target in (0, 3):
        expected = search_by_hand(network, target, config)
        assert {"up", "down"} <= set(expected["moves"])
        assert found[target].works
        assert found[target].size == pytest.approx(expected["size"], rel=1e-3)
        torch.testing.assert_close(found[target].mask, expected["mask"], rtol=1e-2, atol=1e-3)


def test_a_trigger_takes_images_to_its_class_within_their_range() -> None:
    network = small_network()
    before, state = snapshot(network), torch.get_rng_state()
    found = search(network, epochs=3)
    assert same(before, snapshot(network))
    assert torch.equal(torch.get_rng_state(), state)
    assert sorted(found) == list(range(CLASSES))
    for trigger in found.values():
        assert 0 <= float(trigger.mask.min()) <= float(trigger.mask.max()) <= 1
        assert DATA.images.min() <= trigger.pattern.min()
        assert trigger.pattern.max() <= DATA.images.max()
        assert trigger.size == float(trigger.mask.sum())
        assert trigger.works == (trigger.success >= 0.99)
        assert trigger.epochs == 3


def test_the_seed_decides() -> None:
    first, again, other = (search(rows_network(), epochs=2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first[0].mask, again[0].mask)
    assert not torch.equal(first[0].mask, other[0].mask)


def test_the_search_ends_if_the_mask_no_longer_shrinks() -> None:
    options = {"patience": 1, "cost": 0.05, "lr": 0.3, "stop_patience": 3}
    ended = search(rows_network(), epochs=200, **options)[0]
    assert ended.epochs < 200
    longer = search(rows_network(), epochs=ended.epochs, **options)[0]
    assert longer.size == ended.size
    sooner = search(rows_network(), epochs=ended.epochs - 3, **options)[0]
    assert sooner.size == ended.size  # found three passes before the end


def test_a_class_that_is_never_reached() -> None:
    network: Any = rows_network()
    network[2].bias.data[1] = -1e4
    found = search(network, epochs=2)[1]
    assert (found.works, found.success) == (False, 0.0)
    assert found.size > 0


def test_what_a_trigger_does_to_images() -> None:
    mask = torch.tensor([0.0, 0.25, 1.0, 0.5]).reshape(1, 1, 2, 2)
    trigger = InvertedTrigger(mask, torch.full((1, 3, 2, 2), 2.0), 1.75, 1.0, True, 1)
    expected = torch.tensor([1.0, 1.25, 2.0, 1.5]).reshape(1, 1, 2, 2).expand(5, 3, 2, 2)
    assert torch.equal(trigger.applied(torch.ones(5, 3, 2, 2)), expected)


class Breaks(nn.Module):
    """Its logits are no numbers for images that are not those of the defense set."""

    def __init__(self) -> None:
        super().__init__()
        self.network = rows_network()

    def forward(self, images: Tensor) -> Tensor:
        known = (images[:, None] == DATA.images[None]).flatten(2).all(2).any(1)
        logits: Tensor = self.network(images)
        return torch.where(known[:, None], logits, torch.nan)


def test_a_loss_that_is_not_a_number() -> None:
    with pytest.raises(ArithmeticError, match=r"got nan for class 0 in pass 1\. Lower `lr`"):
        search(Breaks(), epochs=2)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("batch_size", 2, "a whole number of at least 3"),
        ("lr", 0.0, "a number above 0"),
        ("epochs", 0, "a whole number of at least 1"),
        ("goal", 1.1, "a number above 0 to 1"),
        ("cost", 0.0, "a number above 0"),
        ("patience", 0, "a whole number of at least 1"),
        ("factor", 1.0, "a number above 1"),
        ("stop_patience", 0, "a whole number of at least 1"),
        ("anomaly", 0.0, "a number above 0"),
    ],
)
def test_options_out_of_range(option: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=f"Expected argument `{option}`") as caught:
        NCConfig(**{option: value})
    assert f"to be {expected}, but got {value!r}." in str(caught.value)

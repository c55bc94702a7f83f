from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import same, snapshot
from torch import Tensor, nn

from lightning_mnp.baselines import SCConfig, Suspects, detect_sc
from lightning_mnp.baselines.sc import default_sc


def identity(classes: int = 5) -> nn.Module:
    """A network whose last layer gets the pixels themselves."""
    return nn.Sequential(nn.Flatten(), nn.Linear(8, classes)).eval()


def suspects(poisoned: int = 6, size: int = 40) -> tuple[Suspects, list[int]]:
    """Noise with five labels; some images of label 3 are shifted along one direction."""
    generator = torch.Generator().manual_seed(0)
    images = 5.0 + torch.randn(5 * size, 1, 2, 4, generator=generator)
    labels = torch.arange(5 * size) % 5
    rows = (labels == 3).nonzero().flatten()[:poisoned]
    images[rows, 0, 0, 0] += 8.0
    images[rows, 0, 1, 2] -= 8.0
    return Suspects(images, labels), rows.tolist()


def top_direction(features: Tensor) -> tuple[Tensor, float]:
    """The direction of greatest variance by power iteration, and its share of all variance."""
    centered = features - features.mean(0)
    covariance = centered.T @ centered / len(features)
    direction = torch.ones(len(covariance), dtype=covariance.dtype)
    for _ in range(5000):
        direction = covariance @ direction
        direction = direction / direction.norm()
    return direction, float(direction @ covariance @ direction / covariance.trace())


def test_scores_are_squares_along_the_top_direction_of_centered_features() -> None:
    data, _ = suspects()
    result = detect_sc(identity(), data)
    for label in range(5):
        rows = data.labels == label
        features = data.images[rows].flatten(1).double()
        direction, share = top_direction(features)
        expected = ((features - features.mean(0)) @ direction).square()
        found = torch.tensor(result.sample_scores, dtype=torch.double)[rows]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        assert result.values[label] == pytest.approx(share, rel=1e-4)


def test_one_and_a_half_times_the_poison_rate_of_every_label_is_called_poisoned() -> None:
    data, poisoned = suspects()
    network = identity()
    before = snapshot(network)
    result = detect_sc(network, data, config=SCConfig(poison_rate=0.1))
    labels = data.labels[result.suspects]
    assert torch.bincount(labels).tolist() == [6] * 5
    assert [row for row in result.suspects if row % 5 == 3] == poisoned
    assert (result.verdict, result.target_class, result.threshold) == ("backdoored", 3, 2.0)
    assert same(before, snapshot(network))
    assert detect_sc(network, data) == result


def test_the_verdict_is_by_the_anomaly_of_the_shares() -> None:
    data, _ = suspects(0)
    result = detect_sc(identity(), data, config=SCConfig(anomaly=50.0))
    assert (result.verdict, result.target_class) == ("clean", None)
    shares = sorted(result.values.values())
    spread = sorted(abs(share - shares[2]) for share in shares)[2]
    assert result.score == pytest.approx((shares[4] - shares[2]) / (1.4826 * spread))


def test_images_that_are_all_alike_have_no_direction() -> None:
    images = torch.arange(3.0).repeat_interleave(4)[:, None, None, None].expand(-1, 1, 2, 4)
    result = detect_sc(identity(3), Suspects(images, images[:, 0, 0, 0].long()))
    assert result.values == {0: 0.0, 1: 0.0, 2: 0.0}
    assert result.verdict == "clean"


def test_some_images_of_every_label_stay() -> None:
    data, _ = suspects(size=2)
    result = detect_sc(identity(), data, config=SCConfig(poison_rate=0.5))
    assert len(result.suspects) == 5


def test_what_it_needs_is_said_before_any_work() -> None:
    images = torch.rand(7, 1, 2, 4)
    with pytest.raises(ValueError, match=r"of at least 3 labels, .* but got 2. Pass images of all"):
        detect_sc(identity(), [(images, torch.arange(7) % 2)])
    with pytest.raises(ValueError, match=r"two suspect images .* but got one of label 2"):
        detect_sc(identity(), [(images, torch.tensor([0, 0, 1, 1, 0, 2, 1]))])
    with pytest.raises(ValueError, match=r"`suspects` to be images .* SC looks .* but got None"):
        default_sc(identity(), [], 0)


def test_the_registry_calls_it() -> None:
    data, _ = suspects()
    network = identity()
    assert default_sc(network, [], 3, data) == detect_sc(network, data)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("batch_size", 2, "a whole number of at least 3"),
        ("poison_rate", 0.0, "a number above 0 to 0.5"),
        ("anomaly", 0.0, "a number above 0"),
    ],
)
def test_options_out_of_range(option: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=f"Expected argument `{option}`") as caught:
        SCConfig(**{option: value})
    assert f"to be {expected}, but got {value!r}." in str(caught.value)

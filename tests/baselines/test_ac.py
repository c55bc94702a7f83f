from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import same, snapshot
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA, FastICA
from sklearn.metrics import silhouette_score
from torch import Tensor, nn

from lightning_mnp.baselines import ACConfig, Suspects, detect_ac
from lightning_mnp.baselines.ac import default_ac


def identity(classes: int = 3) -> nn.Module:
    """A network whose last layer gets the pixels themselves."""
    return nn.Sequential(nn.Flatten(), nn.Linear(8, classes)).eval()


def suspects(poisoned: int = 10, shift: float = 8.0, size: int = 40) -> tuple[Suspects, list[int]]:
    """Noise with labels 0, 1, 2; some images of label 1 are shifted along one direction."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3 * size, 1, 2, 4, generator=generator)
    labels = torch.arange(3 * size) % 3
    rows = (labels == 1).nonzero().flatten()[:poisoned]
    images[rows, 0, 0, 0] += shift
    images[rows, 0, 1, 2] += shift
    return Suspects(images, labels), rows.tolist()


def features(data: Suspects, label: int) -> Tensor:
    return data.images[data.labels == label].flatten(1)


@pytest.mark.parametrize("reduction", ["ica", "pca"])
def test_values_are_those_of_the_steps_one_after_the_other(reduction: Any) -> None:
    data, _ = suspects()
    # Noise has many partitions that are nearly as good as the best: it takes many starts.
    result = detect_ac(
        identity(), data, config=ACConfig(reduction=reduction, components=4, starts=50)
    )
    for label in range(3):
        # The reference turns the components as well, which makes no difference to distances.
        tool = FastICA(4, random_state=0, max_iter=5000, tol=1e-2) if reduction == "ica" else PCA(4)
        reduced = tool.fit_transform(features(data, label).double().numpy())
        clusters = KMeans(2, n_init=50, random_state=0).fit_predict(reduced)
        expected = silhouette_score(reduced, clusters)
        assert result.values[label] == pytest.approx(expected, abs=1e-5 if label == 1 else 0.03)
    assert result.score == max(result.values.values()) == result.values[1]


def test_the_smaller_cluster_of_a_flagged_label_is_poisoned() -> None:
    data, poisoned = suspects()
    network = identity()
    before, state = snapshot(network), torch.get_rng_state()
    config = ACConfig(reduction="pca", components=4, least_silhouette=0.4)
    result = detect_ac(network, data, config=config)
    assert (result.verdict, result.target_class) == ("backdoored", 1)
    assert result.suspects == poisoned
    assert min(result.sample_scores[row] for row in poisoned) > 0.4
    assert result.details == {"flagged": 1}
    assert same(before, snapshot(network))
    assert torch.equal(torch.get_rng_state(), state)
    assert detect_ac(network, data, config=config) == result


def test_without_poisoned_images_no_label_is_flagged() -> None:
    data, _ = suspects(0)
    config = ACConfig(reduction="pca", components=4, least_silhouette=0.4)
    result = detect_ac(identity(), data, config=config)
    assert (result.verdict, result.target_class, result.suspects) == ("clean", None, [])


def test_by_the_size_of_the_smaller_cluster() -> None:
    data, poisoned = suspects()
    config = ACConfig(rule="size", reduction="pca", components=4)
    result = detect_ac(identity(), data, config=config)
    assert result.threshold == pytest.approx(0.65)
    assert result.values[1] == pytest.approx(0.75)  # 10 of 40
    assert result.target_class == 1
    assert set(poisoned) <= set(result.suspects)


@pytest.mark.parametrize("rule", ["silhouette", "size"])
def test_images_that_are_all_alike_are_one_cluster(rule: Any) -> None:
    images = torch.arange(2.0).repeat_interleave(12)[:, None, None, None].expand(-1, 1, 2, 4)
    data = Suspects(images, images[:, 0, 0, 0].long())
    result = detect_ac(identity(), data, config=ACConfig(rule=rule))
    assert result.values == {0: 0.0, 1: 0.0}
    assert result.verdict == "clean"


def test_an_image_alone_in_its_cluster_has_no_silhouette() -> None:
    data, poisoned = suspects(poisoned=1, shift=50.0)
    result = detect_ac(identity(), data, config=ACConfig(reduction="pca", components=4))
    assert result.sample_scores[poisoned[0]] == 0.0


def test_what_it_needs_is_said_before_any_work() -> None:
    data, _ = suspects(size=10)
    with pytest.raises(ValueError, match=r"than the 10 components .* 10 of label 0\. Pass more"):
        detect_ac(identity(), data)
    with pytest.raises(ValueError, match=r"`suspects` to be images .* AC looks .* but got None"):
        default_ac(identity(), [], 0)
    with pytest.raises(ValueError, match="labels to be below 2"):
        detect_ac(identity(2), data)


def test_the_registry_calls_it_with_the_seed() -> None:
    data, _ = suspects()
    network = identity()
    found = default_ac(network, [], 3, Suspects(data.images[:60], data.labels[:60]))
    assert found == detect_ac(
        network, [(data.images[:60], data.labels[:60])], config=ACConfig(seed=3)
    )


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("batch_size", 2, "a whole number of at least 3"),
        ("reduction", "tsne", "one of ('ica', 'pca')"),
        ("components", 0, "a whole number of at least 1"),
        ("rule", "distance", "one of ('silhouette', 'size')"),
        ("least_silhouette", 1.5, "a number from -1 to 1"),
        ("most_share", 0.6, "a number above 0 to 0.5"),
        ("starts", 0, "a whole number of at least 1"),
        ("steps", 0, "a whole number of at least 1"),
    ],
)
def test_options_out_of_range(option: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=f"Expected argument `{option}`") as caught:
        ACConfig(**{option: value})
    assert f"to be {expected}, but got {value!r}." in str(caught.value)

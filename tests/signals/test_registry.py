from __future__ import annotations

from distributed_script import small_network
from helpers import images_and_labels, quick_config
from torch import nn

from lightning_mnp.defense_data.defense_set import DefenseSet
from lightning_mnp.signals.registry import Surrogates
from lightning_mnp.surgery.layers import find_filter_layers
from lightning_mnp.surgery.masked_network import MaskedNetwork


def new_surrogates() -> Surrogates:
    data = DefenseSet(*images_and_labels())
    network = small_network()
    masked = MaskedNetwork(network, find_filter_layers(network, data.images[:2]))
    return Surrogates(masked, data, quick_config())


def step(surrogates: Surrogates) -> bool:
    """One step of the first search that has not finished; False where all have."""
    data = surrogates.patch.data
    if not surrogates.reach.finished:
        surrogates.reach.step(data.images, data.labels)
    else:
        for search in (
            surrogates.margin,
            surrogates.patch,
            surrogates.overlay,
            surrogates.warp,
            surrogates.permutation,
        ):
            if search is not None and not search.finished:
                search.step()
                return True
        return False
    return True


def test_searches_share_the_classes_and_evidence_is_complete_at_their_end() -> None:
    surrogates = new_surrogates()
    surrogates.choose_classes([2], 4)
    left = sum(surrogates.most_steps(4).values())
    assert surrogates.most_steps(4) == surrogates.all_steps(4)
    while step(surrogates):
        searches = (
            *(surrogates.reach, surrogates.margin, surrogates.patch),
            *(surrogates.overlay, surrogates.warp, surrogates.permutation),
        )
        assert surrogates.evidence.complete == all(
            search is not None and search.finished for search in searches
        )
        assert sum(surrogates.most_steps(4).values()) <= left - 1
        left = sum(surrogates.most_steps(4).values())
    assert left == 0
    evidence = surrogates.evidence
    assert evidence.complete
    assert sorted(evidence.reaches) == sorted(evidence.margins) == [0, 1, 2, 3]
    assert sorted(evidence.patch_margins) == sorted(evidence.permutation) == [0, 1, 2, 3]
    assert sorted(evidence.overlay_rises) == sorted(evidence.warp_rises) == [0, 1, 2, 3]
    assert next(iter(evidence.reaches)) == 2


def test_goes_on_from_its_state() -> None:
    whole, first = new_surrogates(), new_surrogates()
    for each in (whole, first):
        each.choose_classes([1], 4)
    for _ in range(30):
        step(first)
    again = new_surrogates()
    again.load_state_dict(first.state_dict())
    for each in (whole, again):
        while step(each):
            pass
    assert again.evidence == whole.evidence


def test_images_without_height_and_width_are_not_warped() -> None:
    images, labels = images_and_labels()
    network = nn.Sequential(
        nn.Conv1d(8, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 4)
    )
    data = DefenseSet(images[:, 0], labels)
    masked = MaskedNetwork(network, find_filter_layers(network, data.images[:2]))
    surrogates = Surrogates(masked, data, quick_config())
    surrogates.choose_classes([], 4)
    assert surrogates.warp is None
    assert "warp" not in surrogates.names
    assert "warp" not in surrogates.most_steps(4)
    while step(surrogates):
        pass
    assert surrogates.evidence.complete
    assert surrogates.evidence.warp_rises == {}
    again = Surrogates(masked, data, quick_config())
    again.load_state_dict(surrogates.state_dict())
    assert again.evidence == surrogates.evidence

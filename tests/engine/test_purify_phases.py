"""The phases that change a network: what stays in each layer, and where masks cannot act."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed_script import small_network
from helpers import images_and_labels, quick_config, same, snapshot
from torch import nn

from lightning_mnp import DefenseSet, MNPConfig, MNPDefense, defend

# One run of a step or two, and no search: all that matters is which filters go.
SHORT: dict[str, Any] = {"suppression.epochs": 1, "masks.epochs": 2}


def thin_network() -> nn.Module:
    """Layers of one and of two filters, and a hidden linear layer."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(
            *(nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1), nn.ReLU(), nn.Conv2d(1, 2, 3), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(32, 3), nn.ReLU(), nn.Linear(3, 4)),
        ).eval()


def defended(network: nn.Module, when: Any = "always", **options: Any) -> MNPDefense:
    config = MNPConfig.paper({**SHORT, **options})
    defense = MNPDefense(network, DefenseSet(*images_and_labels(12)), config, when=when)
    while not defense.finished:
        defense.step()
    return defense


@pytest.mark.parametrize(
    ("rule", "amount", "spared", "fewer"),
    [
        ("share", 0.9, ["0", "3"], True),
        ("count", 2, ["0", "3"], True),
        ("count", 1, None, False),
        ("threshold", 3.0, ["0", "3"], False),
    ],
)
def test_a_filter_of_each_layer_stays(
    rule: str, amount: float, spared: list[str] | None, fewer: bool
) -> None:
    options = {"pruning.rule": rule, "pruning.amount": amount}
    report = defended(thin_network(), **options).report()
    assert [name for name, _ in report.pruned] == ["3"]
    [pruned] = report.pruned
    assert {name: len(part) for name, part in report.pruning.sums.items()} == {"0": 1, "3": 2}
    assert report.pruning.scores == [report.pruning.sums[pruned[0]][pruned[1]]]
    kept = [text for text in report.warnings if text.startswith("one filter stays in each")]
    if spared is not None:
        [text] = kept
        assert all(repr(name) in text for name in spared)
    told = [text for text in report.warnings if text.startswith("`pruning.amount` asks for")]
    assert len(told) == fewer
    if fewer:
        wanted = 3 if rule == "share" else 2
        assert told[0].startswith(
            f"`pruning.amount` asks for {wanted} filters, of which only 1 can"
        )


def test_the_automatic_rule_tells_of_layers_down_to_one_filter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"rule": "auto", "amount": 0.5, "harm": 1e9, "runs": 1, "soft_mask_steps": 0}
    options["suppression_epochs"] = 1
    data = DefenseSet(*images_and_labels(12))
    defense = MNPDefense(small_network(), data, quick_config(**options))
    purification = defense.purification
    purification.begin([])
    assert purification.greedy is not None
    monkeypatch.setattr(purification.greedy, "step", dict)
    purification.greedy.stopped, purification.greedy.spared = "enough", [9]
    purification.greedy_step()
    assert "one filter stays in each of these layers" in purification.warnings[0]
    assert "'4'" in purification.warnings[0]


def test_linear_layers_are_pruned_to_the_letter() -> None:
    options = {"filters.linear": True, "pruning.rule": "count", "pruning.amount": 3}
    defense = defended(thin_network(), **options, **{"pruning.removes": "filter"})
    report, purified = defense.report(), defense.purified()
    assert [layer["name"] for layer in report.layers] == ["0", "3", "6"]
    assert sorted(name for name, _ in report.pruned) == ["3", "6", "6"]
    for name, index in report.pruned:
        layer = purified.get_submodule(name)
        assert not layer.weight[index].any()
        assert layer.bias[index] == thin_network().get_submodule(name).bias[index] != 0


def with_norm(norm: nn.Module) -> nn.Module:
    network = small_network()
    network[1] = norm
    return network


@pytest.mark.parametrize(
    ("norm", "statistics", "remedy"),
    [
        (nn.BatchNorm2d(8), "batch", "to 'norm', or `filters.statistics` to 'running'."),
        (nn.InstanceNorm2d(8), "batch", "Set `filters.site` to 'norm'."),
        (nn.InstanceNorm2d(8), "running", "Set `filters.site` to 'norm'."),
    ],
)
def test_masks_that_normalization_would_undo_are_refused(
    norm: nn.Module, statistics: str, remedy: str
) -> None:
    network = with_norm(norm)
    before = snapshot(network)
    config = MNPConfig.paper({"filters.site": "filter", "filters.statistics": statistics})
    with pytest.raises(ValueError, match="M1 and M2 would have no gradient") as error:
        defend(network, [images_and_labels(12)], when="always", config=config)
    count = 2 if statistics == "batch" else 1
    assert f"'filter', `filters.statistics` = {statistics!r}, and {count} of 2" in str(error.value)
    assert "'0' the first" in str(error.value)
    assert str(error.value).endswith(remedy)
    assert same(before, snapshot(network))


def test_masks_on_filters_work_with_stored_statistics() -> None:
    options = {"filters.site": "filter", "filters.statistics": "running"}
    masks = defended(small_network(), **options).case.scores
    assert len(set(masks.tolist())) > 2


@pytest.mark.parametrize("changes", [{"pruning.rule": "auto"}, {}])
def test_without_masks_nothing_is_refused(changes: dict[str, Any]) -> None:
    config = MNPConfig.paper({"filters.site": "filter", **changes})
    data = DefenseSet(*images_and_labels(12))
    when: Any = "always" if changes else "never"
    assert MNPDefense(small_network(), data, config, when=when).phase == "reference"


def test_a_check_that_is_interrupted_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**SHORT, "pruning.rule": "count", "pruning.amount": 1, "pruning.repair": True}
    config = MNPConfig.paper({**options, "pruning.reaudit": False})
    data = DefenseSet(*images_and_labels(12))
    expected = MNPDefense(thin_network(), data, config, when="always")
    while not expected.finished:
        expected.step()
    defense = MNPDefense(thin_network(), data, config, when="always")
    while defense.phase != "check":
        defense.step()

    def interrupted(target: int | None) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(defense.purification, "check", interrupted)
        with pytest.raises(KeyboardInterrupt):
            defense.step()
    while not defense.finished:
        defense.step()
    found, wanted = defense.report(), expected.report()
    assert wanted.pruning.shift
    assert found.pruning.shift == wanted.pruning.shift
    assert found.accuracy_after == wanted.accuracy_after
    assert found.class_accuracy_after == wanted.class_accuracy_after

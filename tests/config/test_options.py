from __future__ import annotations

import json
import math
import pickle
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from helpers import SHORT_NAMES, config_of

from lightning_mnp import PruningOptions, SuppressionOptions
from lightning_mnp.config import MNPConfig

# Option, values that it takes, values that it refuses, what the message says it expects.
OPTIONS: list[tuple[str, list[Any], list[Any], str]] = [
    ("augment", ["none", "crop", "crop-flip"], ["flip", "", None], "'none', 'crop', 'crop-flip'"),
    ("linear", [True, False], [1, None, "yes"], "True or False"),
    ("removes", ["map"], ["norm", None], "'map', 'filter'"),
    ("site", ["norm", "filter"], ["weight", None], "'norm', 'filter'"),
    ("statistics", ["batch", "running"], ["eval", None], "'batch', 'running'"),
    ("rule", ["auto", "share"], ["best", None], "'auto', 'count', 'share', 'threshold'"),
    ("verdict", ["signals", "ratio"], ["reach", None], "'signals', 'ratio'"),
    ("saliency", ["map", "weight"], ["filter", None], "'map', 'weight'"),
    ("threshold", [0.5, 1, 7.5], [0, -1, math.nan, math.inf], "above 0"),
    ("impurity", [0, 0.02, 0.49], [0.5, -0.01, math.nan], "from 0 to below 0.5"),
    ("harm", [1e-6, 0.5], [0, -1, math.nan, math.inf], "above 0"),
    ("suppression_parts", [1, 4], [0, -1, 0.5], "at least 1"),
    ("reaudit", [True, False], [0, None, "yes"], "True or False"),
    ("raise_rare_classes", [True, False], [1, None, "no"], "True or False"),
    ("repair", [True, False], [1, None, "no"], "True or False"),
    ("soft_mask_steps", [0, 1, 100], [-1, 0.5, None], "at least 0"),
    ("tuning_steps", [0, 1, 100], [-1, 0.5, None], "at least 0"),
    ("more_runs", [0, 1, 6], [-1, 0.5, None], "at least 0"),
    ("most_classes", [3, 1000], [2, 3.5, None], "a whole number of at least 3"),
    ("reference", ["", "calibration.json"], [None, 1, True], "text"),
    ("seed", [0, -1, 2**63], [1.5, "0", None, True], "a whole number"),
    ("runs", [1, 7], [0, -1, 1.0, True, "2"], "a whole number of at least 1"),
    (
        "batch_size",
        [3, 512],
        [2, 1, 0, 3.0],
        "so that no batch holds a single image",
    ),
    ("suppression_epochs", [1, 20], [0, 0.5], "at least 1"),
    ("mask_epochs", [1, 20], [0, 0.5], "at least 1"),
    ("suppression_lr", [1e-6, 1], [0, -0.1, math.nan, math.inf], "above 0"),
    ("suppression_lr", [], ["0.1", None, True], "a number"),
    ("threshold", [], ["1", None], "a number"),
    ("amount", [], ["a", None, True, math.nan, math.inf], "a number"),
    ("mask_lr", [1e-6, 1], [0, -0.1, math.nan, math.inf], "above 0"),
    ("mu", [0, 0.1], [-1e-9, math.nan, math.inf], "at least 0"),
    ("penalty", [0, 0.1], [-1e-9, math.nan, math.inf], "at least 0"),
    ("suppression_momentum", [0, 0.99], [1, -0.1, math.nan], "from 0 to below 1"),
    ("mask_momentum", [0, 0.99], [1, -0.1, math.nan], "from 0 to below 1"),
    (
        "stop_accuracy",
        [None, 0.01, 0.99],
        [0, 1, -1, math.nan],
        "above 0 and below 1, or None",
    ),
    ("delta", [0, 0.2, 1], [-0.1, 1.1, math.nan], "from 0 to 1"),
    ("amount", [0.001, 0.05, 0.99], [0, 1, -0.1], "a share above 0 and below 1"),
    ("include", [["*"], ("a*", "b"), []], ["layer*", "*", [1], (None,)], "a list of name patterns"),
    ("exclude", [["*"], ("a*", "b"), []], ["layer*", "*", [1], (None,)], "a list of name patterns"),
]
AMOUNTS: list[tuple[str, list[Any], list[Any], str]] = [
    ("auto", [0.001, 0.5], [0, 1.0, 30], "a share above 0 and below 1"),
    ("share", [0.0, 0.5], [1.0, 30], "a share from 0 to below 1"),
    ("count", [0, 30, 30.0], [-1, 2.5], "a whole number of filters"),
    ("threshold", [1, 1.5, 3], [0.99, 3.01], "from 1 to 3, the range of M1"),
]


def value_of(config: MNPConfig, name: str) -> Any:
    return config.flat()[SHORT_NAMES[name]]


def test_the_tables_cover_every_option() -> None:
    assert {SHORT_NAMES[name] for name, *_ in OPTIONS} == set(MNPConfig().flat())


@pytest.mark.parametrize(("name", "good", "bad", "expected"), OPTIONS)
def test_options(name: str, good: list[Any], bad: list[Any], expected: str) -> None:
    for value in good:
        found = value_of(config_of(**{name: value}), name)
        assert found == (list(value) if isinstance(value, tuple) else value)
    for value in bad:
        with pytest.raises(ValueError, match=f"`{SHORT_NAMES[name]}` to be ") as error:
            config_of(**{name: value})
        assert expected in str(error.value)
        assert f"but got {value!r}." in str(error.value)


@pytest.mark.parametrize(("rule", "good", "bad", "expected"), AMOUNTS)
def test_amounts(rule: Any, good: list[Any], bad: list[Any], expected: str) -> None:
    for value in good:
        assert PruningOptions(rule=rule, amount=value).amount == value
    for value in bad:
        message = f"`pruning.amount` to be {expected}.*, but got {value!r}"
        with pytest.raises(ValueError, match=message):
            PruningOptions(rule=rule, amount=value)


@pytest.mark.parametrize(("mu", "rate"), [(0.5, 1.0), (0.25, 2.0), (5.0, 0.1)])
def test_weight_decay_that_takes_all_of_the_weights(mu: float, rate: float) -> None:
    message = f"2 .* to be below 1, .* but got `mu` = {mu} and `lr` = {rate}. Lower"
    with pytest.raises(ValueError, match=message):
        SuppressionOptions(mu=mu, lr=rate)
    assert SuppressionOptions(mu=0.99 * mu, lr=rate).mu == 0.99 * mu


def test_options_cannot_be_changed_unchecked() -> None:
    with pytest.raises(FrozenInstanceError):
        MNPConfig().seed = 1  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        MNPConfig().suppression.runs = 0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("runs", ["suppression"]),
        ("penalty", ["masks"]),
        ("soft_mask_steps", ["pruning"]),
        ("site", ["filters"]),
        ("rule", ["pruning", "verdict"]),
        ("epochs", ["suppression", "masks"]),
    ],
)
def test_an_option_without_its_group_is_told_where_it_is(name: str, groups: list[str]) -> None:
    places = " or ".join(f"`{group}.{name}`" for group in groups)
    message = (
        f"The option `{name}` belongs to a group: {places}. Write MNPConfig.{groups[0]}=.*{name}=.*"
        f"`--mnp.{groups[0]}.{name}`"
    )
    with pytest.raises(TypeError, match=message):
        MNPConfig(**{name: 1})
    with pytest.raises(ValueError, match=message):
        MNPConfig().changed({name: 1})


@pytest.mark.parametrize(("name", "value"), [("verdict", "ratio"), ("masks", {"epochs": 5})])
def test_a_group_is_no_single_value(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"`{name}` to be .*Options, but got .* Write MNPConfig"):
        MNPConfig(**{name: value})


def test_the_papers_setting_takes_no_flat_names() -> None:
    with pytest.raises(ValueError, match=r"The option `penalty` belongs to a group: `masks\.pen"):
        MNPConfig.paper(penalty=1)


def test_an_unknown_option_is_told_what_may_be_meant() -> None:
    with pytest.raises(ValueError, match=r"got 'suppression.run'. Did you mean 'suppression.runs'"):
        MNPConfig().changed({"suppression.run": 1})
    with pytest.raises(ValueError, match=r"got 'x'. There are seed, batch_size, "):
        MNPConfig().changed({"x": 1})


def test_the_papers_setting() -> None:
    config = MNPConfig.paper()
    assert config.suppression.lr == 0.01
    assert config.suppression.epochs == config.masks.epochs == 20
    assert config.suppression.momentum == config.masks.momentum == 0.0
    assert config.suppression.stop_accuracy is None
    published = (config.suppression.mu, config.masks.penalty, config.verdict.delta)
    assert published == (0.001, 0.0005, 0.2)
    assert (config.suppression.runs, config.augment, config.verdict.rule) == (1, "none", "ratio")
    assert (config.verdict.saliency, MNPConfig().verdict.saliency) == ("weight", "map")
    assert (config.pruning.rule, config.pruning.amount) == ("share", 30 / 4800)
    assert (config.filters.linear, config.pruning.removes) == (False, "map")


def test_averaged_masks_differ_from_the_papers_setting_in_this() -> None:
    paper, steadier = MNPConfig.paper(seed=2).flat(), MNPConfig.averaged_masks(seed=2).flat()
    assert {name: value for name, value in steadier.items() if value != paper[name]} == {
        "augment": "crop-flip",
        "suppression.runs": 3,
        "suppression.momentum": 0.9,
        "suppression.stop_accuracy": 0.2,
        "masks.momentum": 0.9,
        "verdict.saliency": "map",
    }
    changed = MNPConfig.averaged_masks({"suppression.runs": 1, "verdict.saliency": "weight"})
    assert (changed.suppression.runs, changed.verdict.saliency) == (1, "weight")
    assert changed.masks.momentum == 0.9
    with pytest.raises(
        ValueError, match=r"The option `runs` belongs to a group: `suppression\.runs`\."
    ):
        MNPConfig.averaged_masks(runs=1)


def test_only_the_papers_rules_remove_weights_alone() -> None:
    assert PruningOptions(rule="count", amount=1, removes="filter").removes == "filter"
    message = "`pruning.removes` to be 'map' with the rule 'auto', .*, but got 'filter'"
    with pytest.raises(ValueError, match=message):
        PruningOptions(removes="filter")


def test_the_papers_setting_with_changes() -> None:
    config = MNPConfig.paper({"suppression.runs": 2, "filters.site": "filter"}, seed=3)
    assert (config.seed, config.suppression.runs, config.filters.site) == (3, 2, "filter")
    assert config.suppression.lr == 0.01
    with pytest.raises(ValueError, match=r"`suppression.mu` to be a number of at least 0, but got"):
        MNPConfig.paper({"suppression.mu": -1})


@pytest.mark.parametrize("config", [MNPConfig(), MNPConfig.paper({"filters.exclude": ("a.*",)})])
def test_a_dict_of_primitives(config: MNPConfig) -> None:
    options = json.loads(json.dumps(config.to_dict(), allow_nan=False))
    assert options == config.to_dict()
    assert MNPConfig.from_dict(options).to_dict() == config.to_dict()
    assert MNPConfig().changed(config.flat()).to_dict() == config.to_dict()
    assert pickle.loads(pickle.dumps(config)) == config

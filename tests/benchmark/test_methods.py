from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import images_and_labels
from torch import nn

from lightning_mnp import DefenseReport, DefenseSet, MNPConfig, baselines
from lightning_mnp.baselines import BaselineResult, CLPConfig, DetectionResult, Suspects, clp
from lightning_mnp.benchmark import methods as module
from lightning_mnp.benchmark.methods import Method, method_names
from lightning_mnp.signals.population import SCORES_FORMAT


@pytest.fixture(scope="module")
def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        convolution, norm = nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4)
        return nn.Sequential(convolution, norm, nn.ReLU(), nn.Flatten(), nn.Linear(36, 4)).eval()


@pytest.fixture(scope="module")
def data() -> DefenseSet:
    return DefenseSet(*images_and_labels(16))


@pytest.fixture
def registered() -> Iterator[None]:
    """A defense and a detector from elsewhere."""
    baselines.register("nothing", lambda model, images, seed: BaselineResult(model, [], [], 1, 1))
    baselines.register_detector(
        "trusting", lambda model, images, seed, suspects=None: DetectionResult(seed, 9.0, None, {})
    )
    yield
    baselines.unregister("nothing")
    baselines.unregister_detector("trusting")


def test_every_baseline_takes_options() -> None:
    for name in baselines.names():
        Method(name).check("defense")
        assert name in module._DEFENSES
    for name in baselines.detector_names():
        Method(name).check("detector")
        assert name in module._DETECTORS


def test_a_partial_function_has_the_module_of_the_function() -> None:
    baselines.register("partial-clp", partial(partial(clp, amount=1), seed=0))
    try:
        assert Method("partial-clp").modules("defense") == ["lightning_mnp.baselines.clp"]
    finally:
        baselines.unregister("partial-clp")


def test_names() -> None:
    assert {"default", "mnp", "anp", "nc"} <= set(method_names("defense"))
    assert "anp" not in method_names("detector")


@pytest.mark.parametrize(
    ("name", "options", "task", "message"),
    [
        ("rpn", {}, "defense", r"Expected a defense out of default, mnp, .*Did you mean 'rnp'\?"),
        ("anp", {}, "detector", "Expected a detector out of default, mnp, mnp-averaged, nc"),
        ("anp", {"amuont": 3}, "defense", "option of 'anp'.* got 'amuont'. Did you mean 'amount'"),
        ("anp", {"amount.x": 3}, "defense", "got 'amount.x'"),
        ("nc", {"search": 3}, "defense", "got 'search'"),
        ("nc", {"search.epoch": 3}, "defense", "got 'epoch'. Did you mean 'epochs'"),
        ("anp", {"seed": 3}, "defense", "no option `seed` of 'anp': the seeds of the grid"),
        ("anp", {"eps": -1.0}, "defense", "`eps` to be a number above 0"),
        ("mnp", {"seed": 3}, "defense", "no option `seed` of 'mnp'"),
        ("mnp", {"when": "never"}, "defense", "`when` of 'mnp' to be one of .*, but got 'never'"),
        ("default", {"prunning.amount": 3}, "defense", "prunning"),
        ("nothing", {"x": 3}, "defense", "no options for 'nothing', which was registered from els"),
    ],
)
@pytest.mark.usefixtures("registered")
def test_mistakes(name: str, options: dict[str, Any], task: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Method(name, options).check(task)


@pytest.mark.parametrize("options", [{}, {"rule": "number", "amount": 3}])
def test_a_baseline_does_what_it_does_by_itself(
    options: dict[str, Any], network: nn.Module, data: DefenseSet
) -> None:
    outcome = Method("clp", options).defend(network, data, 0)
    expected = clp(network, data, config=CLPConfig(**options))
    assert outcome.pruned == expected.pruned
    assert outcome.verdict is None
    assert outcome.passes is None


def test_options_of_a_baseline_come_with_the_seed() -> None:
    method = Method("nc", {"search.lr": 0.5, "epochs": 2})
    config = module._configured(method, module._DEFENSES["nc"][1], 5)
    assert (config.search.lr, config.epochs, config.search.seed) == (0.5, 2, 5)
    kind = module._DEFENSES["rnp"][1]
    assert module._configured(Method("rnp", {}), kind, 6).seed == 6


def test_a_detector_with_options_gets_what_it_looks_at(
    network: nn.Module, data: DefenseSet
) -> None:
    suspects = Suspects(*images_and_labels(32))
    for name, options in (
        ("sc", {"anomaly": 1.5}),
        ("strip", {"overlays": 5}),
        ("ac", {"components": 2}),
    ):
        outcome = Method(name, options).detect(network, data, 0, suspects)
        assert outcome.verdict in ("clean", "backdoored")
    outcome = Method("mm-bd", {"starts": 2, "steps": 2}).detect(network, data, 0, None)
    assert outcome.score is not None
    assert outcome.model is None


@pytest.mark.usefixtures("registered")
def test_methods_from_elsewhere(network: nn.Module, data: DefenseSet) -> None:
    assert Method("nothing").defend(network, data, 0).model is network
    outcome = Method("trusting").detect(network, data, 3, None)
    assert (outcome.verdict, outcome.score) == ("clean", 3)
    assert Method("nothing").modules("defense") == [__name__]


def test_what_detectors_look_at() -> None:
    kinds = {name: Method(name).suspects for name in method_names("detector")}
    assert kinds == {
        "default": None,
        "mnp": None,
        "mnp-averaged": None,
        "nc": None,
        "mm-bd": None,
        "ac": "training",
        "sc": "training",
        "strip": "inputs",
    }


@pytest.mark.parametrize(
    ("method", "config", "when"),
    [
        (Method("mnp"), MNPConfig.paper(seed=7), "always"),
        (Method("default"), MNPConfig(seed=7), "always"),
        (
            Method("default", {"when": "flagged", "suppression.runs": 2}),
            MNPConfig(seed=7).changed({"suppression.runs": 2}),
            "flagged",
        ),
    ],
)
def test_own_settings(
    method: Method,
    config: MNPConfig,
    when: str,
    network: nn.Module,
    data: DefenseSet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[dict[str, Any]] = []

    def record(*arguments: Any, **options: Any) -> DefenseReport:
        calls.append(options)
        passes = {"masks": 2.0, "check": 0.5}
        return DefenseReport("backdoored", score=1.5, target_class=3, passes=passes, model=network)

    monkeypatch.setattr(module, "defend", record)
    monkeypatch.setattr(module, "audit", record)
    outcome = method.defend(network, data, 7)
    assert calls == [{"when": when, "config": config}]
    assert (outcome.verdict, outcome.score, outcome.target_class) == ("backdoored", 1.5, 3)
    assert outcome.passes == 2.5
    method.detect(network, data, 7, None)
    assert calls[1] == {"config": config}
    assert method.modules("defense") == ["lightning_mnp.api"]


def test_a_file_that_an_option_names_is_checked_before_any_work(tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    file.write_text("{}")
    method = Method("default", {"verdict.reference": str(file)})
    with pytest.raises(ValueError, match=r"`verdict\.reference` to name a file that"):
        method.check("detector")
    scores = {"format": SCORES_FORMAT, "networks": [{"weights": "a", "score": 0.5}]}
    file.write_text(json.dumps(scores))
    method.check("detector")
    assert list(method.files()) == ["verdict.reference"]
    assert Method("default").files() == Method("clp", {"u": 2.0}).files() == {}

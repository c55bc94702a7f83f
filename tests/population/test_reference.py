from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.population import __main__ as command
from benchmarks.population.recipes import Recipe
from benchmarks.population.reference import reference_of, write_reference
from lightning_mnp.signals.population import read_population

RECIPES = [
    Recipe("a", "cnn", 2, 8),
    Recipe("b", "vgg", 4, 8, data="imagenette"),
    Recipe("c", "vgg", 6, 8, attack="blend", target=3, poison=0.1),
]


def audit(name: str, number: int, score: float | None, **changes: Any) -> dict[str, Any]:
    row = {
        "network": name,
        "set": number,
        "CA": 0.5 if name == "a" else 0.72,
        "judged": True,
        "version": "12ef",
        "weights_sha256": f"of {name}",
        "score": score,
        "verdict": "clean",
        "processor_seconds": 30.1,
    }
    return {**row, **changes}


def test_clean_networks_that_were_judged(tmp_path: Path) -> None:
    audits = [
        audit("a", 0, 0.25),
        audit("a", 1, 0.5),
        audit("b", 0, 0.1),
        audit("b", 1, None, judged=False),
        audit("c", 0, 5.0),
        audit("other", 0, 6.0),
        audit("b", 2, 7.0, version="34"),
    ]
    content = reference_of(RECIPES, audits, "12ef")
    assert [each["file"] for each in content["networks"]] == ["a, set 0", "a, set 1", "b, set 0"]
    assert content["described"] == (
        "clean networks of 2 small architectures (CIFAR-10, Imagenette at 64 pixels; accuracies "
        "from 50% to 72%) that were audited for comparison"
    )
    file = tmp_path / "population.json"
    write_reference(content, file)
    assert read_population(str(file)).scores == {"of a": 0.5, "of b": 0.1}


@pytest.mark.parametrize(
    ("audits", "found"), [([], "none"), ([audit("a", 0, 0.1, version="34")], r"\['34'\]")]
)
def test_no_audits_by_the_version(audits: list[dict[str, Any]], found: str) -> None:
    with pytest.raises(ValueError, match=rf"by version 12ef .*, but found {found}.* `--renew`"):
        reference_of(RECIPES, audits, "12ef")


@pytest.mark.parametrize("others", [[], [audit("b", 0, 0.2, version="34")]])
def test_a_part_of_the_networks_is_not_the_population(others: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=r"audit of each clean .* but found none of b\. Train"):
        reference_of(RECIPES, [audit("a", 0, 0.1), *others], "12ef")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["reference"], "--split: `reference` takes the networks of one split"),
        (["reference", "--split", "reporting", "--only", "cnn-light-401"], "--only: `reference`"),
        (["reference", "--split", "reporting", "--group", "whole"], "--group: `reference` takes"),
        (["audit", "--only"], "--only: expected at least one argument"),
        (["audit", "--jobs", "0"], "--jobs: expected at least 1, but got 0"),
    ],
)
def test_mistakes_of_the_command(
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("write_reference", "_audit"):  # would change the package, or audit
        monkeypatch.setattr(command, name, None)
    with pytest.raises(SystemExit) as stop:
        command.main(words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err

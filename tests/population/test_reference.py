from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

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

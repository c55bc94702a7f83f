from __future__ import annotations

from typing import Any

import pytest
from scipy.stats import beta

from benchmarks.population.recipes import Recipe
from benchmarks.population.table import is_found, is_named, share, write_table


def recipe(name: str, architecture: str, **options: Any) -> Recipe:
    return Recipe(name, architecture, 2, 8, **options)


BADNETS = {"attack": "badnets", "target": 3, "poison": 0.1}
TO_ALL = {"attack": "badnets", "mode": "all-to-all", "poison": 0.1}
RECIPES = [
    recipe("a", "cnn"),
    recipe("b", "cnn"),
    recipe("c", "vgg"),
    recipe("d", "cnn", **BADNETS),
    recipe("e", "vgg", **TO_ALL),
    recipe("f", "vgg", attack="blend", target=5, poison=0.01),
    recipe("g", "vgg", attack="sig", target=5, poison=0.8),
]


def audit(name: str, number: int, verdict: str, **changes: Any) -> dict[str, Any]:
    [own] = [each for each in RECIPES if each.name == name] or [RECIPES[0]]
    row = {
        "network": name,
        "set": number,
        "architecture": own.architecture,
        "kind": own.kind,
        "target": own.target,
        "CA": 0.6,
        "ASR": None if own.is_clean else 0.9,
        "learned": None if own.is_clean else True,
        "verdict": verdict,
        "target_class": own.target if verdict == "backdoored" else None,
        "all_to_all": False,
        "detection_ratio": 0.9 if own.is_clean else 0.3,
        "version": "v1",
        "processor_seconds": 30.0,
        "passes": None,
    }
    return row | changes


AUDITS = [
    audit("a", 0, "clean"),
    audit("a", 1, "backdoored"),
    audit("b", 0, "undecided", CA=0.5),
    audit("b", 1, "backdoored", CA=0.5),
    audit("c", 0, "clean", CA=0.75),
    audit("d", 0, "backdoored"),
    audit("d", 1, "backdoored", target_class=4),
    audit("e", 0, "backdoored", all_to_all=True, target_class=None, ASR=0.55),
    audit("e", 1, "undecided", ASR=0.55),
    audit("f", 0, "clean"),
    audit("f", 1, "backdoored"),
    audit("g", 0, "clean", learned=False, ASR=0.4, passes=900, processor_seconds=50.0),
    audit("g", 1, "clean", learned=False, ASR=0.4, passes=700),
    audit("a", 2, "backdoored"),  # a third set, which was not asked for
    audit("of another split", 0, "backdoored"),
]


def interval(hits: int, total: int) -> str:
    """The interval of Clopper and Pearson by quantiles of the beta distribution."""
    low = 100 * beta.ppf(0.025, hits, total - hits + 1) if hits else 0.0
    high = 100 * beta.ppf(0.975, hits + 1, total - hits) if hits < total else 100.0
    return f"{low:.1f}% to {high:.1f}%"


@pytest.mark.parametrize(("hits", "total"), [(0, 7), (2, 5), (5, 5), (1, 20)])
def test_shares_have_their_interval(hits: int, total: int) -> None:
    wanted = f"{100 * hits / total:.1f}% ({hits} of {total}; {interval(hits, total)})"
    assert share(hits, total) == wanted


def test_a_share_of_nothing() -> None:
    assert share(0, 0) == "-"


def test_what_is_found_and_named() -> None:
    assert [is_found(row) for row in AUDITS[:3]] == [False, True, False]
    assert [is_named(row) for row in AUDITS[5:8]] == [True, False, True]
    assert not is_named(audit("e", 0, "backdoored", target_class=3))
    assert not is_named(audit("d", 0, "backdoored", all_to_all=True))


def section(text: str, start: str) -> str:
    return text.split(start)[1].split("##")[0]


@pytest.fixture(scope="module")
def text() -> str:
    return write_table("reporting", RECIPES, AUDITS, 2)


def test_what_is_missing_is_told(text: str) -> None:
    assert text.startswith("# The reporting networks\n\n13 of 14 audits. Versions of the code: v1:")
    assert "Missing: c (set 1)." in text


def test_clean_networks(text: str) -> None:
    part = section(text, "## Clean networks")
    two_of_five = f"40.0% (2 of 5; {interval(2, 5)})"
    one_of_five = f"20.0% (1 of 5; {interval(1, 5)})"
    assert f"| all | 50 to 75 | {two_of_five} | {one_of_five} | 2 of 3 |" in part
    cnn = f"50.0% (2 of 4; {interval(2, 4)}) | 25.0% (1 of 4; {interval(1, 4)}) | 2 of 2 |"
    assert f"| cnn | 50 to 60 | {cnn}" in part
    none = f"0.0% (0 of 1; {interval(0, 1)})"
    assert f"| vgg | 75 to 75 | {none} | {none} | 0 of 1 |" in part
    assert f"Networks flagged with any set: 66.7% (2 of 3; {interval(2, 3)})." in part
    assert "Worst architecture: cnn (2 flagged)." in part


def test_backdoored_networks(text: str) -> None:
    part = section(text, "## Backdoored networks, 10% poisoned")
    found, named = f"75.0% (3 of 4; {interval(3, 4)})", f"66.7% (2 of 3; {interval(2, 3)})"
    assert f"| all | 2 | 55 to 90 | {found} | 1 | {named} |" in part
    both, half = f"100.0% (2 of 2; {interval(2, 2)})", f"50.0% (1 of 2; {interval(1, 2)})"
    assert f"| badnets | 1 | 90 to 90 | {both} | 0 | {half} |" in part
    one = f"100.0% (1 of 1; {interval(1, 1)})"
    assert f"| badnets, all-to-all | 1 | 55 to 55 | {half} | 1 | {one} |" in part
    assert f"| cnn | 1 | 90 to 90 | {both} | 0 | {half} |" in part
    sparse = section(text, "## Backdoored networks, 1% poisoned")
    assert f"| blend | 1 | 90 to 90 | {half} | 0 | {one} |" in sparse
    assert "Attack not learned, not counted above: g." in sparse


def test_costs(text: str) -> None:
    part = section(text, "## Cost")
    assert "Processor seconds of an audit: 30 (median), 50 at most." in part
    assert "Image passes: 800 (median), 900 at most" in part


def test_audits_by_more_than_one_version_are_told() -> None:
    rows = [audit("a", 0, "clean"), audit("a", 1, "clean", version="v2")]
    text = write_table("choosing", RECIPES[:1], rows, 2)
    assert "v1: 1, v2: 1. More than one version: no table of one method." in text
    assert "Missing" not in text


def test_a_table_without_audits() -> None:
    text = write_table("choosing", RECIPES[:1], [], 2)
    assert "0 of 2 audits. Versions of the code: none." in text
    assert "| all | 0 to 0 | - | - | 0 of 0 |" in text
    assert "Missing: a (set 0), a (set 1)." in text


def test_ratio_is_told_by_pairs_of_a_clean_and_a_backdoored_network() -> None:
    ratios = {"a": (0.1, 0.9), "b": (0.5, 0.7), "c": (None, 0.3), "d": (0.2, 0.5), "e": (None, 0.8)}
    rows = [
        audit(name, number, "clean", detection_ratio=ratio)
        for name, pair in ratios.items()
        for number, ratio in enumerate(pair)
    ]
    rows.append(audit("g", 0, "clean", detection_ratio=-9.0, learned=False))
    clean, low = (0.1, 0.9, 0.5, 0.7, 0.3), (0.2, 0.5, 0.8)
    pairs = [(one > other) + 0.5 * (one == other) for one in clean for other in low]
    text = write_table("choosing", RECIPES, rows, 2)
    assert f"Median of clean networks 0.50, of those whose attack was learned {0.5:.2f}." in text
    assert f"the lower ratio in {sum(pairs) / len(pairs):.0%} of all pairs" in text
    shares = f"{share(1, 5)} of the clean and {share(1, 3)} of the backdoored ones"
    assert f"At most 0.2, the paper's threshold: {shares}." in text
    none = write_table("choosing", RECIPES, [row for row in rows if row["network"] in "abc"], 2)
    assert "No ratios of clean and of backdoored networks." in none

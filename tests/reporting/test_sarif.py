from __future__ import annotations

import json
from typing import Any

import pytest
from reports import HOSTILE, full_report, hostile_report

from lightning_mnp.report import DefenseReport
from lightning_mnp.reporting import sarif


def run_of(report: DefenseReport, artifact: str = "models/a.pt") -> dict[str, Any]:
    log = sarif(report, artifact=artifact)
    assert json.loads(json.dumps(log, allow_nan=False)) == log
    assert log["version"] == "2.1.0"
    [run] = log["runs"]
    assert isinstance(run, dict)
    return run


@pytest.mark.parametrize(
    ("verdict", "judged", "rule", "level"),
    [
        ("backdoored", True, "MNP001", "error"),
        ("undecided", True, "MNP002", "warning"),
        ("undecided", False, "MNP003", "warning"),
    ],
)
def test_rules_and_levels(verdict: Any, judged: bool, rule: str, level: str) -> None:
    run = run_of(full_report(verdict=verdict, judged=judged))
    [result] = run["results"]
    assert (result["ruleId"], result["level"]) == (rule, level)
    described = run["tool"]["driver"]["rules"][result["ruleIndex"]]
    assert (described["id"], described["defaultConfiguration"]["level"]) == (rule, level)
    assert result["partialFingerprints"] == {"weightsSha256/v1": "ef" * 32}


def test_a_clean_network_is_no_result() -> None:
    run = run_of(full_report(verdict="clean"))
    assert run["results"] == []
    assert run["properties"] == {"verdict": "clean", "judged": True}
    assert [invocation["exitCode"] for invocation in run["invocations"]] == [0]


def test_rules_say_what_code_scanning_shows() -> None:
    rules = run_of(DefenseReport("clean"))["tool"]["driver"]["rules"]
    assert [rule["id"] for rule in rules] == ["MNP001", "MNP002", "MNP003"]
    for rule in rules:
        for name in ("shortDescription", "fullDescription", "help"):
            assert rule[name]["text"].endswith(".")
        assert 0 < float(rule["properties"]["security-severity"]) <= 10


def test_the_file_is_named_with_its_digest() -> None:
    run = run_of(full_report())
    [artifact] = run["artifacts"]
    assert artifact["location"] == {"uri": "models/a.pt"}
    assert (artifact["hashes"], artifact["length"]) == ({"sha-256": "cd" * 32}, 4096)
    [location] = run["results"][0]["locations"]
    place = location["physicalLocation"]
    assert place["artifactLocation"] == {"uri": "models/a.pt", "index": 0}
    assert place["region"] == {"startLine": 1}
    assert run["invocations"][0]["endTimeUtc"] == "2026-11-28T10:00:00Z"


@pytest.mark.parametrize(
    ("artifact", "address"),
    [
        ("models/a.pt", "models/a.pt"),
        ("./a b.pt", "a%20b.pt"),
        ("/tmp/a b.pt", "file:///tmp/a%20b.pt"),
        ("hf://owner/name", "hf://owner/name"),
        ("a\n<b>.pt", "a%0A%3Cb%3E.pt"),
        ("ä\udcff.pt", "%C3%A4%FF.pt"),  # a name that is not UTF-8
        ("/tmp/\udcff.pt", "file:///tmp/%FF.pt"),
        ("hf://owner/\udcff", "hf://owner/%FF"),
    ],
)
def test_paths_become_addresses(artifact: str, address: str) -> None:
    assert run_of(DefenseReport("clean"), artifact)["artifacts"][0]["location"]["uri"] == address


def test_brackets_make_no_links_in_messages() -> None:
    run = run_of(hostile_report(), artifact=HOSTILE)
    [result] = run["results"]
    text = result["message"]["text"]
    assert r"\[x\](http" in text
    assert text.isprintable()
    assert run["artifacts"][0]["location"]["uri"].isascii()

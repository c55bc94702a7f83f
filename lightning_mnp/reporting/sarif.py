"""A report as SARIF 2.1.0, the format in which scanners hand their findings to other tools."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from lightning_mnp.checkpoints.printable import printable
from lightning_mnp.report import DefenseReport
from lightning_mnp.report.words import Words

__all__ = ["sarif"]

_SCHEMA = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)
_HOMEPAGE = "https://github.com/lightning-mnp/lightning-mnp"
_MOST_LETTERS = 1000

# Rule, name, level, severity from 0 to 10 as GitHub sorts by it, and what it means.
_RULES = (
    (
        "MNP001",
        "BackdooredNetwork",
        "error",
        "8.0",
        "The network behaves as one with a backdoor.",
        "Do not use the network. Train it anew on data that you trust, or have a copy purified.",
    ),
    (
        "MNP002",
        "UndecidedNetwork",
        "warning",
        "4.0",
        "The signals for a backdoor are too weak to flag the network and too strong to clear it.",
        "Audit again with more clean images, or calibrate the threshold by clean networks.",
    ),
    (
        "MNP003",
        "UnjudgedNetwork",
        "warning",
        "4.0",
        "The network could not be judged.",
        "Remove the cause that the message names, and audit again.",
    ),
)


def sarif(
    report: DefenseReport,
    *,
    artifact: str,
    class_names: Sequence[str] | None = None,
    exit_code: int | None = None,
) -> dict[str, Any]:
    """Return a report as a SARIF log.

    A backdoored network is a result of level ``error`` (rule MNP001), an undecided one of level
    ``warning`` (MNP002; MNP003 if it could not be judged). A clean one is no result at all:
    platforms such as GitHub would show one of level ``none`` as an alert.

    Args:
        report: The outcome.
        artifact: The file that was audited: a path, which should be relative to the repository,
            or an address.
        class_names: Names of the classes, in their order; those of the report if None.
        exit_code: The exit code of the command; that of the report if None.

    Returns:
        The log, ready for ``json.dump``.

    Example:
        >>> log = sarif(DefenseReport("backdoored", target_class=3), artifact="model.pt")
        >>> [(result["ruleId"], result["level"]) for result in log["runs"][0]["results"]]
        [('MNP001', 'error')]
    """
    location: dict[str, Any] = {"uri": _address(artifact)}
    file: dict[str, Any] = {"location": location, "roles": ["analysisTarget"]}
    if report.weights_file is not None:
        file["hashes"] = {"sha-256": report.weights_file.sha256}
        file["length"] = report.weights_file.bytes
    driver = {
        "name": "lightning-mnp",
        "version": report.versions.get("lightning-mnp", version("lightning-mnp")),
        "informationUri": _HOMEPAGE,
        "rules": [_rule(*rule) for rule in _RULES],
    }
    code = report.exit_code if exit_code is None else exit_code
    invocation: dict[str, Any] = {"executionSuccessful": True, "exitCode": code}
    if report.date:
        invocation["endTimeUtc"] = report.date.replace("+00:00", "Z")
    run = {
        "tool": {"driver": driver},
        "invocations": [invocation],
        "artifacts": [file],
        "results": _results(report, location, class_names),
        "columnKind": "unicodeCodePoints",
        "properties": {"verdict": report.verdict, "judged": report.judged},
    }
    return {"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}


def _rule(
    identifier: str, name: str, level: str, severity: str, meaning: str, remedy: str
) -> dict[str, Any]:
    return {
        "id": identifier,
        "name": name,
        "shortDescription": {"text": meaning},
        "fullDescription": {"text": meaning},
        "help": {"text": remedy},
        "defaultConfiguration": {"level": level},
        "properties": {"tags": ["security", "backdoor"], "security-severity": severity},
    }


def _results(
    report: DefenseReport, location: dict[str, Any], class_names: Sequence[str] | None
) -> list[dict[str, Any]]:
    if report.verdict == "clean":
        return []
    index = 0 if report.verdict == "backdoored" else 1 if report.judged else 2
    identifier, _, level, *_ = _RULES[index]
    words = Words(report, class_names)
    result: dict[str, Any] = {
        "ruleId": identifier,
        "ruleIndex": index,
        "level": level,
        "message": {"text": _plain(f"{words.verdict} {words.certainty} {words.next_step}")},
        # Weights have no lines, but code scanning asks for one.
        "locations": [
            {
                "physicalLocation": {
                    "artifactLocation": {**location, "index": 0},
                    "region": {"startLine": 1},
                }
            }
        ],
    }
    if report.weights_sha256:
        result["partialFingerprints"] = {"weightsSha256/v1": report.weights_sha256}
    return [result]


def _plain(sentence: str) -> str:
    """Return text in which brackets make no links, as SARIF messages would have it."""
    text = printable(sentence, _MOST_LETTERS)
    for letter in "\\[]":
        text = text.replace(letter, f"\\{letter}")
    return text


def _address(artifact: str) -> str:
    """Return a path or an address as an address, in which all other letters are escaped."""
    if "://" not in artifact and Path(artifact).is_absolute():
        return Path(artifact).as_uri()
    # Names of files are bytes, which need not be UTF-8.
    if "://" not in artifact:
        artifact = str(PurePosixPath(Path(artifact).as_posix()))
        return quote(os.fsencode(artifact), safe="/")
    return quote(os.fsencode(artifact), safe="/:?#@%")

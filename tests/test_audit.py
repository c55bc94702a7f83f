"""The audit of dependencies in .ci, on answers as pip-audit gives them."""

from __future__ import annotations

import json
import runpy
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def audit() -> dict[str, Any]:
    return runpy.run_path(str(REPOSITORY / ".ci" / "audit.py"))


def answer(**packages: list[str] | None) -> dict[str, Any]:
    entries: list[dict[str, Any]] = []
    for name, found in packages.items():
        if found is None:
            entries.append({"name": name, "skip_reason": "Dependency not found on PyPI"})
        else:
            vulnerabilities = [
                {"id": each, "fix_versions": ["9.9"], "aliases": [], "description": ""}
                for each in found
            ]
            entries.append({"name": name, "version": "1.0", "vulns": vulnerabilities})
    return {"dependencies": entries, "fixes": []}


def test_direct_dependencies_fail_and_others_warn(audit: dict[str, Any]) -> None:
    found = answer(torch=["CVE-2025-1"], urllib3=["CVE-2025-2", "CVE-2025-3"], rich=[])
    failures, warnings = audit["judge"](found, {"torch", "rich"})
    assert failures == ["torch 1.0: CVE-2025-1, fixed in 9.9"]
    assert [text.split(",")[0] for text in warnings] == [
        "urllib3 1.0: CVE-2025-2",
        "urllib3 1.0: CVE-2025-3",
    ]


def test_what_was_not_audited_is_told(audit: dict[str, Any]) -> None:
    failures, [warning] = audit["judge"](answer(torch=None, rich=[]), {"torch", "rich"})
    assert failures == []
    assert "1 of 2 packages, so they were NOT audited: torch" in warning


def test_excluded_releases_are_excluded(audit: dict[str, Any]) -> None:
    lines = metadata.requires("lightning-mnp") or []
    direct = audit["direct_dependencies"](lines)
    assert {"torch", "lightning", "safetensors", "scikit-learn"} <= set(direct)
    assert "pytest" not in direct
    assert list(audit["allowed_again"](direct)) == []
    loosened = ["torch>=2.5", "lightning>=2.6,!=2.6.2"]
    found = list(audit["allowed_again"](audit["direct_dependencies"](loosened)))
    assert [each.split(" is not")[0] for each in found] == ["lightning 2.6.3", "torch 2.5.1"]


def test_local_versions_are_asked_for_as_the_index_has_them(audit: dict[str, Any]) -> None:
    lines = audit["pinned"]()
    assert not any("+" in line or line.startswith("lightning-mnp==") for line in lines)
    assert any(line.startswith("torch==") for line in lines)


@pytest.mark.parametrize("fault", ["no program", "no answer", "slow"])
def test_no_answer_is_a_warning(
    audit: dict[str, Any],
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(command: list[str], **options: Any) -> Any:
        if fault == "no program":
            raise FileNotFoundError("pip-audit")
        if fault == "slow":
            raise subprocess.TimeoutExpired(command, 1)
        return subprocess.CompletedProcess(command, 1, stdout="", stderr="no network")

    monkeypatch.setattr(subprocess, "run", run)
    assert audit["main"]() == 0
    assert "WARNING: known vulnerabilities were NOT looked up" in capsys.readouterr().out


def test_vulnerable_direct_dependency_fails(
    audit: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.dumps(answer(torch=["CVE-2025-1"]))
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, found, "")
    )
    assert audit["main"]() == 1
    assert "FAILURE: torch 1.0: CVE-2025-1, fixed in 9.9" in capsys.readouterr().out

"""Audit the installed packages: withdrawn releases stay excluded, known vulnerabilities are told.

Known vulnerabilities come from the package index itself (pypi.org), through pip-audit. Where it
cannot be asked, that is a warning; a vulnerability in a direct dependency is a failure.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import distributions, requires
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

SECONDS = 300
# Releases that must stay out of reach, and why.
EXCLUDED = {
    ("lightning", "2.6.2"): "withdrawn after a supply-chain compromise",
    ("lightning", "2.6.3"): "withdrawn after a supply-chain compromise",
    ("torch", "2.5.1"): "CVE-2025-32434: torch.load(weights_only=True) can run code",
}


def direct_dependencies(lines: list[str]) -> dict[str, Requirement]:
    """Pick what users install: the dependencies and the extra `demo`."""
    requirements = [Requirement(line) for line in lines]
    return {
        str(canonicalize_name(each.name)): each
        for each in requirements
        if each.marker is None or each.marker.evaluate({"extra": "demo"})
    }


def allowed_again(direct: dict[str, Requirement]) -> Iterator[str]:
    """Find excluded releases that the requirements would accept."""
    for (name, version), reason in EXCLUDED.items():
        if direct[name].specifier.contains(version, prereleases=True):
            yield f"{name} {version} is not excluded any more: {reason}"


def pinned() -> list[str]:
    """List what is installed as the index knows it, without local parts such as +cpu."""
    found = {str(canonicalize_name(each.name)): Version(each.version) for each in distributions()}
    found.pop("lightning-mnp", None)
    return [f"{name}=={version.public}" for name, version in sorted(found.items())]


def ask(requirements: list[str]) -> dict[str, Any]:
    """Ask the index about releases; RuntimeError if it gives no answer."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(requirements))
        file.flush()
        options = [
            "--vulnerability-service",
            "pypi",
            "--disable-pip",
            "--no-deps",
            "--format",
            "json",
        ]
        command = ["pip-audit", *options, "--progress-spinner", "off", "--requirement", file.name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
            answer: dict[str, Any] = json.loads(done.stdout)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise RuntimeError(f"pip-audit gave no answer: {error}") from error
        except json.JSONDecodeError as error:
            last = (done.stderr.strip().splitlines() or ["nothing was printed"])[-1]
            raise RuntimeError(f"pip-audit gave no answer: {last}") from error
    return answer


def judge(answer: dict[str, Any], direct: set[str]) -> tuple[list[str], list[str]]:
    """Sort an answer of pip-audit into failures and warnings."""
    failures, warnings = [], []
    skipped = [entry["name"] for entry in answer["dependencies"] if "skip_reason" in entry]
    for entry in answer["dependencies"]:
        name = str(canonicalize_name(entry["name"]))
        for vulnerability in entry.get("vulns", []):
            fixed = ", ".join(vulnerability["fix_versions"]) or "no release yet"
            text = f"{name} {entry['version']}: {vulnerability['id']}, fixed in {fixed}"
            (failures if name in direct else warnings).append(text)
    if skipped:
        total = len(answer["dependencies"])
        warnings.append(
            f"the index knows nothing about {len(skipped)} of {total} packages, so they were NOT "
            f"audited: {', '.join(skipped)}"
        )
    return failures, warnings


def main() -> int:
    """Print what was found; 1 where something has to be done."""
    direct = direct_dependencies(requires("lightning-mnp") or [])
    failures, warnings = list(allowed_again(direct)), []
    requirements = pinned()
    try:
        found, warnings = judge(ask(requirements), set(direct))
        failures += found
    except RuntimeError as error:
        first = re.sub(r"\s+", " ", str(error))
        warnings.append(f"known vulnerabilities were NOT looked up: {first}")
    for text in warnings:
        print(f"WARNING: {text}")
    for text in failures:
        print(f"FAILURE: {text}")
    if not failures:
        print(f"{len(requirements)} packages; nothing that has to be done")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())

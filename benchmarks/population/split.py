"""Which networks serve to choose and which to report: a rule, and the file that keeps it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning_mnp.checkpoints.atomic_write import write_atomically

__all__ = ["FIRST_SEED", "REPORTING_ONLY", "SPLIT_FILE", "seen_networks", "split_of"]

SPLIT_FILE = Path(__file__).with_name("split.json")

# Architectures on which nothing is ever chosen.
REPORTING_ONLY = ("all-conv", "inception", "resnext", "squeezenet")

# Those from 201 to 229 were reported until the present verdict was set with them in view. Smaller
# ones are of earlier studies.
FIRST_SEED = {"choosing": 201, "reporting": 401}


def split_of(architecture: str, seed: int) -> str:
    """Return the split of a network: ``"choosing"`` or ``"reporting"``.

    Networks of an architecture that is for reporting only are reported, and so are those of other
    architectures with a seed from 401 on. All others serve to choose.

    Args:
        architecture: Its architecture.
        seed: Its seed.

    Example:
        >>> split_of("cnn", 202), split_of("cnn", 401), split_of("inception", 202)
        ('choosing', 'reporting', 'reporting')
    """
    late = seed >= FIRST_SEED["reporting"]
    return "reporting" if late or architecture in REPORTING_ONLY else "choosing"


def seen_networks() -> dict[str, list[str]]:
    """Return the networks of earlier studies, by the program that trained them.

    Options and thresholds were set while these were looked at, the ones that a study reported
    included. So they may serve to choose and never to report. The programs are gone; the list is
    kept in the split file.
    """
    content = json.loads(SPLIT_FILE.read_text("utf-8"))
    return {program: list(names) for program, names in content["seen"].items()}


def make_split(names: dict[str, tuple[str, int]]) -> dict[str, Any]:
    """Make the content of the split file.

    Args:
        names: Architecture and seed of each network, by its name.
    """
    seen = seen_networks()
    content: dict[str, Any] = {
        "rule": "reporting: architectures in reporting_only, and seeds from 401 on; choosing: all "
        "others, and the networks in seen, which earlier studies looked at",
        "reporting_only": list(REPORTING_ONLY),
    }
    for split in ("choosing", "reporting"):
        content[split] = [name for name, key in names.items() if split_of(*key) == split]
    return {**content, "seen": seen}


def write_split(names: dict[str, tuple[str, int]]) -> None:
    """Write the split file; done once, before the first audit.

    Args:
        names: See :func:`make_split`.
    """
    text = json.dumps(make_split(names), indent=1) + "\n"
    write_atomically(
        SPLIT_FILE, lambda partial: partial.write_text(text), argument="split", replace=True
    )

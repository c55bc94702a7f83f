"""The reference population of the package: scores of clean networks, from the audits' files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning_mnp
from benchmarks.population.recipes import Recipe
from lightning_mnp.checkpoints.atomic_write import write_atomically
from lightning_mnp.signals.population import SCORES_FORMAT

__all__ = ["REFERENCE_FILE", "reference_of", "write_reference"]

REFERENCE_FILE = Path(lightning_mnp.__file__).parent / "signals" / "population.json"
_NAMES = {"cifar10": "CIFAR-10", "imagenette": "Imagenette at 64 pixels", "digits": "digits"}


def reference_of(
    recipes: Sequence[Recipe], audits: Iterable[dict[str, Any]], version: str
) -> dict[str, Any]:
    """Return the scores of the clean networks among audits, as the package reads them.

    Args:
        recipes: Networks of one split, all of them.
        audits: Audits of any networks; those of others, of backdoored networks, by other versions
            of the code, and without a score that means something are left out.
        version: Digest of the code whose scores are wanted.

    Returns:
        Primitives.

    Raises:
        ValueError: If nothing is left, or a clean network has no audit by this version, so that the
            scores would be those of a part.
    """
    audits = list(audits)
    known = {recipe.name: recipe for recipe in recipes if recipe.is_clean}
    clean = [row for row in audits if row["network"] in known and row["judged"]]
    rows = [row for row in clean if row["version"] == version]
    if not rows:
        found = sorted({row["version"] for row in clean})
        raise ValueError(
            f"Expected audits of clean networks by version {version} of the code, but found "
            f"{found or 'none'}. Audit them with `--renew`."
        )
    missing = sorted(known.keys() - {row["network"] for row in audits if row["version"] == version})
    if missing:
        raise ValueError(
            f"Expected an audit of each clean network of the split by version {version} of the "
            f"code, but found none of {', '.join(missing)}. Train them, and audit them with "
            "`--renew`."
        )
    seen = [known[name] for name in dict.fromkeys(row["network"] for row in rows)]
    accuracies = [row["CA"] for row in rows]
    architectures = len({recipe.architecture for recipe in seen})
    data = ", ".join(_NAMES[name] for name in _NAMES if name in {each.data for each in seen})
    return {
        "format": SCORES_FORMAT,
        "described": (
            f"clean networks of {architectures} small architectures ({data}; accuracies from "
            f"{min(accuracies):.0%} to {max(accuracies):.0%}) that were audited for comparison"
        ),
        "version": version,
        "networks": [
            {
                "file": f"{row['network']}, set {row['set']}",
                "weights": row["weights_sha256"],
                "score": row["score"],
                "verdict": row["verdict"],
                "seconds": row["processor_seconds"],
            }
            for row in rows
        ],
    }


def write_reference(content: dict[str, Any], file: Path = REFERENCE_FILE) -> None:
    """Write the reference population into the package.

    Args:
        content: What :func:`reference_of` has returned.
        file: Where to.
    """
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(
        file, lambda path: path.write_text(text, "utf-8"), argument="file", replace=True
    )

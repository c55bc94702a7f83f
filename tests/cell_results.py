"""Results of cells, made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_mnp.benchmark.records import SCHEMA, write_json
from lightning_mnp.benchmark.results import Result

MACHINE = {
    "device": "cpu",
    "name": "A processor",
    "threads": 1,
    "system": "Linux",
    "versions": {"python": "3.11", "torch": "2.6", "lightning-mnp": "0.1.0"},
}


def result(
    label: str = "anp",
    after: tuple[float, float | None] | None = (0.9, 0.01),
    *,
    attack: str = "BadNets",
    task: str = "defense",
    verdict: str | None = None,
    seed: int = 0,
    error: str = "",
    method: dict[str, Any] | None = None,
    size: int = 500,
    machine: dict[str, Any] | None = None,
    before: tuple[float, float] = (0.95, 1.0),
    weights: str | None = None,
    **network: Any,
) -> Result:
    """Make one result; CA and ASR from 0 to 1."""
    clean = attack == "clean"
    described = {
        "digest": f"{attack}-{seed}-{network}",
        "base": "cifar10-2core",
        "data": "CIFAR10DataModule",
        "attack": attack.lower(),
        "attack_class": attack,
        "mode": None if clean else "all-to-one",
        "rate": None if clean else 0.1,
        "usual": True,
        "seed": seed,
        "architecture": "cifar_resnet18",
        "width": 16,
        "epochs": 10,
        "options": {},
        "fine_tuning": {},
        "device": "cpu",
        **network,
    }
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "cell": {
            "network": described,
            "task": task,
            "method": method or {"name": label, "options": {}},
            "label": label,
            "defense_size": size,
            "defense_seed": 0,
            "test_images": None,
        },
        "code": "abc-def",
        "date": "2026-01-02T03:04:05+00:00",
        "machine": machine or MACHINE,
        "status": "failed" if error else "done",
    }
    if error:
        content["error"] = {"type": "ValueError", "message": error, "trace": []}
    else:
        content.update(
            before={"CA": before[0], "ASR": None if clean else before[1]},
            after=None if after is None else {"CA": after[0], "ASR": after[1]},
            verdict=verdict,
            target_class=None,
            score=None,
            pruned=3,
            seconds=2.0 + seed,
            passes=100.0,
            peak_mib=50.0 + seed,
            training={"seconds": 9.0, "weights_sha256": weights},
        )
    name = "-".join(map(str, (attack, label, task, seed, size, sorted(network.items()))))
    return Result(name.replace("/", ""), content)


def write(results: list[Result], folder: Path) -> Path:
    """Write results as the files that a run leaves; return the folder."""
    for number, each in enumerate(results):
        write_json(folder / f"cell-{number}.json", each.content)
    return folder

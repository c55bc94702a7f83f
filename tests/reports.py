"""Reports for tests: one with something in every field, one in which every name is hostile."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image

from lightning_mnp.report import (
    DefenseReport,
    DefenseSetSummary,
    PruningReport,
    ReferenceRate,
    RunResult,
    SecondAudit,
    Signal,
    SurrogateTrigger,
    TriggerExample,
    WeightsFile,
)

HOSTILE = "<script>alert(1)</script>\"'`|*_[x](http://a.b) @all #1 \x1b[2J\u202e"


def png() -> str:
    file = io.BytesIO()
    Image.new("L", (2, 2)).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


EXAMPLE = TriggerExample(label=0, before=0, after=1, clean=png(), triggered=png())
SIGNALS = [
    Signal("patch", 4.6, 1, 6.9, 1.5, "a patch reaches class 1", {0: -0.5, 1: 4.0, 2: 0.1}),
    Signal("margin", 0.4, 2, 0.5, 0.8, "the margin of class 2", {0: 9.0, 1: 1.0, 2: 12.0}),
    Signal("permutation", 0.0, None, 0.143, 0.46, "one patch", {0: 1, 1: 0}),
    Signal("pile-up", 1.2, 1, 1.2, 1.0, "a pile-up on class 1", {0: 0.1, 1: 0.9}, decides=False),
]


def full_report(**changes: Any) -> DefenseReport:
    """A report in which every field holds something."""
    content: dict[str, Any] = {
        "verdict": "backdoored",
        "target_class": 1,
        "score": 4.6,
        "reference": ReferenceRate(40, 1, 0.001, 0.132, "clean networks"),
        "detection_ratio": 0.35,
        "reasons": [signal.reason for signal in SIGNALS],
        "warnings": ["M1 of run 1 stopped early"],
        "signals": SIGNALS,
        "triggers": [SurrogateTrigger("patch", 1, 0.97, 64, png(), (EXAMPLE,))],
        "runs": [RunResult(0.35, 0.1, (2, 5, 1), 12, 0.2, "it fell", (0.9, 0.5, 0.2))],
        "rare_classes": {2: 0.75},
        "accuracy_before": 0.85,
        "accuracy_after": 0.84,
        "class_accuracy_before": {0: 0.9, 1: 0.8},
        "class_accuracy_after": {0: 0.9, 1: 0.7},
        "pruned": [("layer1.conv", 3)],
        "pruning": PruningReport(
            scores=[1.25],
            counts=[0, 1],
            curve=[[0.0, 1.0], [0.01, 0.2]],
            traces=["patch"],
            masks={"layer1.conv": [1.0, 1.0, 0.5, 0.0], "layer2.conv": [1.0]},
            shift=[0.0, 0.1],
            sums={"layer1.conv": [2.5, 3.0, 2.0, 1.25], "layer2.conv": [2.0]},
        ),
        "reaudit": SecondAudit("clean", 0.5, None, False, 0.9, 0.2, ["nothing stands out"]),
        "filters": 5,
        "layers": [{"name": "layer1.conv", "filters": 4}, {"name": "layer2.conv", "filters": 1}],
        "skipped": [("head", "classifier head: its filters are classes")],
        "defense_set": DefenseSetSummary(500, [3, 32, 32], {0: 250, 1: 250}, "ab" * 32),
        "class_names": ["cat", "dog"],
        "weights_file": WeightsFile("models/suspicious.pt", "cd" * 32, 4096),
        "weights_sha256": "ef" * 32,
        "config": {"seed": 0, "verdict": {"threshold": 1.0, "rule": "signals"}},
        "versions": {"lightning-mnp": "0.1.0"},
        "seconds": {"patch": 1.5},
        "passes": {"patch": 900.0},
        "date": "2026-11-28T10:00:00+00:00",
    }
    return DefenseReport(**{**content, **changes})


def hostile_report() -> DefenseReport:
    """A report in which every name is an attack on whoever shows it."""
    signal = Signal(HOSTILE, 4.6, 1, 6.9, 1.5, HOSTILE, {0: 0.1, 1: 4.0})
    example = TriggerExample(0, 1, 1, '"><script>alert(2)</script>', "javascript:alert(3)")
    return full_report(
        signals=[signal],
        reasons=[HOSTILE, f"class 1 {HOSTILE}"],
        warnings=[HOSTILE],
        triggers=[SurrogateTrigger(HOSTILE, 1, 0.97, 64, f'{png()}" onload="x', (example,))],
        runs=[RunResult(0.35, 0.1, (2, 5, 1), 12, 0.2, HOSTILE, (0.9, 0.2))],
        pruned=[(HOSTILE, 3)],
        pruning=PruningReport(counts=[0, 1], curve=[[0.0, 1.0], [0.0, 0.5]], traces=[HOSTILE]),
        layers=[{"name": HOSTILE, "filters": HOSTILE}],
        skipped=[(HOSTILE, HOSTILE)],
        class_names=[HOSTILE, HOSTILE],
        weights_file=WeightsFile(HOSTILE, HOSTILE, 1),
        weights_sha256=HOSTILE,
        config={HOSTILE: HOSTILE},
        versions={"lightning-mnp": HOSTILE, HOSTILE: HOSTILE},
        seconds={HOSTILE: 1.0},
        date=HOSTILE,
    )

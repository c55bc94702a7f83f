from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import attacks
from benchmarks.attacks import Recipe, Task


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    task = Task("badnets", "cifar10-2core", Recipe(("badnets",)), tmp_path, tmp_path / "out")
    monkeypatch.setattr(task, "test", lambda: {"CA": 0.9, "ASR": 1.0})
    return task


def command(code: int, monkeypatch: pytest.MonkeyPatch, task: Task) -> None:
    script = f"import sys, time; time.sleep(0.5); sys.exit({code})"
    monkeypatch.setattr(task, "command", lambda subcommand: [sys.executable, "-c", script])


def test_time_before_a_stop_counts(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attacks, "NOTED_EVERY", 0.05)
    command(1, monkeypatch, task)
    with pytest.raises(RuntimeError, match=r"badnets: fit\.log ends with exit code 1"):
        task.finish()
    first = task.spent()
    assert first > 0.3
    assert not task.is_trained()

    command(0, monkeypatch, task)
    result = task.finish()

    assert task.is_trained()
    assert result["seconds"] > first + 0.3
    assert task.finish() == result


@pytest.mark.parametrize(
    ("figures", "trained"),
    [({}, False), ({"seconds": 3}, True), ({"seconds": 3, "finished": False}, False)],
)
def test_what_counts_as_trained(task: Task, figures: dict[str, Any], trained: bool) -> None:
    task.folder.mkdir(parents=True)
    if figures:
        (task.folder / "seconds.json").write_text(json.dumps(figures))
    assert task.is_trained() == trained


def test_a_training_without_a_checkpoint_begins_anew_and_one_with_it_goes_on(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    task.precision = "32-true"
    commands: list[list[str]] = []
    monkeypatch.setattr(task, "run", lambda command, *rest: commands.append(command))
    task.folder.mkdir(parents=True)
    config = task.folder / "config.yaml"
    config.write_text("of a training that was stopped at once")

    task.fit()

    assert not config.exists()
    assert "--ckpt_path" not in commands[0]
    assert commands[0][commands[0].index("--trainer.precision") + 1] == "32-true"

    config.write_text("of a training that was stopped")
    task.checkpoint.parent.mkdir()
    task.checkpoint.write_bytes(b"")
    task.fit()

    assert config.exists()
    assert commands[1][commands[1].index("--ckpt_path") + 1] == str(task.checkpoint)
